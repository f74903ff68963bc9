//! A split virtqueue for engines (virtio 1.2, section 2.7), built on rust-vmm's `Queue`.
//!
//! [`VirtQueue::pop`] returns checked chains ([`Chain`]). Malformed chains are returned to the
//! driver with length 0 and counted. An invalid ring (an available index further ahead than the
//! queue size) disables the queue and sets DEVICE_NEEDS_RESET.

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

use crate::chain::Chain;
use crate::device::{DeviceCounters, Interrupt};
use crate::granted::{AccessibleMemory, Granted};
use crate::guest_warn;

/// Malformed chains that one [`VirtQueue::pop`] returns to the driver before it stops for this
/// round.
/// Attack: a ring full of malformed chains, to keep the worker from serving other devices.
const MAX_MALFORMED_PER_POP: usize = 64;

/// Section 2.7.6: the driver wants no interrupt (without EVENT_IDX).
const AVAIL_F_NO_INTERRUPT: u16 = 1;

/// Guest addresses of a queue's areas (section 2.7), checked to lie in guest memory.
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
    mem: AccessibleMemory,
    interrupt: Arc<dyn Interrupt>,
    counters: Arc<DeviceCounters>,
    /// Chains were added to the used ring since the last [`VirtQueue::signal_used`].
    needs_signal: bool,
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
        let mem = AccessibleMemory::new(mem, Granted::all());
        Self { index, queue, kick, mem, interrupt, counters, needs_signal: false, broken }
    }

    /// Limits the queue to granted memory.
    pub fn with_granted(mut self, granted: Granted) -> Self {
        self.mem = AccessibleMemory::new(self.mem.all().clone(), granted);
        self
    }

    /// All guest memory; addresses of a [`Chain`] are checked already.
    pub fn mem(&self) -> &Arc<GuestMemoryMmap> {
        self.mem.all()
    }

    /// Number of entries.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// The rings, for a vhost-user backend; none if the driver has not enabled the queue.
    pub fn rings(&self) -> Option<Rings> {
        let Self { queue, .. } = self;
        queue.ready().then(|| Rings {
            size: queue.size(),
            desc: queue.desc_table(),
            driver: queue.avail_ring(),
            device: queue.used_ring(),
        })
    }

    /// Continues at the used index, after a backend that used all chains in order.
    pub fn resume_at_used_index(&mut self) {
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

    /// The eventfd that the driver's notifications signal.
    pub fn kick(&self) -> &EventFd {
        &self.kick
    }

    /// File descriptor of [`Self::kick`], for epoll.
    pub fn kick_fd(&self) -> RawFd {
        self.kick.as_raw_fd()
    }

    /// Clears the kick eventfd; a call without a kick has no effect.
    pub fn clear_kick(&self) {
        let _ = self.kick.read();
    }

    /// The next available chain; none if there is none or the queue is disabled.
    pub fn pop(&mut self) -> Option<Chain> {
        for _ in 0..MAX_MALFORMED_PER_POP {
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

    /// Calls `each` for up to `budget` chains; it returns the number of bytes it wrote. `true`:
    /// more chains may be available.
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
        self.signal_used();
        more
    }

    /// Undoes the last [`Self::pop`]: the chain is available again.
    pub fn unpop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Adds a chain to the used ring, with `written` bytes in its writable part.
    pub fn push(&mut self, head: u16, written: u32) {
        if self.broken {
            return;
        }
        match self.queue.add_used(&self.mem, head, written) {
            Ok(()) => self.needs_signal = true,
            Err(error) => self.fail(&error),
        }
    }

    /// Interrupts the driver if chains were used and it has not suppressed the notification
    /// (sections 2.7.7 and 2.7.10).
    pub fn signal_used(&mut self) {
        if self.broken || !std::mem::take(&mut self.needs_signal) {
            return;
        }
        // It has a fence between the used ring and what is read here.
        let wanted = match self.queue.needs_notification(&self.mem) {
            Ok(true) if !self.queue.event_idx_enabled() => self.flags_want_interrupt(),
            other => other,
        };
        match wanted {
            Ok(true) => self.interrupt.queue(self.index),
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// The available ring's flags, which rust-vmm's queue does not read.
    fn flags_want_interrupt(&self) -> Result<bool, virtio_queue::Error> {
        let at = GuestAddress(self.queue.avail_ring());
        let flags = self.mem.load::<u16>(at, Ordering::Relaxed);
        let flags = flags.map_err(virtio_queue::Error::GuestMemory)?;
        Ok(u16::from_le(flags) & AVAIL_F_NO_INTERRUPT == 0)
    }

    /// Suppresses kicks while the queue is processed.
    pub fn disable_kicks(&mut self) {
        if !self.broken
            && let Err(error) = self.queue.disable_notification(&self.mem)
        {
            self.fail(&error);
        }
    }

    /// Enables kicks. `true`: a chain became available meanwhile, for which no kick may come.
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
        guest_warn!(self.counters.limit, queue, %error, "invalid ring; the device needs a reset");
        self.interrupt.needs_reset();
    }
}
