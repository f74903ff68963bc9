//! A backend with the host as container: real processes and terminals, and ports of the host.

use std::io;
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::process::Stdio;
use std::task::{Context, Poll, ready};

use async_trait::async_trait;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::io::{AsyncRead, AsyncReadExt, ReadBuf};
use tokio::net::TcpStream;
use tokio::net::unix::pipe;
use tokio::process::{Child, Command};

use crate::{
    AttachParams, Backend, BackendError, ByteReader, ByteStream, ByteWriter, ExecParams, Process,
    Session, StdinEnd, TtySize,
};

pub(crate) struct Host;

struct HostProcess {
    child: Child,
    /// Path of the slave.
    tty: Option<String>,
}

/// The output of a command that says it breaks off behind what it prints.
pub(super) const BREAKS: &str = "# breaks off";

/// Has nothing but an error.
struct Ends(io::ErrorKind);

impl AsyncRead for Ends {
    fn poll_read(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
        _: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Poll::Ready(Err(self.0.into()))
    }
}

/// A terminal's master, which has an error for the end: EIO, once nobody has the other side open.
struct Terminal(pipe::Receiver);

impl AsyncRead for Terminal {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        match ready!(Pin::new(&mut self.0).poll_read(cx, buf)) {
            Err(e) if e.raw_os_error() == Some(nix::libc::EIO) => Poll::Ready(Ok(())),
            read => Poll::Ready(read),
        }
    }
}

fn start(
    command: &[String],
    tty: Option<Option<TtySize>>,
    stdin: bool,
) -> Result<Session, BackendError> {
    match tty {
        Some(size) => start_in_terminal(command, size, stdin),
        None => start_with_pipes(command, stdin),
    }
}

fn start_with_pipes(command: &[String], stdin: bool) -> Result<Session, BackendError> {
    let mut child = Command::new(&command[0])
        .args(&command[1..])
        .stdin(if stdin { Stdio::piped() } else { Stdio::null() })
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()
        .map_err(BackendError::new)?;
    let breaks = command.iter().any(|word| word.contains(BREAKS));
    let stdout = child.stdout.take().map(|s| match breaks {
        true => Box::pin(s.chain(Ends(io::ErrorKind::ConnectionAborted))) as ByteReader,
        false => Box::pin(s) as ByteReader,
    });
    Ok(Session {
        stdin: child.stdin.take().map(|s| Box::pin(s) as ByteWriter),
        stdout,
        stderr: child.stderr.take().map(|s| Box::pin(s) as ByteReader),
        stdin_end: StdinEnd::Close,
        process: Box::new(HostProcess { child, tty: None }),
    })
}

fn start_in_terminal(
    command: &[String],
    size: Option<TtySize>,
    stdin: bool,
) -> Result<Session, BackendError> {
    let size = size.map(|size| nix::pty::Winsize {
        ws_row: size.height,
        ws_col: size.width,
        ws_xpixel: 0,
        ws_ypixel: 0,
    });
    let pty = nix::pty::openpty(&size, None).map_err(BackendError::new)?;
    let path = nix::unistd::ttyname(&pty.slave).map_err(BackendError::new)?;
    let slave = || pty.slave.try_clone().map(Stdio::from).map_err(BackendError::new);
    let child = Command::new("setsid")
        .arg("--ctty")
        .args(command)
        .stdin(slave()?)
        .stdout(slave()?)
        .stderr(slave()?)
        .kill_on_drop(true)
        .spawn()
        .map_err(BackendError::new)?;
    drop(pty.slave);
    fcntl(&pty.master, FcntlArg::F_SETFL(OFlag::O_NONBLOCK | OFlag::O_RDWR))
        .map_err(BackendError::new)?;
    let second: OwnedFd = pty.master.try_clone().map_err(BackendError::new)?;
    let stdout = pipe::Receiver::from_owned_fd_unchecked(pty.master).map_err(BackendError::new)?;
    let input = pipe::Sender::from_owned_fd_unchecked(second).map_err(BackendError::new)?;
    Ok(Session {
        stdin: stdin.then(|| Box::pin(input) as ByteWriter),
        stdout: Some(Box::pin(Terminal(stdout))),
        stderr: None,
        stdin_end: StdinEnd::Close,
        process: Box::new(HostProcess {
            child,
            tty: Some(path.to_str().expect("a path in /dev").to_owned()),
        }),
    })
}

#[async_trait]
impl Backend for Host {
    async fn exec(
        &self,
        params: ExecParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError> {
        start(&params.command, params.tty.then_some(size), params.stdin)
    }

    /// The container id is the command; a trailing `&` keeps stdin open.
    async fn attach(
        &self,
        params: AttachParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError> {
        let detach = params.container.ends_with('&');
        let command = params.container.trim_end_matches('&').to_owned();
        let command = ["sh".to_owned(), "-c".to_owned(), command];
        let session = start(&command, params.tty.then_some(size), params.stdin)?;
        let stdin_end = if detach { StdinEnd::Detach } else { StdinEnd::Close };
        Ok(Session { stdin_end, ..session })
    }

    async fn port_forward(&self, _: &str, port: u16) -> Result<ByteStream, BackendError> {
        let stream = TcpStream::connect(("127.0.0.1", port)).await;
        Ok(Box::pin(stream.map_err(BackendError::new)?))
    }
}

#[async_trait]
impl Process for HostProcess {
    async fn resize(&mut self, size: TtySize) -> Result<(), BackendError> {
        let Some(tty) = &self.tty else { return Err(BackendError::new("no terminal")) };
        let (rows, columns) = (size.height.to_string(), size.width.to_string());
        let stty = Command::new("stty")
            .args(["-F", tty, "rows", &rows, "cols", &columns])
            .status()
            .await
            .map_err(BackendError::new)?;
        if stty.success() { Ok(()) } else { Err(BackendError::new("stty failed")) }
    }

    async fn wait(&mut self) -> Result<i32, BackendError> {
        use std::os::unix::process::ExitStatusExt;
        let status = self.child.wait().await.map_err(BackendError::new)?;
        Ok(status.code().or_else(|| status.signal().map(|s| 128 + s)).unwrap_or(255))
    }
}
