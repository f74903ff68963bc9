//! Requests to the launcher, and its responses.

use std::io;

use serde::{Deserialize, Serialize};

/// Namespaces that are created for a program (namespaces(7)); the others are the daemon's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Namespaces {
    pub mount: bool,
    pub pid: bool,
    pub ipc: bool,
    pub uts: bool,
    pub net: bool,
}

impl Namespaces {
    pub const ALL: Self = Self { mount: true, pid: true, ipc: true, uts: true, net: true };
}

/// A range of an id mapping (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    /// First id in the namespace; for a share: the id on disk.
    pub inside: u32,
    /// First id outside of the namespace; for a share: the id in the guest.
    pub outside: u32,
    pub count: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case", deny_unknown_fields)]
pub(super) enum Request {
    /// Spawn a program. Descriptors in the packet: the cgroup's directory, standard error, then the
    /// program's from 3 on.
    Program { exe: std::path::PathBuf, args: Vec<String>, own: Namespaces },
    /// Create a user namespace without processes.
    UserNamespace { uids: Vec<IdRange>, gids: Vec<IdRange> },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Response {
    /// The packet has the pidfd.
    Started {
        pid: u32,
    },
    /// The packet has the namespace.
    Namespace,
    Failed {
        what: String,
        errno: i32,
    },
}

/// Descriptors of an [`Request::Program`] besides the program's own.
pub(super) const OWN_FDS: usize = 2;

impl Response {
    pub(super) fn failed(what: String, error: &io::Error) -> Self {
        Self::Failed { what, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}
