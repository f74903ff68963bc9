//! Receives the terminal that libcontainer opens inside a new container and sends to a console
//! socket.

use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::stdio::pty;

/// A listening Unix socket, removed when dropped.
#[derive(Debug)]
pub struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    pub fn new(dir: &Path) -> Result<Self> {
        let path = dir.join("console.sock");
        let what = || format!("create console socket {}", path.display());
        let listener = UnixListener::bind(&path).context(what)?;
        listener.set_nonblocking(true).context(what)?;
        Ok(Self { listener, path: path.clone() })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Receives the master side. libcontainer sent it before it reported the container as created.
    pub fn receive(&self) -> Result<OwnedFd> {
        let (stream, _) =
            self.listener.accept().context(|| "accept on the console socket".to_owned())?;
        pty::receive(&stream)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
