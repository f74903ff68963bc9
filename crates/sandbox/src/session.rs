//! What a caller of exec and attach holds: plain byte streams, and a handle on the process.

use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::Error;
use crate::model::ExitView;

pub type ByteReader = Pin<Box<dyn AsyncRead + Send>>;
pub type ByteWriter = Pin<Box<dyn AsyncWrite + Send>>;

/// A command that runs in a container. Shutting `stdin` down closes the command's standard input.
/// Dropping `process` before the command's end kills it.
pub struct ExecSession {
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    /// None with a tty.
    pub stderr: Option<ByteReader>,
    pub process: ExecProcess,
}

/// The streams of a container's own process, from now on.
pub struct AttachSession {
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    pub stderr: Option<ByteReader>,
    pub process: AttachProcess,
}

/// Handle on an exec'd process.
pub struct ExecProcess {}

impl ExecProcess {
    pub async fn resize(&self, _width: u16, _height: u16) -> Result<(), Error> {
        Err(Error::unavailable("not connected"))
    }

    /// Sends a signal by number.
    pub async fn signal(&self, _signal: u32) -> Result<(), Error> {
        Err(Error::unavailable("not connected"))
    }

    /// Waits for the end. Output may still be on its way: read both streams to their end first.
    pub async fn wait(&mut self) -> Result<ExitView, Error> {
        Err(Error::unavailable("not connected"))
    }
}

/// Handle on a container's own process.
pub struct AttachProcess {}

impl AttachProcess {
    pub async fn resize(&self, _width: u16, _height: u16) -> Result<(), Error> {
        Err(Error::unavailable("not connected"))
    }

    /// Waits for the container's end.
    pub async fn wait(&mut self) -> Result<ExitView, Error> {
        Err(Error::unavailable("not connected"))
    }
}
