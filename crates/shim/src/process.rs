//! A process that containerd knows: a container's own, or one that was added to it (exec). Its states
//! are containerd's (api/types/task):
//! ```text
//! Created -> Running -> Stopped
//!    \---------------------^     killed before its start, or its start has failed
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::Status;
use sandbox::ProcessControl;
use sandbox::model::ExitView;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::stdio::{Names, Signals, Stdio};

/// What is still held by children of a process gets this long after its Delete.
const DRAIN_LIMIT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

impl Exit {
    pub(crate) fn of(view: &ExitView) -> Self {
        // 255: of a process whose end nobody has seen, as containerd has it.
        Self { status: u32::try_from(view.code).unwrap_or(255), at: view.at }
    }
}

pub(crate) struct Process {
    pub(crate) names: Names,
    /// Held by who changes the process, so that its events come in order.
    pub(crate) turn: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
    signals: Signals,
    streams: TaskTracker,
}

#[derive(Default)]
struct State {
    pid: u32,
    control: Option<ProcessControl>,
    /// Opened, and taken when the process has streams.
    stdio: Option<Stdio>,
}

impl Process {
    pub(crate) fn new(names: Names, stdio: Option<Stdio>) -> Self {
        Self {
            names,
            turn: tokio::sync::Mutex::default(),
            state: Mutex::new(State { stdio, ..State::default() }),
            exit: watch::Sender::new(None),
            signals: Signals::default(),
            streams: TaskTracker::new(),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.state().pid
    }

    pub(crate) fn set_pid(&self, pid: u32) {
        self.state().pid = pid;
    }

    pub(crate) fn control(&self) -> Option<ProcessControl> {
        self.state().control.clone()
    }

    pub(crate) fn set_control(&self, control: ProcessControl) {
        self.state().control = Some(control);
    }

    pub(crate) fn set_started(&self) {
        self.signals.started.cancel();
    }

    pub(crate) fn is_started(&self) -> bool {
        self.signals.started.is_cancelled()
    }

    /// Ends standard input after what was written to it before.
    pub(crate) fn close_stdin(&self) {
        self.signals.closed.cancel();
    }

    pub(crate) fn take_stdio(&self) -> Option<Stdio> {
        self.state().stdio.take()
    }

    /// Moves its streams in the background.
    pub(crate) fn carry(
        &self,
        stdio: Stdio,
        streams: (
            Option<sandbox::session::ByteWriter>,
            Option<sandbox::session::ByteReader>,
            Option<sandbox::session::ByteReader>,
        ),
    ) {
        self.streams.spawn(stdio.carry(streams, self.signals.clone()));
    }

    /// Resolves when nothing is carried any more.
    pub(crate) async fn streams_ended(&self) {
        self.streams.close();
        self.streams.wait().await;
    }

    /// Ends its streams, after a moment for what is on its way.
    pub(crate) async fn end_streams(&self) {
        self.streams.close();
        if tokio::time::timeout(DRAIN_LIMIT, self.streams.wait()).await.is_err() {
            tracing::info!("output that nobody takes, or that children hold open, is given up");
        }
        self.signals.abandoned.cancel();
        drop(self.take_stdio());
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// The first one counts; true if it is this one.
    pub(crate) fn set_exit(&self, exit: Exit) -> bool {
        self.exit.send_if_modified(|known| {
            let first = known.is_none();
            known.get_or_insert(exit);
            first
        })
    }

    pub(crate) async fn wait(&self) -> Exit {
        let mut exits = self.exit.subscribe();
        match exits.wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or(Exit { status: 255, at: SystemTime::now() }),
            // The sender lives as long as we do.
            Err(_) => Exit { status: 255, at: SystemTime::now() },
        }
    }

    pub(crate) fn status(&self) -> Status {
        match (self.exit(), self.is_started()) {
            (Some(_), _) => Status::STOPPED,
            (None, true) => Status::RUNNING,
            (None, false) => Status::CREATED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_first_end_of_a_process_counts_and_everybody_hears_of_it() {
        let process = Process::new(Names::default(), None);
        assert_eq!(process.status(), Status::CREATED);
        process.set_started();
        assert_eq!(process.status(), Status::RUNNING);
        let first = Exit { status: 3, at: SystemTime::now() };
        let (waited, ()) = tokio::join!(process.wait(), async {
            assert!(process.set_exit(first));
            assert!(!process.set_exit(Exit { status: 255, at: SystemTime::now() }));
        });
        assert_eq!(waited, first);
        assert_eq!(process.wait().await, first);
        assert_eq!(process.status(), Status::STOPPED);
    }

    #[test]
    fn an_end_that_nobody_has_seen_has_a_code_of_its_own() {
        let view = |code| ExitView {
            code,
            oom_killed: false,
            at: SystemTime::UNIX_EPOCH,
            reason: String::new(),
            message: String::new(),
        };
        assert_eq!(Exit::of(&view(-1)).status, 255);
        assert_eq!(Exit::of(&view(137)).status, 137);
    }
}
