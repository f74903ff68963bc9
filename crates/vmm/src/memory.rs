//! Memory hotplug of the VM: the granted part of the hotplug region, the requested size, and the
//! size that the guest has plugged.

use std::sync::{Mutex, PoisonError};

use machine::vm::HotplugRegion;
use virtio::Granted;
use virtio::mem::ResizeHandle;
use vmm_api::Error;

const MIB: u64 = 1 << 20;

/// Boot memory and hotplug memory of the VM.
#[derive(Debug)]
pub(crate) struct Memory {
    boot_mib: u32,
    hotplug: Option<Hotplug>,
}

#[derive(Debug)]
pub(crate) struct Hotplug {
    /// Most hotplug memory.
    pub(crate) limit_mib: u32,
    pub(crate) region: Mutex<HotplugRegion>,
    /// The granted part, as devices see it.
    pub(crate) granted: Granted,
    pub(crate) device: ResizeHandle,
    /// Unit in which the guest's kernel adds memory, bytes.
    pub(crate) block: u64,
}

impl Memory {
    pub(crate) fn new(boot_mib: u32, hotplug: Option<Hotplug>) -> Self {
        Self { boot_mib, hotplug }
    }

    /// Requests that the guest has `memory_mib` in all, at least the boot memory. Returns at once.
    /// Fails if that is more than [`Self::max_mib`] or the region cannot be granted.
    pub(crate) fn resize(&self, memory_mib: u32) -> Result<(), Error> {
        let limit_mib = self.max_mib();
        if memory_mib > limit_mib {
            return Err(Error::Memory { memory_mib, limit_mib });
        }
        let Some(Hotplug { region, granted, device, block, .. }) = &self.hotplug else {
            return Ok(());
        };
        let bytes = u64::from(memory_mib.saturating_sub(self.boot_mib)) * MIB;
        // The region has whole blocks, and the limit lies within it.
        let usable = bytes.next_multiple_of(*block);
        let mut region = region.lock().unwrap_or_else(PoisonError::into_inner);
        region.grant(usable).map_err(|e| Error::Failed { message: crate::chain(&e) })?;
        granted.grant(region.granted());
        device.request(bytes, usable).map_err(|e| Error::Failed { message: crate::chain(&e) })
    }

    /// Most memory that can be requested.
    pub(crate) fn max_mib(&self) -> u32 {
        self.boot_mib + self.hotplug.as_ref().map_or(0, |hotplug| hotplug.limit_mib)
    }

    /// Requested memory.
    pub(crate) fn requested_mib(&self) -> u32 {
        self.boot_mib + self.hotplug.as_ref().map_or(0, |g| mib(g.device.requested()))
    }

    /// Boot memory plus plugged memory.
    pub(crate) fn plugged_mib(&self) -> u32 {
        self.boot_mib + self.hotplug.as_ref().map_or(0, |g| mib(g.device.plugged()))
    }
}

/// Bytes as MiB; the size of the hotplug region in MiB fits into 32 bits.
fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes / MIB).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_without_a_hotplug_region_keeps_its_boot_memory() {
        let memory = Memory::new(256, None);
        memory.resize(256).unwrap();
        memory.resize(100).unwrap();
        let all = (memory.max_mib(), memory.requested_mib(), memory.plugged_mib());
        assert_eq!(all, (256, 256, 256));
        let refused = memory.resize(257).unwrap_err();
        assert_eq!(refused, Error::Memory { memory_mib: 257, limit_mib: 256 });
    }
}
