//! The VM's memory as it grows and shrinks: what was granted by KVM, what was asked of the guest,
//! what the guest has done about it.

use std::sync::{Mutex, PoisonError};

use machine::vm::Room;
use virtio::Granted;
use virtio::mem::Resize;
use vmm_api::Error;

const MIB: u64 = 1 << 20;

/// What the VM was started with, and what it can have beyond that.
#[derive(Debug)]
pub(crate) struct Memory {
    boot_mib: u32,
    growth: Option<Growth>,
}

#[derive(Debug)]
pub(crate) struct Growth {
    /// Beyond what the VM was started with.
    pub(crate) limit_mib: u32,
    pub(crate) room: Mutex<Room>,
    /// The same, for devices.
    pub(crate) granted: Granted,
    pub(crate) device: Resize,
    /// What the guest's kernel adds memory by, bytes.
    pub(crate) block: u64,
}

impl Memory {
    pub(crate) fn new(boot_mib: u32, growth: Option<Growth>) -> Self {
        Self { boot_mib, growth }
    }

    /// Asks the guest to have `memory_mib` in all, or what it was started with if that is more.
    pub(crate) fn resize(&self, memory_mib: u32) -> Result<(), Error> {
        let limit_mib = self.max_mib();
        if memory_mib > limit_mib {
            return Err(Error::Memory { memory_mib, limit_mib });
        }
        let Some(Growth { room, granted, device, block, .. }) = &self.growth else { return Ok(()) };
        let bytes = u64::from(memory_mib.saturating_sub(self.boot_mib)) * MIB;
        // The room is whole blocks, and the limit lies in it.
        let usable = bytes.next_multiple_of(*block);
        let mut room = room.lock().unwrap_or_else(PoisonError::into_inner);
        room.grant(usable).map_err(|e| Error::Failed { message: crate::chain(&e) })?;
        granted.grant(room.granted());
        device.ask(bytes, usable).map_err(|e| Error::Failed { message: crate::chain(&e) })
    }

    /// The most that can be asked for.
    pub(crate) fn max_mib(&self) -> u32 {
        self.boot_mib + self.growth.as_ref().map_or(0, |growth| growth.limit_mib)
    }

    /// What was asked for.
    pub(crate) fn wanted_mib(&self) -> u32 {
        self.boot_mib + self.growth.as_ref().map_or(0, |g| mib(g.device.requested()))
    }

    /// What the guest has.
    pub(crate) fn plugged_mib(&self) -> u32 {
        self.boot_mib + self.growth.as_ref().map_or(0, |g| mib(g.device.plugged()))
    }
}

/// Of a size that lies in the room, whose limit is 32 bits of MiB.
fn mib(bytes: u64) -> u32 {
    u32::try_from(bytes / MIB).unwrap_or(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vm_without_room_has_what_it_was_started_with_and_is_given_no_more() {
        let memory = Memory::new(256, None);
        memory.resize(256).unwrap();
        memory.resize(100).unwrap();
        let all = (memory.max_mib(), memory.wanted_mib(), memory.plugged_mib());
        assert_eq!(all, (256, 256, 256));
        let refused = memory.resize(257).unwrap_err();
        assert_eq!(refused, Error::Memory { memory_mib: 257, limit_mib: 256 });
    }
}
