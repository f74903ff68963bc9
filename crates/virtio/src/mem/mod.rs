//! Memory device (virtio 1.2, section 5.15): a region of guest memory above what the VM was started
//! with, of which the guest plugs in and out as many blocks as the host asks for.
//!
//! - [`spec`]: the specification's numbers; [`state`]: which blocks are plugged;
//! - [`engine`]: the guest's requests.
//!
//! The region lies in a file of its own; what the guest unplugs is punched out of it, which takes
//! the pages from everybody who has the file mapped. Nothing here keeps a guest from touching blocks
//! it has not plugged: that the region is visible to it and to devices no further than it was ever
//! granted is the VM's affair, and the pod's cgroup counts every page.

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

/// What is plugged and unplugged at a time: a page block of Linux, the least it can do.
pub const BLOCK: u64 = 2 << 20;
/// Largest region; its map has a bit a block.
const REGION_MAX: u64 = 16 << 40;

#[derive(Debug, thiserror::Error)]
pub enum MemError {
    #[error("{region:#x?} is not a region of guest memory that begins and ends at blocks of 2 MiB")]
    Region { region: Range<u64> },
    #[error("guest memory at {addr:#x} has no file to take pages from")]
    NoFile { addr: u64 },
    #[error("{bytes} bytes are more than the {size} bytes of the region")]
    TooLarge { bytes: u64, size: u64 },
    #[error("eventfd")]
    Event(#[from] io::Error),
}

/// The device.
pub struct Mem {
    control: Arc<Control>,
    counters: Arc<DeviceCounters>,
}

/// How the host resizes; outlives the device's move into its transport.
#[derive(Debug, Clone)]
pub struct Resize(Arc<Control>);

/// What device, engine and host share.
#[derive(Debug)]
struct Control {
    state: Mutex<State>,
    /// Counts changes of the configuration that the guest did not bring about itself.
    generation: AtomicU8,
    /// Tells the engine to tell the driver.
    resized: EventFd,
    /// What the region is part of.
    mem: GuestMemoryMmap,
}

impl Control {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Mem {
    /// A device for `region`, which is one region of `mem` with a file behind it.
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

    pub fn resize(&self) -> Resize {
        Resize(self.control.clone())
    }
}

impl Resize {
    /// Asks the guest to have `bytes` plugged, from the first `usable` bytes of the region or from
    /// what it was allowed earlier. Answers at once; the guest follows, or does not.
    pub fn ask(&self, bytes: u64, usable: u64) -> Result<(), MemError> {
        let mut state = self.0.state();
        let size = state.size();
        if bytes > size || usable > size {
            return Err(MemError::TooLarge { bytes: bytes.max(usable), size });
        }
        state.resize(bytes.next_multiple_of(BLOCK), usable.next_multiple_of(BLOCK));
        self.0.generation.fetch_add(1, Ordering::AcqRel);
        drop(state);
        // A counter that is full wakes the engine as well.
        let _ = self.0.resized.write(1);
        Ok(())
    }

    /// Whether the guest may use `part`, as far as the region is concerned: what lies in it is plugged.
    pub(crate) fn has(&self, part: &Range<u64>) -> bool {
        self.0.state().is_plugged(part)
    }

    /// Bytes that were asked for.
    pub fn requested(&self) -> u64 {
        self.0.state().requested()
    }

    /// Bytes that the guest has plugged.
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
