//! The small process that spawns VMMs.

use std::io;
use std::os::fd::OwnedFd;

/// Entry of the launcher process; returns when the daemon has closed its end of the socket.
///
/// Must be called from a process with a single thread, before any runtime is started. The daemon
/// passes the socket as standard input.
pub fn main(_socket: OwnedFd) -> io::Result<()> {
    Ok(())
}
