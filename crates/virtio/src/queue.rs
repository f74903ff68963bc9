//! A split virtqueue for engines (virtio 1.2, section 2.7), built on rust-vmm's `Queue`.
//!
//! [`VirtQueue::pop`] returns checked chains ([`Chain`]). Malformed chains are returned to the
//! driver with length 0 and counted. An invalid ring (an available index further ahead than the
//! queue size) disables the queue and sets DEVICE_NEEDS_RESET.
//!
//! The used ring is written here, because `Queue::add_used` publishes each element on its own and
//! buffers of one packet have to be published together.

#[cfg(test)]
mod tests;

use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress, GuestMemoryMmap};
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

/// Bytes of an available or used ring before its elements: `flags` and `idx` (sections 2.7.6 and
/// 2.7.8).
const RING_HEADER: u64 = 4;
/// Offset of a ring's `idx`.
const RING_IDX: u64 = 2;
/// Bytes of an element of the available ring.
const AVAIL_ELEMENT: u64 = 2;
/// Bytes of an element of the used ring.
const USED_ELEMENT: u64 = 8;

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
    /// Chains added to the used ring since the last [`VirtQueue::signal_used`].
    unsignalled: u32,
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
        Self { index, queue, kick, mem, interrupt, counters, unsignalled: 0, broken }
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

    /// The ring is invalid, or the driver has not enabled the queue. The device has no right to the
    /// buffers of its chains any more.
    pub fn is_broken(&self) -> bool {
        self.broken
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
        self.push_all([(head, written)]);
    }

    /// Adds chains to the used ring in this order, each with the number of bytes in its writable
    /// part. The driver sees all of them or none, as section 5.1.6.4 requires for the buffers of one
    /// packet.
    pub fn push_all(&mut self, used: impl IntoIterator<Item = (u16, u32)>) {
        if !self.broken
            && let Err(error) = self.add_used(used)
        {
            self.fail(&error);
        }
    }

    /// Writes the elements, then the index that makes them visible.
    fn add_used(
        &mut self,
        used: impl IntoIterator<Item = (u16, u32)>,
    ) -> Result<(), virtio_queue::Error> {
        let (size, ring) = (self.queue.size(), self.queue.used_ring());
        let mut next = self.queue.next_used();
        let mut count = 0;
        for (head, written) in used {
            if head >= size {
                return Err(virtio_queue::Error::InvalidDescriptorIndex);
            }
            let at = address(ring, RING_HEADER + USED_ELEMENT * u64::from(next % size))?;
            let element = [u32::from(head).to_le(), written.to_le()];
            self.mem.write_obj(element, at).map_err(virtio_queue::Error::GuestMemory)?;
            next = next.wrapping_add(1);
            count += 1;
        }
        // Release: the elements and the buffers are written before.
        let stored = self.mem.store(next.to_le(), address(ring, RING_IDX)?, Ordering::Release);
        stored.map_err(virtio_queue::Error::GuestMemory)?;
        self.queue.set_next_used(next);
        self.unsignalled = self.unsignalled.saturating_add(count);
        Ok(())
    }

    /// Interrupts the driver if chains were used and it has not suppressed the notification
    /// (sections 2.7.7 and 2.7.10).
    pub fn signal_used(&mut self) {
        let added = std::mem::take(&mut self.unsignalled);
        if self.broken || added == 0 {
            return;
        }
        // The used index is written before `used_event` or `flags` is read; the driver writes
        // these before it reads the used index.
        fence(Ordering::SeqCst);
        let wanted = if self.queue.event_idx_enabled() {
            self.used_event().map(|event| {
                let since = self.queue.next_used().wrapping_sub(event).wrapping_sub(1);
                u32::from(since) < added
            })
        } else {
            self.avail_flags().map(|flags| flags & AVAIL_F_NO_INTERRUPT == 0)
        };
        match wanted {
            Ok(true) => self.interrupt.queue(self.index),
            Ok(false) => {}
            Err(error) => self.fail(&error),
        }
    }

    /// `used_event` of the available ring: the used index whose chain is to cause an interrupt.
    fn used_event(&self) -> Result<u16, virtio_queue::Error> {
        self.read_driver_area(RING_HEADER + AVAIL_ELEMENT * u64::from(self.queue.size()))
    }

    /// `flags` of the available ring.
    fn avail_flags(&self) -> Result<u16, virtio_queue::Error> {
        self.read_driver_area(0)
    }

    fn read_driver_area(&self, offset: u64) -> Result<u16, virtio_queue::Error> {
        let at = address(self.queue.avail_ring(), offset)?;
        let value = self.mem.load::<u16>(at, Ordering::Relaxed);
        value.map(u16::from_le).map_err(virtio_queue::Error::GuestMemory)
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

/// The address `offset` bytes after the start of a ring.
fn address(ring: u64, offset: u64) -> Result<GuestAddress, virtio_queue::Error> {
    GuestAddress(ring).checked_add(offset).ok_or(virtio_queue::Error::AddressOverflow)
}
