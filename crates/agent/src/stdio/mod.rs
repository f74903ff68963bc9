//! Process streams: buffering while the host is away (`window`), the pumps between a process'
//! pipes or terminal and the buffer (`output`, `input`), terminals (`pty`) and the connections of
//! the host (`serve`), framed as `agent_api::stdio` says.

#![allow(unsafe_code)] // registering a descriptor with the event loop

pub mod input;
pub mod output;
pub mod pty;
pub mod serve;
mod window;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;

/// A pipe end or a terminal's master, in non-blocking mode; shared by both directions of a
/// terminal.
pub type Channel = Arc<AsyncFd<OwnedFd>>;

/// Makes a descriptor usable from the event loop.
pub fn channel(fd: OwnedFd) -> std::io::Result<Channel> {
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: an `OwnedFd` names one open descriptor for its whole life, and the `AsyncFd` that
    // owns it here hands out references only, so nobody can close or replace it.
    Ok(Arc::new(unsafe { AsyncFd::register(fd) }?))
}
