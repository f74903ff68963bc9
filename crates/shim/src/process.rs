//! A process known to containerd: a container's init process or an exec. States as in containerd's
//! api/types/task:
//! ```text
//!            Paused
//!              ^ v
//! Created -> Running -> Stopped
//!    \---------------------^     deleted before Start, or Start failed
//! ```

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::Status;
use sandbox::ProcessControl;
use sandbox::model::ExitView;
use tokio::sync::watch;
use tokio_util::task::TaskTracker;

use crate::stdio::{Stdio, StdioPaths, StreamControl};

/// Time for output that children of a process hold open, after its exit.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(2);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    pub(crate) status: u32,
    pub(crate) at: SystemTime,
}

impl Exit {
    pub(crate) fn of(view: &ExitView) -> Self {
        // 255: unknown exit status, as in containerd.
        Self { status: u32::try_from(view.code).unwrap_or(255), at: view.at }
    }
}

pub(crate) struct Process {
    pub(crate) stdio_paths: StdioPaths,
    /// Held while the state changes, so that events are published in order.
    pub(crate) state_lock: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
    stream_control: StreamControl,
    streams: TaskTracker,
}

#[derive(Default)]
struct State {
    pid: u32,
    paused: bool,
    control: Option<ProcessControl>,
    /// Opened; taken when the guest's streams are connected.
    stdio: Option<Stdio>,
}

impl Process {
    pub(crate) fn new(stdio_paths: StdioPaths, stdio: Option<Stdio>) -> Self {
        Self {
            stdio_paths,
            state_lock: tokio::sync::Mutex::default(),
            state: Mutex::new(State { stdio, ..State::default() }),
            exit: watch::Sender::new(None),
            stream_control: StreamControl::default(),
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

    pub(crate) fn is_paused(&self) -> bool {
        self.state().paused
    }

    pub(crate) fn set_paused(&self, paused: bool) {
        self.state().paused = paused;
    }

    pub(crate) fn set_started(&self) {
        self.stream_control.started.cancel();
    }

    pub(crate) fn is_started(&self) -> bool {
        self.stream_control.started.is_cancelled()
    }

    /// Closes standard input after the data that was written before.
    pub(crate) fn close_stdin(&self) {
        self.stream_control.stdin_closed.cancel();
    }

    pub(crate) fn take_stdio(&self) -> Option<Stdio> {
        self.state().stdio.take()
    }

    /// Copies its streams in the background.
    pub(crate) fn copy_streams(
        &self,
        stdio: Stdio,
        streams: (
            Option<sandbox::session::ByteWriter>,
            Option<sandbox::session::ByteReader>,
            Option<sandbox::session::ByteReader>,
        ),
    ) {
        self.streams.spawn(stdio.copy_streams(streams, self.stream_control.clone()));
    }

    /// Waits until all streams are copied.
    pub(crate) async fn wait_streams(&self) {
        self.streams.close();
        self.streams.wait().await;
    }

    /// Closes its streams, after [`DRAIN_TIMEOUT`] for remaining output.
    pub(crate) async fn close_streams(&self) {
        self.streams.close();
        if tokio::time::timeout(DRAIN_TIMEOUT, self.streams.wait()).await.is_err() {
            tracing::info!("unread output of a deleted process is discarded");
        }
        self.stream_control.abandoned.cancel();
        drop(self.take_stdio());
    }

    pub(crate) fn exit(&self) -> Option<Exit> {
        *self.exit.borrow()
    }

    /// Only the first call sets the exit; returns whether this was the first.
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
            // Not reached: `self` owns the sender.
            Err(_) => Exit { status: 255, at: SystemTime::now() },
        }
    }

    pub(crate) fn status(&self) -> Status {
        match (self.exit(), self.is_started()) {
            (Some(_), _) => Status::STOPPED,
            (None, true) if self.is_paused() => Status::PAUSED,
            (None, true) => Status::RUNNING,
            (None, false) => Status::CREATED,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn only_the_first_exit_is_recorded_and_all_waiters_get_it() {
        let process = Process::new(StdioPaths::default(), None);
        assert_eq!(process.status(), Status::CREATED);
        process.set_started();
        assert_eq!(process.status(), Status::RUNNING);
        process.set_paused(true);
        assert_eq!(process.status(), Status::PAUSED);
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
    fn an_unknown_exit_status_is_255() {
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
