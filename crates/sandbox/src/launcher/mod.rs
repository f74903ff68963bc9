//! The small process that spawns VMMs and file servers, and makes user namespaces to map a share's
//! ids by, so that the daemon never forks itself.
//!
//! It is started early, has one thread, holds no pod's descriptors, and obeys one peer over a
//! `SOCK_SEQPACKET` socket: an [`Order`] in, the new process' pid and pidfd out. It ends when the
//! daemon's end of the socket closes; what it has spawned lives on, in the pods' own cgroups and
//! sessions, and is found again by the daemon's journal.

mod client;
mod spawn;
mod userns;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use serde::{Deserialize, Serialize};
use vmm_api::transport::{self, TransportError};

pub use client::{Launch, Launched, LauncherProcess, Program};

/// Those that a program has of its own (namespaces(7)); the others are the daemon's.
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

/// A run of ids that stand for others (user_namespaces(7)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IdRange {
    /// First id in the namespace: of a share, what stands on the disk.
    pub inside: u32,
    /// First id outside of it: of a share, what the guest sees.
    pub outside: u32,
    pub count: u32,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "order", rename_all = "snake_case", deny_unknown_fields)]
enum Order {
    /// Start a program. The descriptors come with the packet: the cgroup's folder, standard error,
    /// then those that the program finds from number 3 on.
    Program { exe: std::path::PathBuf, args: Vec<String>, own: Namespaces },
    /// Make a user namespace in which nobody is.
    UserNamespace { uids: Vec<IdRange>, gids: Vec<IdRange> },
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Outcome {
    /// The pidfd comes with the packet.
    Started {
        pid: u32,
    },
    /// The namespace comes with the packet.
    Namespace,
    Failed {
        what: String,
        errno: i32,
    },
}

/// Descriptors of an [`Order::Program`] besides the program's own.
const OWN_FDS: usize = 2;

impl Outcome {
    fn failed(what: String, error: &io::Error) -> Self {
        Self::Failed { what, errno: error.raw_os_error().unwrap_or(libc::EIO) }
    }
}

/// Entry of the launcher process; returns when the daemon has closed its end of the socket.
///
/// Must be called from a process with a single thread, before any runtime is started. The daemon
/// passes the socket as standard input.
pub fn main(socket: OwnedFd) -> io::Result<()> {
    // The terminal's signals are the daemon's business; we end with its socket.
    nix::unistd::setsid()
        .or_else(|e| if e == nix::Error::EPERM { Ok(nix::unistd::getpid()) } else { Err(e) })?;
    spawn::leave_children_to_the_kernel()?;
    loop {
        let (outcome, fd) = match transport::receive::<Order>(socket.as_fd()) {
            Ok((Order::Program { exe, args, own }, fds)) => spawn::spawn(&exe, &args, own, fds),
            Ok((Order::UserNamespace { uids, gids }, _)) => match userns::make(&uids, &gids) {
                Ok(namespace) => (Outcome::Namespace, Some(namespace)),
                Err((what, e)) => (Outcome::failed(what, &e), None),
            },
            Err(TransportError::Closed) => return Ok(()),
            Err(TransportError::Socket(nix::Error::EINTR)) => continue,
            Err(TransportError::Socket(e)) => return Err(e.into()),
            Err(e) => (Outcome::Failed { what: e.to_string(), errno: libc::EPROTO }, None),
        };
        let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
        match transport::send(socket.as_fd(), &outcome, &fds) {
            Ok(()) => {}
            Err(TransportError::Socket(nix::Error::EPIPE | nix::Error::ECONNRESET)) => {
                return Ok(());
            }
            Err(e) => return Err(io::Error::other(e)),
        }
    }
}
