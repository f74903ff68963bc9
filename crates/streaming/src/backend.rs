//! The port through which the server reaches processes: whoever serves implements [`Backend`].

use std::fmt;
use std::pin::Pin;

use async_trait::async_trait;
use tokio::io::{AsyncRead, AsyncWrite};

pub type ByteReader = Pin<Box<dyn AsyncRead + Send>>;
pub type ByteWriter = Pin<Box<dyn AsyncWrite + Send>>;
pub type ByteStream = Pin<Box<dyn ReadWrite>>;

pub trait ReadWrite: AsyncRead + AsyncWrite + Send {}
impl<T: AsyncRead + AsyncWrite + Send + ?Sized> ReadWrite for T {}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecParams {
    pub container: String,
    pub command: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AttachParams {
    pub container: String,
    pub tty: bool,
    pub stdin: bool,
    pub stdout: bool,
    pub stderr: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PortForwardParams {
    pub pod: String,
    /// Only the old WebSocket form, which has two channels a port, takes its ports from here;
    /// all others name a port with each stream.
    pub ports: Vec<u16>,
}

/// In characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TtySize {
    pub width: u16,
    pub height: u16,
}

/// Every future here is dropped when the client goes away.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Starts a command. `size` is the client's terminal, where it has told.
    async fn exec(
        &self,
        params: ExecParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError>;

    /// Joins the streams of a process that runs already. The session is over when its output
    /// ends, or, if it has none, its process.
    async fn attach(
        &self,
        params: AttachParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError>;

    /// Connects to a port on a pod's loopback. Shutting the stream down closes one direction.
    async fn port_forward(&self, pod: &str, port: u16) -> Result<ByteStream, BackendError>;
}

pub struct Session {
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    pub stderr: Option<ByteReader>,
    /// What the end of the client's input means.
    pub stdin_end: StdinEnd,
    /// Dropped when the session ends, also when the client goes away: an exec'd process that
    /// still runs is then to be killed.
    pub process: Box<dyn Process>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdinEnd {
    /// The process's input is shut down and dropped: exec, and attach where a container's stdin is for one
    /// client only and no terminal.
    Close,
    /// The process's input is dropped without being shut down, stays open for others, and this
    /// session is over.
    Detach,
}

#[async_trait]
pub trait Process: Send {
    async fn resize(&mut self, size: TtySize) -> Result<(), BackendError>;

    /// Waits for the end and returns the exit code, 128 + n after signal n. Must be cancel-safe.
    async fn wait(&mut self) -> Result<i32, BackendError>;
}

/// An error that a client is told in words. Its sources' words are part of it.
pub struct BackendError(Box<dyn std::error::Error + Send + Sync>);

impl BackendError {
    pub fn new(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Self {
        BackendError(error.into())
    }
}

impl fmt::Display for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)?;
        let mut source = self.0.source();
        while let Some(error) = source {
            write!(f, ": {error}")?;
            source = error.source();
        }
        Ok(())
    }
}

impl fmt::Debug for BackendError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl std::error::Error for BackendError {}
