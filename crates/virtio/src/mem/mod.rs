//! Memory device (virtio 1.2, section 5.15): a region of guest memory above the boot memory, in
//! which the guest plugs and unplugs as many blocks as the host requests.
//!
//! - [`spec`]: constants of the specification; [`state`]: which blocks are plugged;
//! - [`engine`]: handles the guest's requests.
//!
//! The region has a file of its own. Unplugged blocks are punched out of it, which frees the pages
//! for every process that maps the file. This device does not prevent the guest from touching
//! blocks that are not plugged: the VMM makes the region accessible to guest and devices only as
//! far as it was granted, and every touched page is charged to the pod's cgroup.

mod engine;
mod spec;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use self::engine::MemEngine;
use self::spec::F_UNPLUGGED_INACCESSIBLE;
use self::state::State;
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice, read_config_bytes, take_queues,
};
use crate::features;

/// `block_size`, bytes: a pageblock, the smallest unit that Linux supports.
pub const BLOCK: u64 = 2 << 20;
/// Largest region, bytes; limits the size of the bitmap with one bit per block.
const REGION_MAX: u64 = 16 << 40;

#[derive(Debug, thiserror::Error)]
pub enum MemError {
    #[error("{region:#x?} is not a region of guest memory aligned to blocks of 2 MiB")]
    Region { region: Range<u64> },
    #[error("guest memory at {addr:#x} is not backed by a file")]
    NoFile { addr: u64 },
    #[error("{bytes} bytes are more than the {size} bytes of the region")]
    TooLarge { bytes: u64, size: u64 },
    #[error("cannot create an eventfd")]
    Event(#[from] io::Error),
}

/// The device.
pub struct Mem {
    control: Arc<Control>,
    counters: Arc<DeviceCounters>,
}

/// Resizes the memory; usable after the device was moved into its transport.
#[derive(Debug, Clone)]
pub struct ResizeHandle(Arc<Control>);

/// State shared by device, engine and [`ResizeHandle`].
#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    /// Counts configuration changes that the guest did not cause.
    generation: AtomicU8,
    /// Signalled when the configuration has changed, so that the engine interrupts the driver.
    resized: EventFd,
    /// All guest memory.
    mem: GuestMemoryMmap,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mem {
    /// A device for `region`, which must be one file-backed region of `mem`, aligned to [`BLOCK`].
    pub fn new(mem: &GuestMemoryMmap, region: Range<u64>) -> Result<Self, MemError> {
        let size = region.end.saturating_sub(region.start);
        let aligned = region.start.is_multiple_of(BLOCK) && size.is_multiple_of(BLOCK);
        let found = mem
            .find_region(GuestAddress(region.start))
            .filter(|r| r.start_addr().0 == region.start && r.len() == size)
            .filter(|_| aligned && (1..=REGION_MAX).contains(&size));
        let Some(found) = found else { return Err(MemError::Region { region }) };
        if found.file_offset().is_none() {
            return Err(MemError::NoFile { addr: region.start });
        }
        let control = Control {
            state: Mutex::new(State::new(region)),
            generation: AtomicU8::new(0),
            resized: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            mem: mem.clone(),
        };
        Ok(Self { control: Arc::new(control), counters: Arc::default() })
    }

    pub fn resize_handle(&self) -> ResizeHandle {
        ResizeHandle(self.control.clone())
    }
}

impl ResizeHandle {
    /// Sets `requested_size` to `bytes` and raises `usable_region_size` to at least `usable` bytes;
    /// both are rounded up to blocks. Returns at once; the guest plugs or unplugs later, or does
    /// not. Fails if either is larger than the region.
    pub fn request(&self, bytes: u64, usable: u64) -> Result<(), MemError> {
        let mut state = self.0.state();
        let size = state.size();
        if bytes > size || usable > size {
            return Err(MemError::TooLarge { bytes: bytes.max(usable), size });
        }
        state.resize(bytes.next_multiple_of(BLOCK), usable.next_multiple_of(BLOCK));
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        drop(state);
        // EAGAIN: the counter is full, so the engine is woken anyway.
        let _ = self.0.resized.write(1);
        Ok(())
    }

    /// Whether every block of the region that `part` touches is plugged.
    pub(crate) fn is_plugged(&self, part: &Range<u64>) -> bool {
        self.0.state().is_plugged(part)
    }

    /// `requested_size`, bytes.
    pub fn requested(&self) -> u64 {
        self.0.state().requested()
    }

    /// `plugged_size`, bytes.
    pub fn plugged(&self) -> u64 {
        self.0.state().plugged()
    }
}

impl VirtioDevice for Mem {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Mem
    }

    fn queue_sizes(&self) -> &[u16] {
        &[16]
    }

    fn features(&self) -> u64 {
        features::COMMON | F_UNPLUGGED_INACCESSIBLE
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.control.state().config(), offset, data);
    }

    fn config_generation(&self) -> u8 {
        self.control.generation.load(Ordering::Acquire)
    }

    fn check_saveable(&self) -> Result<(), String> {
        let state = self.control.state();
        match (state.requested(), state.plugged()) {
            (0, 0) => Ok(()),
            (requested, plugged) => {
                Err(format!("{plugged} bytes are plugged and {requested} requested, not 0"))
            }
        }
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let Activation { queues, interrupt, .. } = activation;
        let [queue] = take_queues(queues)?;
        let (control, counters) = (self.control.clone(), self.counters.clone());
        Ok(Box::new(MemEngine::new(queue, interrupt, control, counters)))
    }
}
