//! Listening sockets that a VMM, agent or file server inherits.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::Path;

use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, listen, socket,
};

use super::ignore_not_found;

/// Listen backlog; a burst of execs must not be refused.
const BACKLOG: i32 = 128;
/// Longest path of a unix socket: sun_path (unix(7)) less its NUL.
pub(crate) const MAX_PATH: usize = 107;

/// Binds and listens on a Unix socket at `path`; replaces an existing file.
pub(crate) fn listen_at(path: &Path, kind: SockType) -> io::Result<OwnedFd> {
    ignore_not_found(std::fs::remove_file(path))?;
    let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    bind(socket.as_raw_fd(), &UnixAddr::new(path)?)?;
    listen(&socket, Backlog::new(BACKLOG)?)?;
    Ok(socket)
}
