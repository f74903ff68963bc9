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

use super::{IdRange, Namespaces, Order, Outcome};
use crate::error::Error;
use crate::host::blocking;

/// A launcher that takes longer is broken; it is replaced.
const ANSWER_LIMIT: Duration = Duration::from_secs(10);

/// A program to start.
#[derive(Debug)]
pub struct Program {
    pub exe: PathBuf,
    pub args: Vec<String>,
    /// Folder of the cgroup it is born into.
    pub cgroup: OwnedFd,
    pub stderr: OwnedFd,
    /// What it finds from number 3 on.
    pub fds: Vec<OwnedFd>,
    pub own: Namespaces,
}

#[derive(Debug)]
pub struct Launched {
    pub pid: u32,
    pub pidfd: OwnedFd,
}

/// Starts VMMs; a trait so that tests can do without processes.
#[async_trait]
pub trait Launch: Send + Sync {
    async fn launch(&self, program: Program) -> Result<Launched, Error>;

    /// A user namespace with these maps, for a mount whose ids are mapped.
    async fn user_namespace(
        &self,
        _uids: Vec<IdRange>,
        _gids: Vec<IdRange>,
    ) -> Result<OwnedFd, Error> {
        Err(Error::Unsupported { message: "no user namespaces are made here".into() })
    }
}

/// The real thing: one launcher process, started anew when it dies.
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
        // It ends by itself when the socket closes; one that hangs must not stay.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl LauncherProcess {
    /// Starts the launcher, so that a wrong command fails now and not at the first pod.
    pub fn start(command: Vec<OsString>) -> Result<Self, Error> {
        let running = start(&command)?;
        Ok(Self { command, running: Arc::new(Mutex::new(Some(running))) })
    }

    /// Has an order carried out by the launcher, or by a new one if it has ended.
    fn order<T>(&self, ask: impl FnOnce(&OwnedFd) -> Result<T, Error>) -> Result<T, Error> {
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        let alive = match &mut *running {
            Some(r) => matches!(r.child.try_wait(), Ok(None)),
            None => false,
        };
        if !alive {
            *running = None;
            tracing::warn!("launcher has ended, starting another");
            *running = Some(start(&self.command)?);
        }
        let Some(launcher) = &*running else {
            return Err(Error::unavailable("no launcher"));
        };
        let result = ask(&launcher.socket);
        if matches!(result, Err(Error::Unavailable { .. })) {
            // An answer that comes late must not be taken for that of the next order.
            *running = None;
        }
        result
    }
}

#[async_trait]
impl Launch for LauncherProcess {
    async fn launch(&self, program: Program) -> Result<Launched, Error> {
        let this = self.clone();
        blocking(move || this.order(|socket| launch(socket, program))).await
    }

    async fn user_namespace(
        &self,
        uids: Vec<IdRange>,
        gids: Vec<IdRange>,
    ) -> Result<OwnedFd, Error> {
        let (this, order) = (self.clone(), Order::UserNamespace { uids, gids });
        let answer = blocking(move || this.order(|socket| ask(socket, &order, &[]))).await?;
        match answer {
            (Outcome::Namespace, Some(namespace)) => Ok(namespace),
            _ => Err(Error::unavailable("launcher sent no namespace")),
        }
    }
}

fn start(command: &[OsString]) -> Result<Running, Error> {
    let Some((exe, args)) = command.split_first() else {
        return Err(Error::invalid("no launcher command is configured"));
    };
    let failed = |e: io::Error| Error::io(format!("start the launcher {}", exe.display()), e);
    let (ours, theirs) =
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)
            .map_err(|e| failed(e.into()))?;
    let limit = TimeVal::milliseconds(ANSWER_LIMIT.as_millis() as i64);
    setsockopt(&ours, ReceiveTimeout, &limit).map_err(|e| failed(e.into()))?;
    setsockopt(&ours, SendTimeout, &limit).map_err(|e| failed(e.into()))?;
    let child = Command::new(exe)
        .args(args)
        .stdin(Stdio::from(theirs))
        .stdout(Stdio::null())
        .process_group(0)
        .spawn()
        .map_err(failed)?;
    Ok(Running { socket: ours, child })
}

fn launch(socket: &OwnedFd, program: Program) -> Result<Launched, Error> {
    let Program { exe, args, cgroup, stderr, fds, own } = program;
    let mut all = vec![cgroup.as_fd(), stderr.as_fd()];
    all.extend(fds.iter().map(AsFd::as_fd));
    match ask(socket, &Order::Program { exe, args, own }, &all)? {
        (Outcome::Started { pid }, Some(pidfd)) => Ok(Launched { pid, pidfd }),
        _ => Err(Error::unavailable("launcher sent no pidfd")),
    }
}

/// Sends an order; its outcome and the descriptor that comes with it. A failure is an `Err`.
fn ask(
    socket: &OwnedFd,
    order: &Order,
    fds: &[BorrowedFd<'_>],
) -> Result<(Outcome, Option<OwnedFd>), Error> {
    let broken = |e: transport::TransportError| {
        Error::unavailable(format!("launcher: {:#}", anyhow::Error::new(e)))
    };
    transport::send(socket.as_fd(), order, fds).map_err(broken)?;
    let (outcome, mut received) = transport::receive::<Outcome>(socket.as_fd()).map_err(broken)?;
    match outcome {
        Outcome::Failed { what, errno } => {
            Err(Error::io(format!("launch: {what}"), io::Error::from_raw_os_error(errno)))
        }
        outcome => Ok((outcome, received.pop())),
    }
}
