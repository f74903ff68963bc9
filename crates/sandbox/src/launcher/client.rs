//! The daemon's side of the launcher.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, setsockopt, socketpair, sockopt::ReceiveTimeout,
    sockopt::SendTimeout,
};
use nix::sys::time::{TimeVal, TimeValLike};
use vmm_api::transport;

use super::protocol::{IdRange, Namespaces, Request, Response};
use crate::error::Error;
use crate::host::blocking;

/// Longest wait for a reply; then the launcher is replaced.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A program to spawn.
#[derive(Debug)]
pub struct Program {
    pub exe: PathBuf,
    pub args: Vec<String>,
    /// Directory of the cgroup to spawn into (CLONE_INTO_CGROUP).
    pub cgroup: OwnedFd,
    pub stderr: OwnedFd,
    /// Descriptors passed as 3, 4, ...
    pub fds: Vec<OwnedFd>,
    pub own: Namespaces,
}

#[derive(Debug)]
pub struct Launched {
    pub pid: u32,
    pub pidfd: OwnedFd,
}

/// Spawns VMMs and file servers; a trait for tests without processes.
#[async_trait]
pub trait Launch: Send + Sync {
    async fn launch(&self, program: Program) -> Result<Launched, Error>;

    /// Creates a user namespace with these maps, for an idmapped mount.
    async fn user_namespace(
        &self,
        _uids: Vec<IdRange>,
        _gids: Vec<IdRange>,
    ) -> Result<OwnedFd, Error> {
        Err(Error::Unsupported { message: "this launcher does not create user namespaces".into() })
    }
}

/// The launcher process, restarted if it exits.
#[derive(Clone)]
pub struct LauncherProcess {
    command: Vec<OsString>,
    running: Arc<Mutex<Option<Running>>>,
}

struct Running {
    socket: OwnedFd,
    child: Child,
}

impl Drop for Running {
    fn drop(&mut self) {
        // It exits when the socket closes, unless it hangs.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl LauncherProcess {
    /// Starts the launcher now, so that a wrong command fails early.
    pub fn start(command: Vec<OsString>) -> Result<Self, Error> {
        let running = start(&command)?;
        Ok(Self { command, running: Arc::new(Mutex::new(Some(running))) })
    }

    /// Sends a request to the launcher; restarts it first if it has exited.
    fn with_launcher<T>(
        &self,
        call: impl FnOnce(&OwnedFd) -> Result<T, Error>,
    ) -> Result<T, Error> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = match &mut *running {
            Some(r) => matches!(r.child.try_wait(), Ok(None)),
            None => false,
        };
        if !alive {
            *running = None;
            tracing::warn!("launcher has exited, restarting it");
            *running = Some(start(&self.command)?);
        }
        let Some(launcher) = &*running else {
            return Err(Error::unavailable("no launcher"));
        };
        let result = call(&launcher.socket);
        if matches!(result, Err(Error::Unavailable { .. })) {
            // A late reply must not be taken for that of the next request.
            *running = None;
        }
        result
    }
}

#[async_trait]
impl Launch for LauncherProcess {
    async fn launch(&self, program: Program) -> Result<Launched, Error> {
        let this = self.clone();
        blocking(move || this.with_launcher(|socket| launch(socket, program))).await
    }

    async fn user_namespace(
        &self,
        uids: Vec<IdRange>,
        gids: Vec<IdRange>,
    ) -> Result<OwnedFd, Error> {
        let (this, request) = (self.clone(), Request::UserNamespace { uids, gids });
        let answer =
            blocking(move || this.with_launcher(|socket| call(socket, &request, &[]))).await?;
        match answer {
            (Response::Namespace, Some(namespace)) => Ok(namespace),
            _ => Err(Error::unavailable("launcher sent no namespace")),
        }
    }
}

fn start(command: &[OsString]) -> Result<Running, Error> {
    let Some((exe, args)) = command.split_first() else {
        return Err(Error::invalid("no launcher command is configured"));
    };
    let failed = |e: io::Error| Error::io(format!("start the launcher {}", exe.display()), e);
    let (local, peer) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|e| failed(e.into()))?;
    let limit = TimeVal::milliseconds(ANSWER_LIMIT.as_millis() as i64);
    setsockopt(&local, ReceiveTimeout, &limit).map_err(|e| failed(e.into()))?;
    setsockopt(&local, SendTimeout, &limit).map_err(|e| failed(e.into()))?;
    let child = Command::new(exe)
        .args(args)
        .stdin(Stdio::from(peer))
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    Ok(Running { socket: local, child })
}

fn launch(socket: &OwnedFd, program: Program) -> Result<Launched, Error> {
    let Program { exe, args, cgroup, stderr, fds, own } = program;
    let mut all = vec![cgroup.as_fd(), stderr.as_fd()];
    all.extend(fds.iter().map(AsFd::as_fd));
    match call(socket, &Request::Program { exe, args, own }, &all)? {
        (Response::Started { pid }, Some(pidfd)) => Ok(Launched { pid, pidfd }),
        _ => Err(Error::unavailable("launcher sent no pidfd")),
    }
}

/// Sends a request; returns the response and its descriptor. A failure is an `Err`.
fn call(
    socket: &OwnedFd,
    request: &Request,
    fds: &[BorrowedFd<'_>],
) -> Result<(Response, Option<OwnedFd>), Error> {
    let broken = |e: transport::TransportError| {
        Error::unavailable(format!("launcher: {:#}", anyhow::Error::new(e)))
    };
    transport::send(socket.as_fd(), request, fds).map_err(broken)?;
    let (response, mut received) =
        transport::receive::<Response>(socket.as_fd()).map_err(broken)?;
    match response {
        Response::Failed { what, errno } => {
            Err(Error::io(format!("launch: {what}"), io::Error::from_raw_os_error(errno)))
        }
        response => Ok((response, received.pop())),
    }
}
