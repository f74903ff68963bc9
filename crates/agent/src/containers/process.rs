//! One process that the host started: the init of a container, or an exec.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_api::v1;

use crate::error::{Error, Result};
use crate::reaper::ExitStatus;
use crate::stdio::input::Input;
use crate::stdio::output::Output;
use crate::stdio::{Channel, pty};

/// Time for which an exited exec keeps its output after the exit was acknowledged, for a host that
/// has not connected to it yet.
const UNCOLLECTED_TIMEOUT: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq)]
pub enum Status {
    Created,
    Running,
    Stopped(v1::Exit),
}

#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    pub status: Status,
    pub stdin: Option<Arc<Input>>,
    pub stdout: Option<Arc<Output>>,
    pub stderr: Option<Arc<Output>>,
    pub terminal: Option<Channel>,
    /// The terminal's slave side, kept open until the exit: without an open slave the master reads
    /// EIO, and a process may close its own for a while.
    pub slave: Option<OwnedFd>,
    /// OOM kills of the container before the process started.
    pub oom_kills_before: u64,
    ended_at: Option<Instant>,
    /// Start of the program, Unix time in nanoseconds; 0 before the start.
    pub started_unix_ns: i64,
}

pub(super) fn unix_time_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Process {
    pub fn new(pid: i32, status: Status) -> Self {
        Self {
            pid,
            status,
            stdin: None,
            stdout: None,
            stderr: None,
            terminal: None,
            slave: None,
            oom_kills_before: 0,
            ended_at: None,
            started_unix_ns: 0,
        }
    }

    pub fn set_stopped(
        &mut self,
        container_id: &str,
        exec_id: &str,
        status: ExitStatus,
        oom_killed: bool,
    ) -> v1::Exit {
        let (code, signal) = match status {
            ExitStatus::Exited(code) => (code, 0),
            ExitStatus::Signaled(signal) => (128 + signal, signal.unsigned_abs()),
        };
        let exit = v1::Exit {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            code,
            signal,
            oom_killed,
            unix_time_ns: unix_time_ns(),
        };
        self.status = Status::Stopped(exit.clone());
        self.ended_at = Some(Instant::now());
        // Nothing reads stdin any more; the outputs drain on their own.
        if let Some(stdin) = self.stdin.take() {
            stdin.close();
        }
        self.terminal = None;
        self.slave = None;
        exit
    }

    pub fn is_stopped(&self) -> bool {
        matches!(self.status, Status::Stopped(_))
    }

    /// Exited, and its output was read or no host came for it in time.
    pub fn is_collected(&self) -> bool {
        let Some(ended_at) = self.ended_at else { return false };
        let abandoned = ended_at.elapsed() > UNCOLLECTED_TIMEOUT;
        [&self.stdout, &self.stderr]
            .into_iter()
            .flatten()
            .all(|output| output.is_consumed() || (abandoned && !output.is_attached()))
    }

    /// Closes all streams.
    pub fn close(&self) {
        if let Some(stdin) = &self.stdin {
            stdin.close();
        }
        for output in [&self.stdout, &self.stderr].into_iter().flatten() {
            output.close();
        }
    }

    pub fn resize(&self, width: u32, height: u32) -> Result<()> {
        match &self.terminal {
            Some(terminal) => pty::resize(terminal.get_ref().as_fd(), width, height),
            None if self.is_stopped() => Ok(()),
            None => Err(Error::Precondition("the process has no terminal".to_owned())),
        }
    }

    pub fn describe(&self, container_id: &str, exec_id: &str) -> v1::Process {
        let (state, exit) = match &self.status {
            Status::Created => (v1::ProcessState::Created, None),
            Status::Running => (v1::ProcessState::Running, None),
            Status::Stopped(exit) => (v1::ProcessState::Ended, Some(exit.clone())),
        };
        v1::Process {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            pid: self.pid.unsigned_abs(),
            state: state as i32,
            exit,
        }
    }
}
