//! The daemon's side of the launcher.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
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

use super::{Order, Outcome};
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
    pub isolate: bool,
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

    fn launch_blocking(&self, program: Program) -> Result<Launched, Error> {
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
        let result = ask(&launcher.socket, program);
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
        blocking(move || this.launch_blocking(program)).await
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

fn ask(socket: &OwnedFd, program: Program) -> Result<Launched, Error> {
    let broken = |e: transport::TransportError| {
        Error::unavailable(format!("launcher: {:#}", anyhow::Error::new(e)))
    };
    let Program { exe, args, cgroup, stderr, fds, isolate } = program;
    let mut all = vec![cgroup.as_fd(), stderr.as_fd()];
    all.extend(fds.iter().map(AsFd::as_fd));
    let order = Order { exe, args, isolate };
    transport::send(socket.as_fd(), &order, &all).map_err(broken)?;
    let (outcome, mut received) = transport::receive::<Outcome>(socket.as_fd()).map_err(broken)?;
    match (outcome, received.pop()) {
        (Outcome::Started { pid }, Some(pidfd)) => Ok(Launched { pid, pidfd }),
        (Outcome::Started { .. }, None) => Err(Error::unavailable("launcher sent no pidfd")),
        (Outcome::Failed { what, errno }, _) => {
            Err(Error::io(format!("launch: {what}"), io::Error::from_raw_os_error(errno)))
        }
    }
}
