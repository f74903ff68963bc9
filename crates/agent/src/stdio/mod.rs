//! Streams of processes: `window` buffers unacknowledged output, `output` and `input` copy between
//! pipes or terminals and the host, `pty` holds terminal calls, `serve` serves the host's
//! connections in the framing of `agent_api::stdio`.

#![allow(unsafe_code)] // AsyncFd::register

pub mod input;
pub mod output;
pub mod pty;
pub mod serve;
mod window;

use std::os::fd::OwnedFd;
use std::sync::Arc;

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::unix::AsyncFd;

/// A pipe end or terminal master in non-blocking mode; both directions of a terminal share one.
pub type Channel = Arc<AsyncFd<OwnedFd>>;

/// Sets O_NONBLOCK and registers the descriptor with tokio.
pub fn channel(fd: OwnedFd) -> std::io::Result<Channel> {
    let flags = OFlag::from_bits_truncate(fcntl(&fd, FcntlArg::F_GETFL)?);
    fcntl(&fd, FcntlArg::F_SETFL(flags | OFlag::O_NONBLOCK))?;
    // SAFETY: an `OwnedFd` names one open descriptor for its whole life, and the `AsyncFd` that
    // owns it gives out references only, so it cannot be closed or replaced.
    Ok(Arc::new(unsafe { AsyncFd::register(fd) }?))
}
