//! Takes the terminal that libcontainer opens inside a new container and sends to a socket.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::error::{Doing, Result};
use crate::stdio::pty;

/// A listening socket in the file system, removed when dropped.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    pub fn new(dir: &Path) -> Result<Self> {
        let path = dir.join("console.sock");
        let what = || format!("make console socket {}", path.display());
        let listener = UnixListener::bind(&path).doing(what)?;
        listener.set_nonblocking(true).doing(what)?;
        Ok(Self { listener, path: path.clone() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The terminal's master side. It was sent before the container was reported as made.
    pub fn receive(&self) -> Result<OwnedFd> {
        let (stream, _) =
            self.listener.accept().doing(|| "accept the terminal's sender".to_owned())?;
        pty::receive(&stream)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
