//! A split virtqueue as an engine uses it (virtio 1.2, section 2.7), around rust-vmm's `Queue`.
//!
//! Chains come out checked ([`Chain`]); malformed ones are handed back unused and counted; a ring
//! that cannot be right (an available index further ahead than the queue is long) breaks the queue
//! and sets DEVICE_NEEDS_RESET.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::EventFd;

use crate::chain::Chain;
use crate::device::{DeviceCounters, Interrupt};
use crate::granted::{Granted, OpenMemory};
use crate::guest_warn;

/// Malformed chains that one [`VirtQueue::pop`] hands back before it gives up for this round.
/// Attack: a ring full of rubbish, to keep the worker from serving other devices.
const MAX_BAD_A_POP: usize = 64;

/// Where a queue's parts stand in guest memory, known to lie in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rings {
    pub size: u16,
    pub desc: u64,
    pub driver: u64,
    pub device: u64,
}

/// One queue of an active device.
pub struct VirtQueue {
    index: u16,
    queue: Queue,
    kick: EventFd,
    mem: OpenMemory,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<DeviceCounters>,
    /// Used buffers the driver has not been told of.
    unannounced: bool,
    broken: bool,
}

impl VirtQueue {
    pub fn new(
        index: u16,
        queue: Queue,
        kick: EventFd,
        mem: Arc<GuestMemoryMmap>,
        interrupt: Arc<dyn Interrupt>,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        let broken = !queue.ready();
        let mem = OpenMemory::new(mem, Granted::everything());
        Self { index, queue, kick, mem, interrupt, counters, unannounced: false, broken }
    }

    /// Touches no memory but what was granted.
    pub fn within(mut self, granted: Granted) -> Self {
        self.mem = OpenMemory::new(self.mem.all().clone(), granted);
        self
    }

    pub fn mem(&self) -> &Arc<GuestMemoryMmap> {
        self.mem.all()
    }

    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The rings, for whoever serves them in place of this; none if the driver does not use them.
    pub fn rings(&self) -> Option<Rings> {
        let Self { queue, .. } = self;
        queue.ready().then(|| Rings {
            size: queue.size(),
            desc: queue.desc_table(),
            driver: queue.avail_ring(),
            device: queue.used_ring(),
        })
    }

    /// Goes on where somebody else stopped who used every chain in order.
    pub fn take_over(&mut self) {
        if self.broken {
            return;
        }
        match self.queue.used_idx(&self.mem, Ordering::Acquire) {
            Ok(used) => {
                self.queue.set_next_used(used.0);
                self.queue.set_next_avail(used.0);
            }
            Err(error) => self.fail(&error),
        }
    }

    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// Becomes readable when the driver kicks.
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Takes a kick note of; spurious calls do no harm.
    pub fn clear_kick(&self) {
        let _ = self.kick.read();
    }

    /// The next chain the driver has made available.
    pub fn pop(&mut self) -> Option<Chain> {
        for _ in 0..MAX_BAD_A_POP {
            if self.broken {
                return None;
            }
            let next = match self.queue.iter(&self.mem) {
                Ok(mut available) => available.next(),
                Err(error) => {
                    self.fail(&error);
                    return None;
                }
            };
            let descriptors = next?;
            let head = descriptors.head_index();
            match Chain::read(&self.mem, descriptors) {
                Ok(chain) => return Some(chain),
                Err(error) => {
                    self.counters.error();
                    let queue = self.index;
                    guest_warn!(self.counters.limit, queue, %error, "malformed chain");
                    self.push(head, 0);
                }
            }
        }
        None
    }

    /// Lets `each` work on up to `budget` chains; what it returns is the number of bytes it wrote.
    /// `true` when there is (or may be) more to do.
    pub fn serve(&mut self, budget: usize, mut each: impl FnMut(&Chain) -> u32) -> bool {
        self.disable_kicks();
        let mut more = true;
        for _ in 0..budget {
            if let Some(chain) = self.pop() {
                let written = each(&chain);
                self.push(chain.head, written);
            } else {
                more = self.enable_kicks();
                if !more {
                    break;
                }
            }
        }
        self.announce();
        more
    }

    /// Takes back the last [`Self::pop`]: the chain stays available.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Hands a chain back with `written` bytes in its writable part.
    pub fn push(&mut self, head: u16, written: u32) {
        if self.broken {
            return;
        }
        match self.queue.add_used(&self.mem, head, written) {
            Ok(()) => self.unannounced = true,
            Err(error) => self.fail(&error),
        }
    }

    /// Interrupts the driver if there is something new and it wants to know.
    pub fn announce(&mut self) {
        if self.broken || !std::mem::take(&mut self.unannounced) {
            return;
        }
        match self.queue.needs_notification(&self.mem) {
            Ok(true) => self.interrupt.queue(self.index),
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// Asks for no kicks while the queue is being worked on.
    pub fn disable_kicks(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(&self.mem)
        {
            self.fail(&error);
        }
    }

    /// Asks for kicks; `true` if something has become available meanwhile, for which there may be
    /// none.
    pub fn enable_kicks(&mut self) -> bool {
        if self.broken {
            return false;
        }
        match self.queue.enable_notification(&self.mem) {
            Ok(more) => more,
            Err(error) => {
                self.fail(&error);
                false
            }
        }
    }

    fn fail(&mut self, error: &virtio_queue::Error) {
        self.broken = true;
        self.counters.error();
        let queue = self.index;
        guest_warn!(self.counters.limit, queue, %error, "queue is broken; driver must reset");
        self.interrupt.needs_reset();
    }
}
