//! Interface of the server to its embedder: [`Backend`] starts processes and connects ports.

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
    /// Used by the WebSocket protocol with two channels for each port only; the other protocols
    /// name the port with each stream.
    pub ports: Vec<u16>,
}

/// Terminal size in characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TtySize {
    pub width: u16,
    pub height: u16,
}

/// Starts and attaches processes, connects ports. Futures are dropped when the client disconnects.
#[async_trait]
pub trait Backend: Send + Sync + 'static {
    /// Starts a command. `size` is the client's terminal size, if it was sent.
    async fn exec(
        &self,
        params: ExecParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError>;

    /// Attaches to the streams of a running process. The session ends with its output, or with the
    /// process if it has no output.
    async fn attach(
        &self,
        params: AttachParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError>;

    /// Connects to a port of a pod's loopback interface. Shutting down the stream closes one
    /// direction.
    async fn port_forward(&self, pod: &str, port: u16) -> Result<ByteStream, BackendError>;
}

pub struct Session {
    pub stdin: Option<ByteWriter>,
    pub stdout: Option<ByteReader>,
    pub stderr: Option<ByteReader>,
    /// Effect of the end of the client's input.
    pub stdin_end: StdinEnd,
    /// Dropped at the end of the session, also if the client disconnects; a process started by exec
    /// that still runs is to be killed then.
    pub process: Box<dyn Process>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StdinEnd {
    /// The process' stdin is shut down and dropped. For exec, and for attach with stdin_once and
    /// without a terminal.
    Close,
    /// The process' stdin is dropped without shutdown and stays open for other clients; the session
    /// ends.
    Detach,
}

#[async_trait]
pub trait Process: Send {
    async fn resize(&mut self, size: TtySize) -> Result<(), BackendError>;

    /// Waits for the exit; returns the exit code, 128 + n after signal n. Must be cancel-safe.
    async fn wait(&mut self) -> Result<i32, BackendError>;
}

/// An error whose text, with its sources, is sent to the client.
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
