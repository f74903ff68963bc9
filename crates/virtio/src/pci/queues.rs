//! Registers of the queues, which the driver writes through the common configuration structure
//! before an engine owns the queues (virtio 1.2, section 4.1.5.1.3).

use virtio_queue::{Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory, Permissions};

#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum QueueError {
    #[error("queue {index}: size {size} is not a power of two up to {max}")]
    Size { index: u16, size: u16, max: u16 },
    #[error("queue {index}: {what} at {addr:#x} is misaligned or outside guest memory")]
    Ring { index: u16, what: &'static str, addr: u64 },
}

/// A queue's registers.
#[derive(Debug, Clone)]
pub(super) struct QueueSetup {
    pub(super) index: u16,
    pub(super) max: u16,
    pub(super) size: u16,
    pub(super) enabled: bool,
    pub(super) desc: u64,
    pub(super) driver: u64,
    pub(super) device: u64,
}

impl QueueSetup {
    pub(super) fn new(index: u16, max: u16) -> Self {
        Self { index, max, size: max, enabled: false, desc: 0, driver: 0, device: 0 }
    }

    /// The queue that these registers describe; not ready if the driver has not enabled it. Fails
    /// if its size is invalid, or an address is misaligned or outside accessible memory.
    pub(super) fn build(
        &self,
        mem: &impl GuestMemory,
        event_idx: bool,
    ) -> Result<Queue, QueueError> {
        let Self { index, max, size, enabled, desc, driver, device } = *self;
        let bad_size = QueueError::Size { index, size, max };
        let mut queue = Queue::new(max).map_err(|_| bad_size)?;
        if !enabled {
            return Ok(queue);
        }
        queue.try_set_size(size).map_err(|_| bad_size)?;
        let ring = |what, addr| QueueError::Ring { index, what, addr };
        // rust-vmm's queue takes address 0 for an unset ring.
        let set = |what, addr: u64, done: Result<(), virtio_queue::Error>| {
            if addr == 0 || done.is_err() { Err(ring(what, addr)) } else { Ok(()) }
        };
        set("descriptor table", desc, queue.try_set_desc_table_address(GuestAddress(desc)))?;
        set("driver ring", driver, queue.try_set_avail_ring_address(GuestAddress(driver)))?;
        set("device ring", device, queue.try_set_used_ring_address(GuestAddress(device)))?;
        let entries = usize::from(size);
        let fits = |addr, len| mem.check_range(GuestAddress(addr), len, Permissions::ReadWrite);
        // Sizes including the event suppression fields (section 2.7).
        if !fits(desc, 16 * entries) {
            return Err(ring("descriptor table", desc));
        }
        if !fits(driver, 6 + 2 * entries) {
            return Err(ring("driver ring", driver));
        }
        if !fits(device, 6 + 8 * entries) {
            return Err(ring("device ring", device));
        }
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}
