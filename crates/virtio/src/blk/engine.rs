//! The block device's moving half: chains in, system calls under way, status bytes out.
//!
//! Completions may overtake each other (section 5.2.6: requests have no order). A flush covers the
//! writes that had completed when it was made available, which is what `fdatasync` started then
//! covers; writes still in flight are not its business.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::backend::{Backend, Done, Io};
use super::request::{self, Limits, Operation};
use super::spec::{ID_LEN, Status};
use crate::chain::{Buffer, Chain};
use crate::device::{DeviceCounters, Engine, Poll};
use crate::guest_warn;
use crate::queue::VirtQueue;

/// Requests taken from the queue before other devices get their turn.
const BUDGET: usize = 64;
/// Times a request is begun again because the host was interrupted or busy; then it fails. A host's
/// device that is always busy would keep the worker for ever.
pub(super) const MAX_RESTARTS: u8 = 16;

/// What a disk that is written to may leave in the host's page cache, bytes: the guest has a cache of
/// its own, and the host's is charged to the pod as well. What the guest reads of an image stays: other
/// pods read it too.
pub(super) const CACHE: u64 = 16 << 20;
/// A disk that has rested for so long leaves nothing there.
const REST: Duration = Duration::from_secs(1);
/// Times that a resting disk's cache is dropped: what is being written is dropped only later.
pub(super) const DROPS: u8 = 3;

const REQUESTS: u32 = 0;
const COMPLETIONS: u32 = 1;

pub(super) struct BlockEngine {
    // Fixed.
    pub(super) limits: Limits,
    pub(super) id: [u8; ID_LEN],
    /// The driver did not negotiate FLUSH: every write is durable when it completes (section
    /// 5.2.6.2).
    pub(super) write_through: bool,
    pub(super) block_device: bool,
    // Glue.
    pub(super) queue: VirtQueue,
    pub(super) backend: Option<Backend>,
    /// Where the backend goes back to for the next activation.
    pub(super) home: Arc<Mutex<Option<Backend>>>,
    pub(super) counters: Arc<DeviceCounters>,
    // Volatile.
    pub(super) slots: Vec<Option<Pending>>,
    pub(super) free: Vec<usize>,
    pub(super) draining: bool,
    /// Chains were left in the queue for want of a slot.
    pub(super) starved: bool,
    pub(super) cache: Cache,
}

/// What the host's page cache holds of a disk that is not shared.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// Bytes moved since it was dropped last.
    moved: u64,
    /// When it is dropped next, if nothing else is moved.
    rest: Option<Instant>,
    /// Times that it was dropped since something was moved.
    drops: u8,
    /// The slot of the request to drop it.
    slot: Option<usize>,
}

/// A request that the kernel has.
pub(super) struct Pending {
    head: u16,
    operation: Operation,
    status: Buffer,
    /// Bytes of data moved by earlier, short system calls.
    moved: usize,
    /// Times it was begun again for nothing.
    restarts: u8,
    /// A second way to zero a range is being tried.
    retried: bool,
}

impl Engine for BlockEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), REQUESTS, EventSet::IN)?;
        if let Some(fd) = self.backend.as_ref().and_then(Backend::event_fd) {
            poll.add(fd, COMPLETIONS, EventSet::IN)?;
        }
        poll.again(REQUESTS);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token == REQUESTS {
            self.queue.clear_kick();
        }
        self.reap();
        if !self.draining && self.take_requests() {
            poll.again(REQUESTS);
        }
        self.submit(poll);
        // Requests that the page cache answers are done already.
        if self.reap() {
            self.submit(poll);
        }
        // Begun again, and done already, with no event to tell of it.
        if self.backend.as_ref().is_some_and(Backend::has_finished) {
            poll.again(COMPLETIONS);
        }
        if std::mem::take(&mut self.starved) {
            if self.free.is_empty() {
                self.starved = true;
            } else {
                poll.again(REQUESTS);
            }
        }
        self.queue.announce();
    }

    fn deadline(&self) -> Option<Instant> {
        self.cache.rest.filter(|_| !self.draining && self.cache.slot.is_none())
    }

    fn tick(&mut self, now: Instant, poll: &mut Poll<'_>) {
        self.cache.drops += 1;
        self.cache.rest = (self.cache.drops < DROPS).then(|| now + REST);
        self.drop_cache();
        self.submit(poll);
        if self.backend.as_ref().is_some_and(Backend::has_finished) {
            poll.again(COMPLETIONS);
        }
    }

    fn drain(&mut self) {
        self.draining = true;
    }

    fn drained(&mut self) -> bool {
        self.reap();
        if let Some(backend) = &mut self.backend {
            let _ = backend.submit();
        }
        self.queue.announce();
        self.is_at_rest()
    }

    fn resume(&mut self, poll: &mut Poll<'_>) {
        self.draining = false;
        poll.again(REQUESTS);
    }
}

impl BlockEngine {
    /// Takes what there is room for; `true` when more may be waiting.
    fn take_requests(&mut self) -> bool {
        self.queue.disable_kicks();
        for _ in 0..BUDGET {
            let Some(slot) = self.free.pop() else {
                self.starved = true;
                return false;
            };
            let Some(chain) = self.queue.pop() else {
                self.free.push(slot);
                if self.queue.enable_kicks() {
                    continue;
                }
                return false;
            };
            self.begin(slot, &chain);
        }
        true
    }

    fn begin(&mut self, slot: usize, chain: &Chain) {
        let mem = self.queue.mem().clone();
        let parsed = request::split_status(chain).map(|(writable, status)| {
            (request::parse(&mem, &chain.readable, writable, self.limits), status)
        });
        let (operation, status) = match parsed {
            Ok((Ok(operation), status)) => (operation, status),
            Ok((Err(error), status)) => {
                guest_warn!(self.counters.limit, %error, "block request refused");
                self.free.push(slot);
                return self.answer(chain.head, &status, error.status(), 0);
            }
            Err(error) => {
                guest_warn!(self.counters.limit, %error, "block request cannot be answered");
                self.free.push(slot);
                self.counters.error();
                return self.queue.push(chain.head, 0);
            }
        };
        let at_once = match &operation {
            Operation::GetId { data } => Some(data.write(&mem, 0, &self.id)),
            Operation::Discard { len: 0, .. } | Operation::WriteZeroes { len: 0, .. } => Some(0),
            _ => None,
        };
        if let Some(written) = at_once {
            self.free.push(slot);
            return self.answer(chain.head, &status, Status::Ok, written);
        }
        let head = chain.head;
        let pending = Pending { head, operation, status, moved: 0, restarts: 0, retried: false };
        self.start_io(slot, &pending);
        self.slots[slot] = Some(pending);
    }

    fn start_io(&mut self, slot: usize, pending: &Pending) {
        let rest;
        let io = match &pending.operation {
            Operation::Read { offset, data } => {
                rest = data.split_at(pending.moved).1;
                Io::Read { offset: offset + pending.moved as u64, data: &rest }
            }
            Operation::Write { offset, data } => {
                rest = data.split_at(pending.moved).1;
                let offset = offset + pending.moved as u64;
                Io::Write { offset, data: &rest, durable: self.write_through }
            }
            Operation::Flush | Operation::GetId { .. } => Io::Sync,
            Operation::Discard { offset, len } => {
                Io::Fallocate { mode: PUNCH, offset: *offset, len: *len }
            }
            Operation::WriteZeroes { offset, len, unmap } => {
                // A hole reads as zeroes. A block device that cannot unmap refuses to punch, and a
                // file system (tmpfs) may refuse to zero: each then gets the other order.
                let punch = (*unmap && !self.block_device) != pending.retried;
                let mode = if punch { PUNCH } else { ZERO };
                Io::Fallocate { mode, offset: *offset, len: *len }
            }
        };
        if let Some(backend) = &mut self.backend {
            backend.start(slot, &io, self.queue.mem());
        }
    }

    fn submit(&mut self, poll: &mut Poll<'_>) {
        if let Some(backend) = &mut self.backend
            && let Err(error) = backend.submit()
        {
            tracing::debug!(%error, "io_uring is busy");
            poll.again(COMPLETIONS);
        }
    }

    /// Answers what has finished; `true` when something has to be submitted again or slots have
    /// become free.
    fn reap(&mut self) -> bool {
        let mut finished = Vec::new();
        if let Some(backend) = &mut self.backend {
            backend.finished(&mut finished);
        }
        let any = !finished.is_empty();
        for done in finished {
            self.finish(done);
        }
        any
    }

    /// Counts what the host's page cache may hold now.
    fn cached(&mut self, bytes: u64) {
        if self.limits.read_only {
            return;
        }
        self.cache.moved += bytes;
        self.cache.rest = Some(Instant::now() + REST);
        self.cache.drops = 0;
        if self.cache.moved >= CACHE {
            self.drop_cache();
        }
    }

    /// Starts to drop the host's page cache, if there is a slot for that.
    fn drop_cache(&mut self) {
        if self.draining || self.cache.slot.is_some() {
            return;
        }
        let (Some(backend), Some(slot)) = (&mut self.backend, self.free.pop()) else { return };
        backend.start(slot, &Io::DropCache, self.queue.mem());
        self.cache.slot = Some(slot);
        self.cache.moved = 0;
    }

    fn is_at_rest(&self) -> bool {
        self.cache.slot.is_none() && self.slots.iter().all(Option::is_none)
    }

    fn finish(&mut self, Done { slot, result }: Done) {
        if self.cache.slot == Some(slot) {
            self.cache.slot = None;
            self.free.push(slot);
            if let Err(error) = result {
                tracing::debug!(%error, "the host keeps a disk in its page cache");
            }
            return;
        }
        let Some(mut pending) = self.slots[slot].take() else { return };
        let wanted = match &pending.operation {
            Operation::Read { data, .. } | Operation::Write { data, .. } => data.len(),
            _ => 0,
        };
        let status = match result {
            Ok(0) if wanted > pending.moved => {
                let error = io::Error::from(io::ErrorKind::UnexpectedEof);
                self.host_failed(&error)
            }
            Ok(moved) => {
                pending.moved += moved;
                if pending.moved < wanted {
                    self.start_io(slot, &pending);
                    self.slots[slot] = Some(pending);
                    return;
                }
                Status::Ok
            }
            Err(error) if is_interrupted(&error) && pending.restarts < MAX_RESTARTS => {
                pending.restarts += 1;
                self.start_io(slot, &pending);
                self.slots[slot] = Some(pending);
                return;
            }
            Err(error) => match &pending.operation {
                // Discard is advice (section 5.2.6.2).
                Operation::Discard { .. } if is_unsupported(&error) => Status::Ok,
                Operation::WriteZeroes { .. } if is_unsupported(&error) && !pending.retried => {
                    pending.retried = true;
                    self.start_io(slot, &pending);
                    self.slots[slot] = Some(pending);
                    return;
                }
                _ => self.host_failed(&error),
            },
        };
        self.free.push(slot);
        let written = match &pending.operation {
            Operation::Read { data, .. } if status == Status::Ok => data.len(),
            _ => 0,
        };
        if matches!(pending.operation, Operation::Read { .. } | Operation::Write { .. }) {
            self.cached(wanted as u64);
        }
        if let (Status::Ok, Operation::Write { data, .. }) = (status, &pending.operation) {
            self.counters.operation(data.len() as u64);
        } else if status == Status::Ok {
            self.counters.operation(written as u64);
        }
        self.complete(pending.head, &pending.status, status, written);
    }

    /// A full disk, a bad sector: the guest sees an I/O error, as from any disk.
    fn host_failed(&mut self, error: &io::Error) -> Status {
        self.counters.error();
        guest_warn!(self.counters.limit, %error, "disk request failed on the host");
        Status::IoError
    }

    /// Answers a request that never reached the kernel.
    fn answer(&mut self, head: u16, place: &Buffer, status: Status, written: usize) {
        match status {
            Status::Ok => self.counters.operation(written as u64),
            Status::IoError | Status::Unsupported => self.counters.error(),
        }
        self.complete(head, place, status, written);
    }

    fn complete(&mut self, head: u16, place: &Buffer, status: Status, written: usize) {
        place.write(self.queue.mem(), 0, &[status as u8]);
        self.queue.push(head, written as u32 + 1);
    }
}

impl Drop for BlockEngine {
    /// The backend serves the next activation, unless requests are stuck in it.
    fn drop(&mut self) {
        if self.is_at_rest() {
            *self.home.lock().unwrap_or_else(PoisonError::into_inner) = self.backend.take();
        }
    }
}

const PUNCH: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
const ZERO: i32 = libc::FALLOC_FL_ZERO_RANGE | libc::FALLOC_FL_KEEP_SIZE;

fn is_interrupted(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINTR | libc::EAGAIN))
}

fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS))
}
