//! The driver side of a split queue in plain memory, and a runner that drives an engine without a
//! thread. For tests and fuzz targets.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::epoll::{Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::device::{Activation, Engine, Interrupt, Poll, PollState, VirtioDevice};
use crate::features;
use crate::queue::VirtQueue;

const DESC_NEXT: u16 = 1;
const DESC_WRITE: u16 = 2;
const DESC_INDIRECT: u16 = 4;

/// Memory of the given size at address 0.
pub fn memory(size: usize) -> Arc<GuestMemoryMmap> {
    let ranges = [(GuestAddress(0), size)];
    Arc::new(GuestMemoryMmap::from_ranges(&ranges).expect("anonymous memory"))
}

/// Counts interrupts.
#[derive(Debug, Default)]
pub struct MockInterrupt {
    pub queues: AtomicU64,
    pub configs: AtomicU64,
    pub reset_wanted: AtomicBool,
}

impl Interrupt for MockInterrupt {
    fn queue(&self, _index: u16) {
        self.queues.fetch_add(1, Ordering::AcqRel);
    }

    fn config(&self) {
        self.configs.fetch_add(1, Ordering::AcqRel);
    }

    fn needs_reset(&self) {
        self.reset_wanted.store(true, Ordering::Release);
    }
}

/// The driver side of one queue. At `base`: descriptor table, available ring, used ring, each on a
/// page boundary.
pub struct MockQueue {
    mem: Arc<GuestMemoryMmap>,
    base: u64,
    size: u16,
    free: Vec<u16>,
    /// Descriptors of each chain in flight, by head.
    chains: HashMap<u16, Vec<u16>>,
    next_avail: u16,
    next_used: u16,
    pub kick: EventFd,
}

impl MockQueue {
    pub fn new(mem: Arc<GuestMemoryMmap>, base: u64, size: u16) -> Self {
        Self {
            mem,
            base,
            size,
            free: (0..size).rev().collect(),
            chains: HashMap::new(),
            next_avail: 0,
            next_used: 0,
            kick: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
        }
    }

    pub fn desc(&self) -> u64 {
        self.base
    }

    pub fn driver(&self) -> u64 {
        (self.base + 16 * u64::from(self.size)).next_multiple_of(0x1000)
    }

    pub fn device(&self) -> u64 {
        (self.driver() + 6 + 2 * u64::from(self.size)).next_multiple_of(0x1000)
    }

    /// First address after the rings.
    pub fn end(&self) -> u64 {
        (self.device() + 6 + 8 * u64::from(self.size)).next_multiple_of(0x1000)
    }

    /// The device side.
    pub fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).expect("a power of two");
        queue.try_set_desc_table_address(GuestAddress(self.desc())).expect("aligned");
        queue.try_set_avail_ring_address(GuestAddress(self.driver())).expect("aligned");
        queue.try_set_used_ring_address(GuestAddress(self.device())).expect("aligned");
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    /// Number of free descriptors.
    pub fn room(&self) -> usize {
        self.free.len()
    }

    /// Head of the next chain that [`Self::add`] makes available.
    pub fn next_free(&self) -> u16 {
        *self.free.last().expect("a free descriptor")
    }

    /// Makes a chain available: buffers the device reads, then buffers it writes.
    pub fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> u16 {
        let parts: Vec<(u64, u32, u16)> = readable
            .iter()
            .map(|(addr, len)| (*addr, *len, 0))
            .chain(writable.iter().map(|(addr, len)| (*addr, *len, DESC_WRITE)))
            .collect();
        let indices: Vec<u16> =
            parts.iter().map(|_| self.free.pop().expect("a free descriptor")).collect();
        for (n, (addr, len, flags)) in parts.iter().enumerate() {
            let next = indices.get(n + 1).copied();
            let flags = flags | if next.is_some() { DESC_NEXT } else { 0 };
            self.write_desc(indices[n], *addr, *len, flags, next.unwrap_or(0));
        }
        let head = indices[0];
        self.chains.insert(head, indices);
        self.publish(head);
        head
    }

    /// Like [`Self::add`], with an indirect table at the unused address `table`.
    pub fn add_indirect(
        &mut self,
        table: u64,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> u16 {
        let count = readable.len() + writable.len();
        let parts = readable.iter().map(|p| (p, 0)).chain(writable.iter().map(|p| (p, DESC_WRITE)));
        for (n, ((addr, len), flags)) in parts.enumerate() {
            let more = n + 1 < count;
            let flags = flags | if more { DESC_NEXT } else { 0 };
            self.write_raw(table + 16 * n as u64, *addr, *len, flags, n as u16 + 1);
        }
        let head = self.free.pop().expect("a free descriptor");
        self.write_desc(head, table, 16 * count as u32, DESC_INDIRECT, 0);
        self.chains.insert(head, vec![head]);
        self.publish(head);
        head
    }

    /// Writes one entry of the descriptor table, valid or not.
    pub fn write_desc(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        self.write_raw(self.desc() + 16 * u64::from(index), addr, len, flags, next);
    }

    fn write_raw(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut entry = [0; 16];
        entry[..8].copy_from_slice(&addr.to_le_bytes());
        entry[8..12].copy_from_slice(&len.to_le_bytes());
        entry[12..14].copy_from_slice(&flags.to_le_bytes());
        entry[14..].copy_from_slice(&next.to_le_bytes());
        self.mem.write_slice(&entry, GuestAddress(at)).expect("table in memory");
    }

    /// Adds a head to the available ring, valid or not.
    pub fn publish(&mut self, head: u16) {
        let slot = self.driver() + 4 + 2 * u64::from(self.next_avail % self.size);
        self.mem.write_obj(head.to_le(), GuestAddress(slot)).expect("ring in memory");
        self.set_avail(self.next_avail.wrapping_add(1));
    }

    /// Sets the index of the available ring, valid or not.
    pub fn set_avail(&mut self, index: u16) {
        self.next_avail = index;
        let at = GuestAddress(self.driver() + 2);
        self.mem.store(index.to_le(), at, Ordering::Release).expect("ring in memory");
    }

    /// The index of the used ring.
    pub fn used_index(&self) -> u16 {
        let at = GuestAddress(self.device() + 2);
        u16::from_le(self.mem.load(at, Ordering::Acquire).expect("ring in memory"))
    }

    /// Used chains that [`Self::used`] has not returned yet.
    pub fn unread(&self) -> u16 {
        self.used_index().wrapping_sub(self.next_used)
    }

    /// The next used chain: its head and the number of bytes written.
    pub fn used(&mut self) -> Option<(u16, u32)> {
        if self.unread() == 0 {
            return None;
        }
        let at = self.device() + 4 + 8 * u64::from(self.next_used % self.size);
        let entry: [u32; 2] = self.mem.read_obj(GuestAddress(at)).expect("ring in memory");
        self.next_used = self.next_used.wrapping_add(1);
        // An interrupt for the next used chain.
        self.set_used_event(self.next_used);
        let head = u32::from_le(entry[0]) as u16;
        if let Some(indices) = self.chains.remove(&head) {
            self.free.extend(indices);
        }
        Some((head, u32::from_le(entry[1])))
    }

    pub fn kick(&self) {
        self.kick.write(1).expect("eventfd");
    }

    /// Kicks if the device asks for it after the last [`Self::add`], like a driver with EVENT_IDX
    /// that adds one chain at a time (section 2.7.10); whether it did.
    pub fn notify(&self) -> bool {
        let at = GuestAddress(self.device() + 4 + 8 * u64::from(self.size));
        let event: u16 = self.mem.load(at, Ordering::SeqCst).expect("ring in memory");
        let wanted = u16::from_le(event) == self.next_avail.wrapping_sub(1);
        if wanted {
            self.kick();
        }
        wanted
    }

    /// With EVENT_IDX: the used index whose chain is to cause an interrupt.
    pub fn set_used_event(&self, index: u16) {
        let at = GuestAddress(self.driver() + 4 + 2 * u64::from(self.size));
        self.mem.write_obj(index.to_le(), at).expect("ring in memory");
    }

    /// The flags of the available ring; without EVENT_IDX, 1 suppresses interrupts.
    pub fn set_flags(&self, flags: u16) {
        self.mem.write_obj(flags.to_le(), GuestAddress(self.driver())).expect("ring in memory");
    }
}

/// Queues for a device, one after the other from `base` on.
pub fn queues(mem: &Arc<GuestMemoryMmap>, base: u64, sizes: &[u16]) -> Vec<MockQueue> {
    let mut at = base;
    let mut made = Vec::new();
    for size in sizes {
        let queue = MockQueue::new(mem.clone(), at, *size);
        at = queue.end();
        made.push(queue);
    }
    made
}

/// An activation with these queues.
pub fn activation(
    device: &dyn VirtioDevice,
    queues: &[MockQueue],
    interrupt: Arc<dyn Interrupt>,
    features: u64,
) -> Activation {
    let event_idx = features & features::RING_EVENT_IDX != 0;
    let virt = (0..).zip(queues).map(|(index, queue)| {
        VirtQueue::new(
            index,
            queue.queue(event_idx),
            queue.kick.try_clone().expect("eventfd"),
            queue.mem.clone(),
            interrupt.clone(),
            device.counters(),
        )
    });
    Activation { queues: virt.collect(), interrupt: interrupt.clone(), features }
}

/// Runs one engine on the caller's thread.
pub struct Runner {
    engine: Box<dyn Engine>,
    epoll: Epoll,
    state: PollState,
}

impl Runner {
    pub fn start(mut engine: Box<dyn Engine>) -> io::Result<Self> {
        let epoll = Epoll::new()?;
        let mut state = PollState::default();
        engine.start(&mut Poll::new(&epoll, 0, &mut state))?;
        Ok(Self { engine, epoll, state })
    }

    /// One round of the worker; `false` when nothing was ready within `wait`.
    pub fn round(&mut self, wait: Duration) -> bool {
        let mut events = [EpollEvent::default(); 64];
        let wait = if self.state.rescheduled.is_empty() { wait } else { Duration::ZERO };
        let count = self.epoll.wait(wait.as_millis() as i32, &mut events).unwrap_or(0);
        let rescheduled = std::mem::take(&mut self.state.rescheduled);
        let idle = rescheduled.is_empty() && count == 0;
        for token in rescheduled {
            let mut poll = Poll::new(&self.epoll, 0, &mut self.state);
            self.engine.handle(token, EventSet::empty(), &mut poll);
        }
        for event in &events[..count] {
            let mut poll = Poll::new(&self.epoll, 0, &mut self.state);
            self.engine.handle(event.data() as u32, event.event_set(), &mut poll);
        }
        let now = Instant::now();
        if self.engine.deadline().is_some_and(|at| at <= now) {
            self.engine.tick(now, &mut Poll::new(&self.epoll, 0, &mut self.state));
        }
        !idle
    }

    /// Runs until nothing is ready, at most `rounds` rounds; `false` if something is still ready.
    pub fn settle(&mut self, rounds: usize) -> bool {
        (0..rounds).any(|_| !self.round(Duration::ZERO))
    }

    /// Runs until `done` returns `true`; `false` after ten seconds.
    pub fn until(&mut self, mut done: impl FnMut() -> bool) -> bool {
        let end = Instant::now() + Duration::from_secs(10);
        while !done() {
            if Instant::now() >= end {
                return false;
            }
            self.round(Duration::from_millis(5));
        }
        true
    }

    pub fn resume(&mut self) {
        self.engine.resume(&mut Poll::new(&self.epoll, 0, &mut self.state));
    }

    pub fn engine(&mut self) -> &mut dyn Engine {
        &mut *self.engine
    }
}
