//! The thread that runs engines: one epoll, any number of devices, nothing that blocks.
//!
//! ```text
//!   attach -> running --detach--> draining -> gone (Detached::is_done)
//!   pause: engines drain, then nothing is handled until resume; acknowledged within a deadline
//! ```
//! Fairness: `epoll_wait` hands out at most [`EVENTS_A_ROUND`] events, an engine does a bounded
//! amount of work for each and asks to go on in the next round, after everybody else's turn.

use std::collections::HashMap;
use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Engine, Interrupt, Poll, PollState};
use crate::guest_warn;
use crate::limit::LogLimit;

/// Events taken from epoll at once.
const EVENTS_A_ROUND: usize = 64;
/// How often a draining engine is asked whether it is done, in case its last completion was
/// consumed by another event.
const DRAIN_POLL: Duration = Duration::from_millis(2);
/// An engine that has not drained by then is dropped as it is; engines that lend guest memory to
/// the kernel hold it alive themselves.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// Engine number of the worker's own event.
const SELF: u32 = u32::MAX;

#[derive(Debug, thiserror::Error)]
pub enum WorkerError {
    #[error("worker {name:?} cannot start")]
    Spawn { name: String, source: io::Error },
    #[error("worker has stopped")]
    Stopped,
    #[error("worker did not answer within {limit:?}")]
    Deadline { limit: Duration },
}

enum Command {
    Attach { id: u32, engine: Box<dyn Engine>, interrupt: Arc<dyn Interrupt> },
    Detach { id: u32, gone: Gone },
    Pause { done: Sender<()> },
    Resume,
    Stop,
}

/// Says that an engine is gone when it is dropped, wherever that happens: with the engine, or with
/// an order that a stopping worker never read.
#[derive(Debug)]
struct Gone(Arc<AtomicBool>);

impl Drop for Gone {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

/// The owner's end; dropping it stops the thread without waiting for it.
#[derive(Debug)]
pub struct Worker {
    handle: WorkerHandle,
    thread: Option<JoinHandle<()>>,
}

/// Gives orders to a worker from any thread.
#[derive(Debug, Clone)]
pub struct WorkerHandle {
    commands: Sender<Command>,
    wake: Arc<EventFd>,
    next: Arc<AtomicU32>,
}

/// An engine running on a worker.
#[derive(Debug)]
pub struct Attachment {
    id: u32,
    worker: WorkerHandle,
}

/// An engine on its way out.
#[derive(Debug, Clone)]
pub struct Detached {
    done: Arc<AtomicBool>,
}

impl Detached {
    /// The engine is gone and touches neither queues nor files any more.
    pub fn is_done(&self) -> bool {
        self.done.load(Ordering::Acquire)
    }

    /// Waits for that; `false` when the limit passes first.
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
    /// Starts a thread; `init` runs on it first (the VMM installs its seccomp filter there).
    pub fn spawn(name: &str, init: impl FnOnce() + Send + 'static) -> Result<Self, WorkerError> {
        let failed = |source| WorkerError::Spawn { name: name.to_owned(), source };
        let (commands, orders) = channel();
        let wake = Arc::new(EventFd::new(EFD_NONBLOCK).map_err(failed)?);
        let epoll = Epoll::new().map_err(failed)?;
        let event = EpollEvent::new(EventSet::IN, u64::from(SELF) << 32);
        epoll.ctl(ControlOperation::Add, wake.as_raw_fd(), event).map_err(failed)?;
        let mut run = Run {
            epoll,
            orders,
            wake: wake.clone(),
            engines: HashMap::new(),
            paused: false,
            pausing: Vec::new(),
            limit: LogLimit::default(),
            stop: false,
        };
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                init();
                run.run();
            })
            .map_err(failed)?;
        let handle = WorkerHandle { commands, wake, next: Arc::new(AtomicU32::new(0)) };
        Ok(Self { handle, thread: Some(thread) })
    }

    pub fn handle(&self) -> WorkerHandle {
        self.handle.clone()
    }

    /// Stops the thread and waits for it, at most `limit`.
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
    /// Hands an engine to the worker, which starts it. Does not wait.
    pub fn attach(
        &self,
        engine: Box<dyn Engine>,
        interrupt: Arc<dyn Interrupt>,
    ) -> Result<Attachment, WorkerError> {
        let id = self.next.fetch_add(1, Ordering::Relaxed) % SELF;
        self.order(Command::Attach { id, engine, interrupt })?;
        Ok(Attachment { id, worker: self.clone() })
    }

    /// Lets every engine finish what is in flight and handles nothing until [`Self::resume`].
    /// On [`WorkerError::Deadline`] the pause still comes into effect as soon as it can.
    pub fn pause(&self, limit: Duration) -> Result<(), WorkerError> {
        let (done, answer) = channel();
        self.order(Command::Pause { done })?;
        match answer.recv_timeout(limit) {
            Ok(()) => Ok(()),
            Err(RecvTimeoutError::Timeout) => Err(WorkerError::Deadline { limit }),
            Err(RecvTimeoutError::Disconnected) => Err(WorkerError::Stopped),
        }
    }

    pub fn resume(&self) -> Result<(), WorkerError> {
        self.order(Command::Resume)
    }

    /// Ends the thread soon; engines are dropped on it.
    pub fn stop(&self) {
        let _ = self.order(Command::Stop);
    }

    fn order(&self, command: Command) -> Result<(), WorkerError> {
        self.commands.send(command).map_err(|_| WorkerError::Stopped)?;
        // A full counter (EAGAIN) has woken the worker already.
        let _ = self.wake.write(1);
        Ok(())
    }
}

impl Attachment {
    /// Tells the worker to let the engine go. Does not wait.
    pub fn detach(self) -> Detached {
        let done = Arc::new(AtomicBool::new(false));
        // A worker that has stopped has dropped the engine, and drops this order.
        let _ = self.worker.order(Command::Detach { id: self.id, gone: Gone(done.clone()) });
        Detached { done }
    }
}

struct Running {
    engine: Box<dyn Engine>,
    poll: PollState,
    leaving: Option<Leaving>,
}

struct Leaving {
    _gone: Option<Gone>,
    until: Instant,
}

struct Run {
    epoll: Epoll,
    orders: Receiver<Command>,
    wake: Arc<EventFd>,
    engines: HashMap<u32, Running>,
    paused: bool,
    /// Who waits for the pause to be complete.
    pausing: Vec<Sender<()>>,
    /// For devices that a driver starts in vain, again and again.
    limit: LogLimit,
    stop: bool,
}

impl Run {
    fn run(&mut self) {
        let mut events = [EpollEvent::default(); EVENTS_A_ROUND];
        while !self.stop {
            if self.paused {
                self.wait_paused();
            } else {
                self.round(&mut events);
            }
            self.let_go();
        }
        // Whoever still waits for an engine is told; what is in flight is finished first.
        for running in self.engines.values_mut() {
            running.engine.drain();
            let until = Instant::now() + DRAIN_LIMIT;
            running.leaving.get_or_insert(Leaving { _gone: None, until });
        }
        while !self.engines.is_empty() {
            self.let_go();
            if !self.engines.is_empty() {
                std::thread::sleep(DRAIN_POLL);
            }
        }
    }

    /// Paused: no event is looked at, only orders and the end of what is in flight.
    fn wait_paused(&mut self) {
        let drained = self.engines.values_mut().all(|r| r.engine.drained());
        if drained {
            for done in self.pausing.drain(..) {
                let _ = done.send(());
            }
        }
        let leaving = self.engines.values().any(|r| r.leaving.is_some());
        let order = if drained && !leaving {
            self.orders.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            self.orders.recv_timeout(DRAIN_POLL)
        };
        match order {
            Ok(command) => self.obey(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.stop = true,
        }
    }

    fn round(&mut self, events: &mut [EpollEvent]) {
        let count = match self.epoll.wait(self.timeout(), events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::error!(%error, "worker's epoll failed");
                self.stop = true;
                return;
            }
        };
        // What was left over from the last round goes first, then what is new.
        let again: Vec<(u32, Vec<u32>)> = self
            .engines
            .iter_mut()
            .map(|(id, r)| (*id, std::mem::take(&mut r.poll.again)))
            .collect();
        for (id, tokens) in again {
            for token in tokens {
                self.handle(id, token, EventSet::empty());
            }
        }
        for event in &events[..count] {
            let (id, token) = ((event.data() >> 32) as u32, event.data() as u32);
            if id == SELF {
                let _ = self.wake.read();
                while let Ok(command) = self.orders.try_recv() {
                    self.obey(command);
                }
            } else {
                self.handle(id, token, event.event_set());
            }
        }
        self.tick();
    }

    fn handle(&mut self, id: u32, token: u32, events: EventSet) {
        if let Some(running) = self.engines.get_mut(&id) {
            let mut poll = Poll::new(&self.epoll, id, &mut running.poll);
            running.engine.handle(token, events, &mut poll);
        }
    }

    fn tick(&mut self) {
        let now = Instant::now();
        for (id, running) in &mut self.engines {
            if running.engine.deadline().is_some_and(|at| at <= now) {
                let mut poll = Poll::new(&self.epoll, *id, &mut running.poll);
                running.engine.tick(now, &mut poll);
            }
        }
    }

    /// Milliseconds until something has to be done without an event.
    fn timeout(&self) -> i32 {
        if self.engines.values().any(|r| !r.poll.again.is_empty()) {
            return 0;
        }
        let now = Instant::now();
        let ticks = self.engines.values().filter_map(|r| r.engine.deadline());
        let drains = self.engines.values().filter(|r| r.leaving.is_some());
        let next = ticks.chain(drains.map(|_| now + DRAIN_POLL)).min();
        next.map_or(-1, |at| {
            let rest = at.saturating_duration_since(now).as_millis() + 1;
            rest.try_into().unwrap_or(i32::MAX)
        })
    }

    fn obey(&mut self, command: Command) {
        match command {
            Command::Attach { id, mut engine, interrupt } => {
                let mut poll = PollState::default();
                if let Err(error) = engine.start(&mut Poll::new(&self.epoll, id, &mut poll)) {
                    guest_warn!(self.limit, %error, "device cannot start");
                    interrupt.needs_reset();
                }
                if self.paused {
                    engine.drain();
                }
                self.engines.insert(id, Running { engine, poll, leaving: None });
            }
            Command::Detach { id, gone } => match self.engines.get_mut(&id) {
                Some(running) => {
                    running.engine.drain();
                    let until = Instant::now() + DRAIN_LIMIT;
                    running.leaving = Some(Leaving { _gone: Some(gone), until });
                }
                None => drop(gone),
            },
            Command::Pause { done } => {
                self.paused = true;
                self.pausing.push(done);
                for running in self.engines.values_mut() {
                    running.engine.drain();
                }
            }
            Command::Resume => {
                self.paused = false;
                self.pausing.clear();
                for (id, running) in &mut self.engines {
                    if running.leaving.is_none() {
                        let mut poll = Poll::new(&self.epoll, *id, &mut running.poll);
                        running.engine.resume(&mut poll);
                    }
                }
            }
            Command::Stop => self.stop = true,
        }
    }

    /// Drops engines that were told to go and have nothing in flight any more.
    fn let_go(&mut self) {
        let now = Instant::now();
        let mut gone = Vec::new();
        for (id, running) in &mut self.engines {
            let Some(Leaving { until, .. }) = &running.leaving else { continue };
            if running.engine.drained() {
                gone.push(*id);
            } else if now >= *until {
                tracing::error!("device did not finish its requests in time");
                gone.push(*id);
            }
        }
        for id in gone {
            let Some(mut running) = self.engines.remove(&id) else { continue };
            running.poll.remove_all(&self.epoll);
            let Running { engine, leaving, .. } = running;
            drop(engine);
            drop(leaving);
        }
    }
}

#[cfg(test)]
mod tests;
