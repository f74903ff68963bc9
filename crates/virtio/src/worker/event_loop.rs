//! What runs on a worker's thread: waits for events and commands, calls engines, drops drained
//! ones.
//!
//! Fairness: `epoll_wait` returns at most [`MAX_EVENTS`] events; an engine does a bounded amount of
//! work for each and reschedules the rest for the next round, in which every engine is served.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::{Command, SetOnDrop, WAKE_ID};
use crate::device::{Engine, Poll, PollState};
use crate::guest_warn;
use crate::limit::LogLimit;

/// Events per `epoll_wait`.
const MAX_EVENTS: usize = 64;
/// How often a draining engine is polled, in case its last completion was consumed by another
/// event.
const DRAIN_POLL: Duration = Duration::from_millis(2);
/// An engine that has not drained by then is dropped. Engines whose guest memory the kernel may
/// still access keep that memory mapped themselves.
const DRAIN_LIMIT: Duration = Duration::from_secs(30);

struct Running {
    engine: Box<dyn Engine>,
    poll: PollState,
    detaching: Option<Detaching>,
}

struct Detaching {
    _done: Option<SetOnDrop>,
    deadline: Instant,
}

pub(super) struct EventLoop {
    epoll: Epoll,
    commands: Receiver<Command>,
    wake: Arc<EventFd>,
    engines: HashMap<u32, Running>,
    paused: bool,
    /// Callers that wait until the pause is complete.
    pause_waiters: Vec<Sender<()>>,
    /// For failed starts of engines: a driver can repeat them.
    limit: LogLimit,
    stop: bool,
}

impl EventLoop {
    pub(super) fn new(epoll: Epoll, commands: Receiver<Command>, wake: Arc<EventFd>) -> Self {
        Self {
            epoll,
            commands,
            wake,
            engines: HashMap::new(),
            paused: false,
            pause_waiters: Vec::new(),
            limit: LogLimit::default(),
            stop: false,
        }
    }

    /// Runs until [`Command::Stop`]; then drains and drops all engines.
    pub(super) fn run(&mut self) {
        let mut events = [EpollEvent::default(); MAX_EVENTS];
        while !self.stop {
            if self.paused {
                self.wait_paused();
            } else {
                self.run_once(&mut events);
            }
            self.drop_drained();
        }
        for running in self.engines.values_mut() {
            running.engine.drain();
            let deadline = Instant::now() + DRAIN_LIMIT;
            running.detaching.get_or_insert(Detaching { _done: None, deadline });
        }
        while !self.engines.is_empty() {
            self.drop_drained();
            if !self.engines.is_empty() {
                std::thread::sleep(DRAIN_POLL);
            }
        }
    }

    /// While paused only commands are received and draining engines are polled; no event is
    /// handled.
    fn wait_paused(&mut self) {
        let drained = self.engines.values_mut().all(|r| r.engine.drained());
        if drained {
            for done in self.pause_waiters.drain(..) {
                let _ = done.send(());
            }
        }
        let detaching = self.engines.values().any(|r| r.detaching.is_some());
        let command = if drained && !detaching {
            self.commands.recv().map_err(|_| RecvTimeoutError::Disconnected)
        } else {
            self.commands.recv_timeout(DRAIN_POLL)
        };
        match command {
            Ok(command) => self.execute(command),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => self.stop = true,
        }
    }

    fn run_once(&mut self, events: &mut [EpollEvent]) {
        let count = match self.epoll.wait(self.timeout(), events) {
            Ok(count) => count,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => 0,
            Err(error) => {
                tracing::error!(%error, "epoll_wait of a worker failed");
                self.stop = true;
                return;
            }
        };
        // Order: tokens rescheduled in the last round, then new events, then timers.
        let rescheduled: Vec<(u32, Vec<u32>)> = self
            .engines
            .iter_mut()
            .map(|(id, r)| (*id, std::mem::take(&mut r.poll.rescheduled)))
            .collect();
        for (id, tokens) in rescheduled {
            for token in tokens {
                self.handle(id, token, EventSet::empty());
            }
        }
        for event in &events[..count] {
            let (id, token) = ((event.data() >> 32) as u32, event.data() as u32);
            if id == WAKE_ID {
                let _ = self.wake.read();
                while let Ok(command) = self.commands.try_recv() {
                    self.execute(command);
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

    /// Timeout of `epoll_wait`, ms: 0 with rescheduled tokens, -1 without timers.
    fn timeout(&self) -> i32 {
        if self.engines.values().any(|r| !r.poll.rescheduled.is_empty()) {
            return 0;
        }
        let now = Instant::now();
        let ticks = self.engines.values().filter_map(|r| r.engine.deadline());
        let drains = self.engines.values().filter(|r| r.detaching.is_some());
        let next = ticks.chain(drains.map(|_| now + DRAIN_POLL)).min();
        next.map_or(-1, |at| {
            let rest = at.saturating_duration_since(now).as_millis() + 1;
            rest.try_into().unwrap_or(i32::MAX)
        })
    }

    fn execute(&mut self, command: Command) {
        match command {
            Command::Attach { id, mut engine, interrupt } => {
                let mut poll = PollState::default();
                if let Err(error) = engine.start(&mut Poll::new(&self.epoll, id, &mut poll)) {
                    guest_warn!(self.limit, %error, "cannot start the engine of a device");
                    interrupt.needs_reset();
                }
                if self.paused {
                    engine.drain();
                }
                self.engines.insert(id, Running { engine, poll, detaching: None });
            }
            Command::Detach { id, done } => match self.engines.get_mut(&id) {
                Some(running) => {
                    running.engine.drain();
                    let deadline = Instant::now() + DRAIN_LIMIT;
                    running.detaching = Some(Detaching { _done: Some(done), deadline });
                }
                None => drop(done),
            },
            Command::Pause { done } => {
                self.paused = true;
                self.pause_waiters.push(done);
                for running in self.engines.values_mut() {
                    running.engine.drain();
                }
            }
            Command::Resume => {
                self.paused = false;
                self.pause_waiters.clear();
                for (id, running) in &mut self.engines {
                    if running.detaching.is_none() {
                        let mut poll = Poll::new(&self.epoll, *id, &mut running.poll);
                        running.engine.resume(&mut poll);
                    }
                }
            }
            Command::Stop => self.stop = true,
        }
    }

    /// Drops detached engines that have drained, or whose deadline has passed.
    fn drop_drained(&mut self) {
        let now = Instant::now();
        let mut finished = Vec::new();
        for (id, running) in &mut self.engines {
            let Some(Detaching { deadline, .. }) = &running.detaching else { continue };
            if running.engine.drained() {
                finished.push(*id);
            } else if now >= *deadline {
                tracing::error!("device did not complete its requests before the deadline");
                finished.push(*id);
            }
        }
        for id in finished {
            let Some(mut running) = self.engines.remove(&id) else { continue };
            running.poll.remove_all(&self.epoll);
            // The flag is set after the engine was dropped.
            let Running { engine, detaching, .. } = running;
            drop(engine);
            drop(detaching);
        }
    }
}
