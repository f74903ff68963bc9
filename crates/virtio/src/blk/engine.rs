//! The block device's engine: takes requests from the queue, runs them on the backend, writes
//! status bytes.
//!
//! Requests complete in any order (virtio 1.2, section 5.2.6). A flush covers the writes that had
//! completed when it was made available, as the `fdatasync` that is started then does; writes in
//! flight are not covered.

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

/// Requests taken from the queue per call, so that other devices of the worker are served too.
const BUDGET: usize = 64;
/// Times that a request is restarted after EINTR or EAGAIN before it fails: a device of the host
/// that is always busy would occupy the worker forever.
pub(super) const MAX_RESTARTS: u8 = 16;

/// Bytes that a writable disk may transfer before its pages are dropped from the host's page cache:
/// the guest has a page cache of its own, and the host's is charged to the pod's cgroup as well.
/// Read-only images stay cached: other pods read them too.
pub(super) const CACHE_LIMIT: u64 = 16 << 20;
/// The page cache of a disk is dropped after this idle time.
const CACHE_IDLE: Duration = Duration::from_secs(1);
/// Times that an idle disk's page cache is dropped: pages under writeback are dropped only by a
/// later call.
pub(super) const MAX_CACHE_DROPS: u8 = 3;

const REQUESTS: u32 = 0;
const COMPLETIONS: u32 = 1;

pub(super) struct BlockEngine {
    // Set at creation.
    pub(super) limits: Limits,
    pub(super) id: [u8; ID_LEN],
    /// The driver did not negotiate FLUSH: every write is durable when it completes (section
    /// 5.2.6.2).
    pub(super) write_through: bool,
    pub(super) block_device: bool,
    // Connections to queue, backend and counters.
    pub(super) queue: VirtQueue,
    pub(super) backend: Option<Backend>,
    /// Keeps the backend for the next activation.
    pub(super) idle_backend: Arc<Mutex<Option<Backend>>>,
    pub(super) counters: Arc<DeviceCounters>,
    // Runtime state.
    pub(super) slots: Vec<Option<Pending>>,
    pub(super) free: Vec<usize>,
    pub(super) draining: bool,
    /// Chains were left in the queue because no slot was free.
    pub(super) no_free_slot: bool,
    pub(super) cache: Cache,
}

/// When to drop a writable disk from the host's page cache.
#[derive(Debug, Default)]
pub(super) struct Cache {
    /// Bytes transferred since the last drop.
    moved: u64,
    /// When to drop it next if no data is transferred until then.
    drop_at: Option<Instant>,
    /// Drops since the last transfer.
    drops: u8,
    /// Slot of the [`Io::DropCache`] in flight.
    slot: Option<usize>,
}

/// A request in flight.
pub(super) struct Pending {
    head: u16,
    operation: Operation,
    status: Buffer,
    /// Data bytes transferred by earlier, short system calls.
    moved: usize,
    /// Restarts after EINTR or EAGAIN.
    restarts: u8,
    /// The other fallocate mode is being tried for a write-zeroes request.
    fallback_tried: bool,
}

impl Engine for BlockEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), REQUESTS, EventSet::IN)?;
        if let Some(fd) = self.backend.as_ref().and_then(Backend::event_fd) {
            poll.add(fd, COMPLETIONS, EventSet::IN)?;
        }
        poll.reschedule(REQUESTS);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token == REQUESTS {
            self.queue.clear_kick();
        }
        self.reap();
        if !self.draining && self.take_requests() {
            poll.reschedule(REQUESTS);
        }
        self.submit(poll);
        // Requests served from the page cache are complete already.
        if self.reap() {
            self.submit(poll);
        }
        // Restarted requests of the synchronous backend complete without an event.
        if self.backend.as_ref().is_some_and(Backend::has_finished) {
            poll.reschedule(COMPLETIONS);
        }
        if std::mem::take(&mut self.no_free_slot) {
            if self.free.is_empty() {
                self.no_free_slot = true;
            } else {
                poll.reschedule(REQUESTS);
            }
        }
        self.queue.signal_used();
    }

    fn deadline(&self) -> Option<Instant> {
        self.cache.drop_at.filter(|_| !self.draining && self.cache.slot.is_none())
    }

    fn tick(&mut self, now: Instant, poll: &mut Poll<'_>) {
        self.cache.drops += 1;
        self.cache.drop_at = (self.cache.drops < MAX_CACHE_DROPS).then(|| now + CACHE_IDLE);
        self.drop_cache();
        self.submit(poll);
        if self.backend.as_ref().is_some_and(Backend::has_finished) {
            poll.reschedule(COMPLETIONS);
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
        self.queue.signal_used();
        self.is_idle()
    }

    fn resume(&mut self, poll: &mut Poll<'_>) {
        self.draining = false;
        poll.reschedule(REQUESTS);
    }
}

impl BlockEngine {
    /// Takes requests while slots are free; `true` when more may be available.
    fn take_requests(&mut self) -> bool {
        self.queue.disable_kicks();
        for _ in 0..BUDGET {
            let Some(slot) = self.free.pop() else {
                self.no_free_slot = true;
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
                guest_warn!(self.counters.limit, %error, "block request has no status byte");
                self.free.push(slot);
                self.counters.error();
                return self.queue.push(chain.head, 0);
            }
        };
        let immediate = match &operation {
            Operation::GetId { data } => Some(data.write(&mem, 0, &self.id)),
            Operation::Discard { len: 0, .. } | Operation::WriteZeroes { len: 0, .. } => Some(0),
            _ => None,
        };
        if let Some(written) = immediate {
            self.free.push(slot);
            return self.answer(chain.head, &status, Status::Ok, written);
        }
        let head = chain.head;
        let pending =
            Pending { head, operation, status, moved: 0, restarts: 0, fallback_tried: false };
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
                // A hole reads as zeroes. A block device without unmap does not support PUNCH_HOLE,
                // and some file systems (tmpfs) do not support ZERO_RANGE: then the other one is
                // tried.
                let punch = (*unmap && !self.block_device) != pending.fallback_tried;
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
            tracing::debug!(%error, "io_uring submission is busy");
            poll.reschedule(COMPLETIONS);
        }
    }

    /// Completes finished requests; `true` when there were any: slots have become free, or requests
    /// were restarted and must be submitted.
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

    /// Counts transferred bytes, which the host's page cache may hold now.
    fn count_cached(&mut self, bytes: u64) {
        if self.limits.read_only {
            return;
        }
        self.cache.moved += bytes;
        self.cache.drop_at = Some(Instant::now() + CACHE_IDLE);
        self.cache.drops = 0;
        if self.cache.moved >= CACHE_LIMIT {
            self.drop_cache();
        }
    }

    /// Starts to drop the disk from the host's page cache, if a slot is free.
    fn drop_cache(&mut self) {
        if self.draining || self.cache.slot.is_some() {
            return;
        }
        let (Some(backend), Some(slot)) = (&mut self.backend, self.free.pop()) else { return };
        backend.start(slot, &Io::DropCache, self.queue.mem());
        self.cache.slot = Some(slot);
        self.cache.moved = 0;
    }

    fn is_idle(&self) -> bool {
        self.cache.slot.is_none() && self.slots.iter().all(Option::is_none)
    }

    fn finish(&mut self, Done { slot, result }: Done) {
        if self.cache.slot == Some(slot) {
            self.cache.slot = None;
            self.free.push(slot);
            if let Err(error) = result {
                tracing::debug!(%error, "cannot drop a disk from the host's page cache");
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
                // A device may ignore a discard (section 5.2.6.2).
                Operation::Discard { .. } if is_unsupported(&error) => Status::Ok,
                Operation::WriteZeroes { .. }
                    if is_unsupported(&error) && !pending.fallback_tried =>
                {
                    pending.fallback_tried = true;
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
            self.count_cached(wanted as u64);
        }
        if let (Status::Ok, Operation::Write { data, .. }) = (status, &pending.operation) {
            self.counters.operation(data.len() as u64);
        } else if status == Status::Ok {
            self.counters.operation(written as u64);
        }
        self.complete(pending.head, &pending.status, status, written);
    }

    /// Counts and logs an error of the host (ENOSPC, EIO); the guest gets VIRTIO_BLK_S_IOERR.
    fn host_failed(&mut self, error: &io::Error) -> Status {
        self.counters.error();
        guest_warn!(self.counters.limit, %error, "disk request failed on the host");
        Status::IoError
    }

    /// Completes a request that needed no I/O.
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
    /// Keeps the backend for the next activation, unless requests are still in flight.
    fn drop(&mut self) {
        if self.is_idle() {
            *self.idle_backend.lock().unwrap_or_else(PoisonError::into_inner) = self.backend.take();
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
