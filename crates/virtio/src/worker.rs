//! The thread that runs engines: one epoll instance for any number of devices. This file holds the
//! handles that other threads use; [`event_loop`] is what runs on the thread. It never blocks
//! except in `epoll_wait`, and while paused in the wait for commands.
//!
//! ```text
//!   attach -> running --detach--> draining -> dropped (Detached::is_done)
//!   pause: engines drain, then no event is handled until resume; acknowledged within a deadline
//! ```

mod event_loop;

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::event_loop::EventLoop;
use crate::device::{Engine, Interrupt};

/// Engine id of the eventfd that announces commands.
const WAKE_ID: u32 = u32::MAX;

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("cannot start worker thread {name:?}")]
    Spawn { name: String, source: io::Error },
    #[error("worker has stopped")]
    Stopped,
    #[error("worker did not answer within {limit:?}")]
    Deadline { limit: Duration },
}

enum Command {
    Attach { id: u32, engine: Box<dyn Engine>, interrupt: Arc<dyn Interrupt> },
    Detach { id: u32, done: SetOnDrop },
    Pause { done: Sender<()> },
    Resume,
    Stop,
}

/// Sets its flag when it is dropped: after its engine, or with a Detach command that a stopping
/// worker never received.
#[derive(Debug)]
struct SetOnDrop(Arc<AtomicBool>);

impl Drop for SetOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// Owns the thread; dropping it stops the thread without waiting for it.
#[derive(Debug)]
pub struct Worker {
    handle: WorkerHandle,
    thread: Option<JoinHandle<()>>,
}

/// Sends commands to a worker from any thread.
#[derive(Debug, Clone)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    next_id: Arc<AtomicU32>,
}

/// A running engine of a worker.
#[derive(Debug)]
pub struct Attachment {
    id: u32,
    worker: WorkerHandle,
}

/// An engine that drains before it is dropped.
#[derive(Debug, Clone)]
pub struct Detached {
    done: Arc<AtomicBool>,
}

impl Detached {
    /// The engine was dropped: it accesses neither queues nor files any more.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Waits for [`Self::is_done`]; `false` when `limit` passes first.
    pub fn wait(&self, limit: Duration) -> bool {
        let end = Instant::now() + limit;
        while !self.is_done() {
            if Instant::now() >= end {
                return false;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        true
    }
}

impl Worker {
    /// Starts the thread. `init` runs on it first (the VMM installs the seccomp filter there).
    /// Fails if the thread, its epoll or its eventfd cannot be created.
    pub fn spawn(name: &str, init: impl FnOnce() + Send + 'static) -> Result<Self, WorkerError> {
        let failed = |source| WorkerError::Spawn { name: name.to_owned(), source };
        let (commands, receiver) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(failed)?);
        let epoll = Epoll::new().map_err(failed)?;
        let event = EpollEvent::new(EventSet::IN, u64::from(WAKE_ID) << 32);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event).map_err(failed)?;
        let mut event_loop = EventLoop::new(epoll, receiver, wake.clone());
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                init();
                event_loop.run();
            })
            .map_err(failed)?;
        let handle = WorkerHandle { commands, wake, next_id: Arc::new(AtomicU32::new(0)) };
        Ok(Self { handle, thread: Some(thread) })
    }

    pub fn handle(&self) -> WorkerHandle {
        self.handle.clone()
    }

    /// Stops the thread and waits for it, at most `limit`; then [`WorkerError::Deadline`].
    pub fn stop(mut self, limit: Duration) -> Result<(), WorkerError> {
        self.handle.stop();
        let Some(thread) = self.thread.take() else { return Ok(()) };
        let end = Instant::now() + limit;
        while !thread.is_finished() {
            if Instant::now() >= end {
                return Err(WorkerError::Deadline { limit });
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = thread.join();
        Ok(())
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.handle.stop();
    }
}

impl WorkerHandle {
    /// Moves an engine to the worker, which starts it. Does not wait. Fails if the worker has
    /// stopped.
    pub fn attach(
        &self,
        engine: Box<dyn Engine>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Attachment, WorkerError> {
        let id = self.next_id.fetch_add(1, Ordering::Relaxed) % WAKE_ID;
        self.send(Command::Attach { id, engine, interrupt })?;
        Ok(Attachment { id, worker: self.clone() })
    }

    /// Drains every engine; then no event is handled until [`Self::resume`]. After
    /// [`WorkerError::Deadline`] the pause still takes effect once the engines have drained.
    pub fn pause(&self, limit: Duration) -> Result<(), WorkerError> {
        let (done, answer) = channel();
        self.send(Command::Pause { done })?;
        match answer.recv_timeout(limit) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Timeout) => Err(WorkerError::Deadline { limit }),
            Err(RecvTimeoutError::Disconnected) => Err(WorkerError::Stopped),
        }
    }

    pub fn resume(&self) -> Result<(), WorkerError> {
        self.send(Command::Resume)
    }

    /// Stops the thread without waiting; engines are drained and dropped on it.
    pub fn stop(&self) {
        let _ = self.send(Command::Stop);
    }

    fn send(&self, command: Command) -> Result<(), WorkerError> {
        self.commands.send(command).map_err(|_| WorkerError::Stopped)?;
        // EAGAIN: the counter is full, so the worker is woken anyway.
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl Attachment {
    /// Has the worker drain and drop the engine. Does not wait.
    pub fn detach(self) -> Detached {
        let done = Arc::new(AtomicBool::new(false));
        // A stopped worker has dropped the engine, and this command is dropped, too.
        let done_on_drop = SetOnDrop(done.clone());
        let _ = self.worker.send(Command::Detach { id: self.id, done: done_on_drop });
        Detached { done }
    }
}

#[cfg(test)]
mod tests;
