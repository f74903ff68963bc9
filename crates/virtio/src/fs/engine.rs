//! The engine: starts the back end's rings when the driver is ready, stops them for a pause or a
//! reset, and answers requests itself after the back end has failed.
//!
//! ```text
//!   Greeting --features--> Serving --drain--> Stopping --bases--> Stopped --resume--> Serving
//!      |                      |                  |                   |
//!      +--- closed, malformed reply, deadline ---+-------------------+--> Lost --> Orphaned
//! ```
//! `Lost` still has the socket, which is closed only after its removal from epoll. No call blocks:
//! replies are epoll events, or are polled while draining, and both have a deadline.

use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::connection::{BackendError, Connection, split};
use super::orphan::refuse;
use super::spec::{F_PROTOCOL_FEATURES, QUEUES_MAX, request};
use crate::device::{DeviceCounters, Engine, Interrupt, Poll};
use crate::guest_warn;
use crate::queue::{Rings, VirtQueue};

/// Deadline for a reply; after it the back end is treated as failed. Replies need no file access,
/// but a ring stops only after the request in progress.
const REPLY_LIMIT: Duration = Duration::from_secs(10);
/// Requests refused per call, so that other devices of the worker are served too.
const BUDGET: usize = 64;

const SOCKET: u32 = 0;
const KICK: u32 = 16;
const CALL: u32 = 32;
const _: () = assert!(QUEUES_MAX as u32 <= CALL - KICK);

/// Where each queue's ring goes on.
type Bases = Vec<u16>;

enum State {
    Greeting { connection: Connection, until: Instant },
    Serving { connection: Connection },
    Stopping { connection: Connection, until: Instant, bases: Vec<Option<u16>> },
    Stopped { connection: Connection, bases: Bases },
    Lost { connection: Option<Connection> },
    Orphaned,
}

pub(super) struct FsEngine {
    // Fixed.
    queues: Vec<VirtQueue>,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    home: Arc<Mutex<Option<Connection>>>,
    counters: Arc<DeviceCounters>,
    /// Call eventfds of queues whose interrupt has no eventfd of its own.
    calls: Vec<Option<EventFd>>,
    // Volatile.
    state: State,
    paused: bool,
}

impl FsEngine {
    pub(super) fn new(
        queues: Vec<VirtQueue>,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
        connection: Option<Connection>,
        home: Arc<Mutex<Option<Connection>>>,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        let state = match connection {
            Some(connection) => State::Greeting { connection, until: Instant::now() + REPLY_LIMIT },
            None => State::Lost { connection: None },
        };
        let calls = queues.iter().map(|_| None).collect();
        Self { queues, interrupt, features, home, counters, calls, state, paused: false }
    }

    fn take_state(&mut self) -> State {
        std::mem::replace(&mut self.state, State::Orphaned)
    }

    /// The back end has failed; [`Self::settle`] completes the transition to `Orphaned`.
    fn lose(&mut self, error: &BackendError) {
        let connection = match self.take_state() {
            State::Greeting { connection, .. }
            | State::Serving { connection }
            | State::Stopping { connection, .. }
            | State::Stopped { connection, .. } => Some(connection),
            State::Lost { connection } => connection,
            State::Orphaned => return,
        };
        self.counters.error();
        let error: &dyn std::error::Error = error;
        guest_warn!(self.counters.limit, error, "file system backend is lost; its requests fail");
        self.state = State::Lost { connection };
    }

    /// From `Lost` to `Orphaned`: the engine processes the queues itself.
    fn settle(&mut self, poll: &mut Poll<'_>) {
        let State::Lost { connection } = &self.state else { return };
        if let Some(connection) = connection {
            poll.remove(connection.fd());
        }
        self.state = State::Orphaned;
        for (token, queue) in (KICK..).zip(&mut self.queues) {
            // The back end answers the requests of a ring in order, so all requests after the used
            // index are unanswered.
            queue.resume_at_used_index();
            if poll.add(queue.kick_fd(), token, EventSet::IN).is_err() {
                self.interrupt.needs_reset();
            }
            poll.reschedule(token);
        }
    }

    /// Runs `work`; an error means that the back end has failed.
    fn attempt(
        &mut self,
        poll: &mut Poll<'_>,
        work: impl FnOnce(&mut Self, &mut Poll<'_>) -> Result<(), BackendError>,
    ) {
        if let Err(error) = work(self, poll) {
            self.lose(&error);
        }
        self.settle(poll);
    }

    fn greet(&mut self, poll: &mut Poll<'_>) -> Result<(), BackendError> {
        let State::Greeting { connection, .. } = &mut self.state else { return Ok(()) };
        let events = EventSet::IN | EventSet::READ_HANG_UP;
        poll.add(connection.fd(), SOCKET, events).map_err(BackendError::Event)?;
        if !connection.owned {
            connection.send(request::SET_OWNER, &[], &[])?;
            connection.owned = true;
        }
        connection.send(request::GET_FEATURES, &[], &[])
    }

    /// Handles the replies that have arrived.
    fn replies(&mut self, poll: Option<&mut Poll<'_>>) -> Result<(), BackendError> {
        let mut poll = poll;
        loop {
            let connection = match &mut self.state {
                State::Greeting { connection, .. }
                | State::Serving { connection }
                | State::Stopping { connection, .. }
                | State::Stopped { connection, .. } => connection,
                State::Lost { .. } | State::Orphaned => return Ok(()),
            };
            let Some((request, payload)) = connection.receive()? else { return Ok(()) };
            match (self.take_state(), request) {
                (State::Greeting { connection, .. }, request::GET_FEATURES) => {
                    let offered = u64::from_ne_bytes(payload);
                    let wanted = self.features | F_PROTOCOL_FEATURES;
                    let bases = vec![0; self.queues.len()];
                    self.state = State::Stopped { connection, bases };
                    if offered & wanted != wanted {
                        return Err(BackendError::Features { missing: wanted & !offered });
                    }
                    if let Some(poll) = &mut poll
                        && !self.paused
                    {
                        self.serve(poll)?;
                    }
                }
                (State::Stopping { connection, until, mut bases }, request::GET_VRING_BASE) => {
                    let (queue, base) = split(payload);
                    let place = bases.get_mut(queue as usize);
                    let known = place.map(|place| *place = Some(base as u16)).is_some();
                    self.state = stopping(connection, until, bases);
                    if !known {
                        return Err(BackendError::Queue { got: queue });
                    }
                }
                // A reply to an earlier engine; the connection refuses all other unexpected ones.
                (state, _) => self.state = state,
            }
        }
    }

    /// Sends memory and rings to a back end whose rings are stopped.
    fn serve(&mut self, poll: &mut Poll<'_>) -> Result<(), BackendError> {
        let (mut connection, bases) = match self.take_state() {
            State::Stopped { connection, bases } => (connection, bases),
            other => {
                self.state = other;
                return Ok(());
            }
        };
        let done = self.start_rings(&mut connection, &bases, poll);
        self.state = State::Serving { connection };
        done
    }

    fn start_rings(
        &mut self,
        connection: &mut Connection,
        bases: &[u16],
        poll: &mut Poll<'_>,
    ) -> Result<(), BackendError> {
        connection.send_u64(request::SET_FEATURES, self.features | F_PROTOCOL_FEATURES)?;
        connection.send_memory(self.queues[0].mem())?;
        for (index, queue) in (0u16..).zip(&self.queues) {
            // The driver has not enabled this queue.
            let Some(Rings { size, desc, driver, device }) = queue.rings() else { continue };
            let n = u32::from(index);
            let base = u32::from(bases[usize::from(index)]);
            connection.send_state(request::SET_VRING_NUM, n, u32::from(size))?;
            connection.send_state(request::SET_VRING_BASE, n, base)?;
            let mut address = Vec::with_capacity(40);
            address.extend(u64::from(n).to_ne_bytes());
            for place in [desc, device, driver, 0] {
                address.extend(place.to_ne_bytes());
            }
            connection.send(request::SET_VRING_ADDR, &address, &[])?;
            let call = self.interrupt.event(index);
            let call = match &call {
                Some(call) => call,
                None => {
                    let slot = &mut self.calls[usize::from(index)];
                    let call = match slot.take() {
                        Some(call) => call,
                        None => {
                            let call = EventFd::new(EFD_NONBLOCK).map_err(BackendError::Event)?;
                            poll.add(call.as_raw_fd(), CALL + n, EventSet::IN)
                                .map_err(BackendError::Event)?;
                            call
                        }
                    };
                    slot.insert(call)
                }
            };
            connection.send_event(request::SET_VRING_CALL, n, borrow(call))?;
            connection.send_event(request::SET_VRING_KICK, n, borrow(queue.kick()))?;
            connection.send_state(request::SET_VRING_ENABLE, n, 1)?;
            // For chains that became available before the ring was started.
            let _ = queue.kick().write(1);
            self.counters.operation(0);
        }
        Ok(())
    }

    fn stop_rings(&mut self) -> Result<(), BackendError> {
        let mut connection = match self.take_state() {
            State::Serving { connection } => connection,
            other => {
                self.state = other;
                return Ok(());
            }
        };
        let mut bases = vec![None; self.queues.len()];
        let mut done = Ok(());
        for (n, (base, queue)) in (0..).zip(bases.iter_mut().zip(&self.queues)) {
            if queue.rings().is_none() {
                *base = Some(0);
            } else if done.is_ok() {
                done = connection.send_state(request::GET_VRING_BASE, n, 0);
            }
        }
        let until = Instant::now() + REPLY_LIMIT;
        self.state = stopping(connection, until, bases);
        done
    }
}

impl Engine for FsEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> std::io::Result<()> {
        self.attempt(poll, Self::greet);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token == SOCKET {
            return self.attempt(poll, |engine, poll| engine.replies(Some(poll)));
        }
        if let Some(call) = token.checked_sub(CALL) {
            if let Some(Some(event)) = self.calls.get(call as usize) {
                let _ = event.read();
                self.interrupt.queue(call as u16);
            }
            return;
        }
        let Some(queue) = token.checked_sub(KICK).and_then(|n| self.queues.get_mut(n as usize))
        else {
            return;
        };
        if !matches!(self.state, State::Orphaned) || self.paused {
            return;
        }
        queue.clear_kick();
        let mem = queue.mem().clone();
        let counters = &self.counters;
        let refuse = |chain: &crate::chain::Chain| {
            counters.error();
            refuse(&mem, chain)
        };
        if queue.serve(BUDGET, refuse) {
            poll.reschedule(token);
        }
    }

    fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Greeting { until, .. } | State::Stopping { until, .. } => Some(*until),
            _ => None,
        }
    }

    fn tick(&mut self, now: Instant, poll: &mut Poll<'_>) {
        if self.deadline().is_some_and(|until| until <= now) {
            self.attempt(poll, |_, _| Err(BackendError::Deadline));
        }
    }

    fn drain(&mut self) {
        self.paused = true;
        if let Err(error) = self.stop_rings() {
            self.lose(&error);
        }
    }

    fn drained(&mut self) -> bool {
        if let Err(error) = self.replies(None) {
            self.lose(&error);
        }
        if self.deadline().is_some_and(|until| until <= Instant::now()) {
            self.lose(&BackendError::Deadline);
        }
        !matches!(self.state, State::Stopping { .. })
    }

    fn resume(&mut self, poll: &mut Poll<'_>) {
        self.paused = false;
        self.attempt(poll, Self::serve);
        if matches!(self.state, State::Orphaned) {
            for token in (KICK..).take(self.queues.len()) {
                poll.reschedule(token);
            }
        }
    }
}

impl Drop for FsEngine {
    /// Keeps a connection whose rings are stopped for the next activation. Any other is closed,
    /// upon which the back end unmaps guest memory.
    fn drop(&mut self) {
        if let State::Stopped { connection, .. } | State::Greeting { connection, .. } =
            self.take_state()
        {
            *self.home.lock().unwrap_or_else(PoisonError::into_inner) = Some(connection);
        }
    }
}

/// Stopped once each queue's base is known.
fn stopping(connection: Connection, until: Instant, bases: Vec<Option<u16>>) -> State {
    match bases.iter().copied().collect() {
        Some(bases) => State::Stopped { connection, bases },
        None => State::Stopping { connection, until, bases },
    }
}

#[allow(unsafe_code)] // vmm-sys-util's EventFd lends only its number
fn borrow(event: &EventFd) -> BorrowedFd<'_> {
    // SAFETY: the file descriptor is open as long as `event`, which the result borrows.
    unsafe { BorrowedFd::borrow_raw(event.as_raw_fd()) }
}
