//! The two listening sockets a VMM inherits.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};

use super::absent_is_fine;

/// Connections that may wait to be accepted; a burst of execs must not be refused.
const BACKLOG: i32 = 128;
/// Longest path of a unix socket: sun_path (unix(7)) less its NUL.
pub(crate) const MAX_PATH: usize = 107;

/// Binds a unix socket at `path`, in place of what stood there.
pub(crate) fn listen_at(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    absent_is_fine(std::fs::remove_file(path))?;
    let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}
