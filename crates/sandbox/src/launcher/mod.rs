//! The launcher process: spawns VMMs and file servers, and creates user namespaces for idmapped
//! mounts, so that the daemon never forks.
//!
//! It is started early, has one thread and no descriptors of pods, and serves one peer over a
//! `SOCK_SEQPACKET` socket: a [`Request`] in, the new process' pid and pidfd out. It exits when the
//! daemon's end of the socket closes. Spawned processes survive it in the pods' cgroups and own
//! sessions, and are found by the journal.

mod client;
mod spawn;
mod userns;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};
use vmm_api::transport::{self, TransportError};

pub use client::{Launch, Launched, LauncherProcess, Program};

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
enum Request {
    /// Spawn a program. Descriptors in the packet: the cgroup's directory, standard error, then the
    /// program's from 3 on.
    Program { exe: std::path::PathBuf, args: Vec<String>, own: Namespaces },
    /// Create a user namespace without processes.
    UserNamespace { uids: Vec<IdRange>, gids: Vec<IdRange> },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Response {
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
const OWN_FDS: usize = 2;

impl Response {
    fn failed(what: String, error: &io::Error) -> Self {
        Self::Failed { what, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

/// Main function of the launcher process; returns when the daemon has closed the socket.
///
/// Must be called from a process with a single thread, before any runtime is started. The daemon
/// passes the socket as standard input.
pub fn main(socket: OwnedFd) -> io::Result<()> {
    // A session of its own: signals of the daemon's terminal must not reach the launcher.
    nix::unistd::setsid()
        .or_else(|e| if e == nix::Error::EPERM { Ok(nix::unistd::getpid()) } else { Err(e) })?;
    spawn::ignore_sigchld()?;
    loop {
        let (response, fd) = match transport::receive::<Request>(socket.as_fd()) {
            Ok((Request::Program { exe, args, own }, fds)) => spawn::spawn(&exe, &args, own, fds),
            Ok((Request::UserNamespace { uids, gids }, _)) => match userns::make(&uids, &gids) {
                Ok(namespace) => (Response::Namespace, Some(namespace)),
                Err((what, e)) => (Response::failed(what, &e), None),
            },
            Err(TransportError::Closed) => return Ok(()),
            Err(TransportError::Socket(nix::Error::EINTR)) => continue,
            Err(TransportError::Socket(e)) => return Err(e.into()),
            Err(e) => (Response::Failed { what: e.to_string(), errno: libc::EPROTO }, None),
        };
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        match transport::send(socket.as_fd(), &response, &fds) {
            Ok(()) => {}
            Err(TransportError::Socket(nix::Error::EPIPE | nix::Error::ECONNRESET)) => {
                return Ok(());
            }
            Err(e) => return Err(io::Error::other(e)),
        }
    }
}
