//! One process that the host knows: the init of a container, or an exec.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_api::v1;

use crate::error::{Error, Result};
use crate::reaper::Ended;
use crate::stdio::input::Input;
use crate::stdio::output::Output;
use crate::stdio::{Channel, pty};

/// An exec whose exit was acknowledged keeps its output this long for a host that has not connected
/// to it yet.
const UNCOLLECTED: Duration = Duration::from_secs(30);

#[derive(Debug, Clone, PartialEq)]
pub enum Life {
    Created,
    Running,
    Ended(v1::Exit),
}

#[derive(Debug)]
pub struct Process {
    pub pid: i32,
    pub life: Life,
    pub stdin: Option<Arc<Input>>,
    pub stdout: Option<Arc<Output>>,
    pub stderr: Option<Arc<Output>>,
    pub terminal: Option<Channel>,
    /// The terminal's other side, kept until the end: one that nobody has open reads as ended, and
    /// a process may close its own for a while.
    pub slave: Option<OwnedFd>,
    /// OOM kills of the container when the process started.
    pub oom_kills_before: u64,
    ended_at: Option<Instant>,
    /// When its program was started; 0: not yet.
    pub started_unix_ns: i64,
}

pub(super) fn unix_time_ns() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

impl Process {
    pub fn new(pid: i32, life: Life) -> Self {
        Self {
            pid,
            life,
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

    pub fn ended(
        &mut self,
        container_id: &str,
        exec_id: &str,
        status: Ended,
        oom_killed: bool,
    ) -> v1::Exit {
        let (code, signal) = match status {
            Ended::Exited(code) => (code, 0),
            Ended::Signaled(signal) => (128 + signal, signal.unsigned_abs()),
        };
        let exit = v1::Exit {
            container_id: container_id.to_owned(),
            exec_id: exec_id.to_owned(),
            code,
            signal,
            oom_killed,
            unix_time_ns: unix_time_ns(),
        };
        self.life = Life::Ended(exit.clone());
        self.ended_at = Some(Instant::now());
        // Nobody reads it any more; outputs drain by themselves.
        if let Some(stdin) = self.stdin.take() {
            stdin.close();
        }
        self.terminal = None;
        self.slave = None;
        exit
    }

    pub fn is_ended(&self) -> bool {
        matches!(self.life, Life::Ended(_))
    }

    /// Ended, and its output was taken or nobody comes for it.
    pub fn is_collected(&self) -> bool {
        let Some(ended_at) = self.ended_at else { return false };
        let abandoned = ended_at.elapsed() > UNCOLLECTED;
        [&self.stdout, &self.stderr]
            .into_iter()
            .flatten()
            .all(|output| output.is_consumed() || (abandoned && !output.is_attached()))
    }

    /// Ends the streams.
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
            None if self.is_ended() => Ok(()),
            None => Err(Error::Precondition("the process has no terminal".to_owned())),
        }
    }

    pub fn describe(&self, container_id: &str, exec_id: &str) -> v1::Process {
        let (state, exit) = match &self.life {
            Life::Created => (v1::ProcessState::Created, None),
            Life::Running => (v1::ProcessState::Running, None),
            Life::Ended(exit) => (v1::ProcessState::Ended, Some(exit.clone())),
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
