//! The launcher process: spawns VMMs and file servers, and creates user namespaces for idmapped
//! mounts, so that the daemon never forks.
//!
//! It is started early, has one thread and no descriptors of pods, and serves one peer over a
//! `SOCK_SEQPACKET` socket: a [`Request`] in, the new process' pid and pidfd out. It exits when the
//! daemon's end of the socket closes. Spawned processes survive it in the pods' cgroups and own
//! sessions, and are found by the journal.

mod client;
mod protocol;
mod spawn;
mod userns;

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use vmm_api::transport::{self, TransportError};

pub use client::{Launch, Launched, LauncherProcess, Program};
pub use protocol::{IdRange, Namespaces};
use protocol::{Request, Response};

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
