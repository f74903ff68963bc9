//! The guest memory that devices may touch. A guest has room to grow that is part of its memory map
//! from the start, but is opened to it, and to this process, only as far as it was granted.
//! Attack: a ring or a buffer in the rest, to end the VMM by SIGSEGV.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// How much of the room to grow was granted; shared by all devices and whoever grants. It only
/// grows, so what was found granted once stays so.
#[derive(Debug, Clone, Default)]
pub struct Granted(Option<Arc<Room>>);

#[derive(Debug)]
struct Room {
    range: Range<u64>,
    /// End of the part that was granted, an address.
    end: AtomicU64,
}

impl Granted {
    /// All memory is open.
    pub fn everything() -> Self {
        Self::default()
    }

    /// All memory is open except `room`, of which nothing is.
    pub fn without(room: Range<u64>) -> Self {
        let end = AtomicU64::new(room.start);
        Self(Some(Arc::new(Room { range: room, end })))
    }

    /// The first `bytes` of the room are open from now on. They have to be mapped already.
    pub fn grant(&self, bytes: u64) {
        let Some(room) = &self.0 else { return };
        let end = room.range.start.saturating_add(bytes).min(room.range.end);
        room.end.fetch_max(end, Ordering::AcqRel);
    }

    /// Whether none of these bytes lies in what was not granted.
    pub fn allows(&self, addr: u64, len: usize) -> bool {
        let Some(room) = &self.0 else { return true };
        let Some(end) = addr.checked_add(len as u64) else { return false };
        let closed = room.end.load(Ordering::Acquire)..room.range.end;
        end <= closed.start || addr >= closed.end
    }
}

/// Guest memory as far as it is open: what the code that walks rings reads and writes through.
#[derive(Debug, Clone)]
pub(crate) struct OpenMemory {
    mem: Arc<GuestMemoryMmap>,
    granted: Granted,
}

impl OpenMemory {
    pub(crate) fn new(mem: Arc<GuestMemoryMmap>, granted: Granted) -> Self {
        Self { mem, granted }
    }

    /// All of it, for addresses that were found to be open.
    pub(crate) fn all(&self) -> &Arc<GuestMemoryMmap> {
        &self.mem
    }
}

impl GuestMemory for OpenMemory {
    type PhysicalMemory = GuestMemoryMmap;
    type Bitmap = ();

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.granted.allows(addr.0, count) && self.mem.check_range(addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>, Error> {
        if !self.granted.allows(addr.0, count) {
            return Err(Error::InvalidGuestAddress(addr));
        }
        GuestMemory::get_slices(&*self.mem, addr, count, access)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_room_is_closed_beyond_what_was_granted_and_nothing_else_is() {
        let granted = Granted::without(0x1000..0x4000);
        let all = [(0, 0x1000), (0xfff, 2), (0x1000, 1), (0x3fff, 1), (0x4000, 8), (u64::MAX, 2)];
        let allowed = |granted: &Granted| all.map(|(addr, len)| granted.allows(addr, len));
        assert_eq!(allowed(&granted), [true, false, false, false, true, false]);
        granted.grant(0x1000);
        assert!(granted.allows(0x1000, 0x1000) && !granted.allows(0x1000, 0x1001));
        granted.grant(1);
        assert!(granted.allows(0x1fff, 1), "what was granted stays");
        granted.grant(u64::MAX);
        assert_eq!(allowed(&granted), [true, true, true, true, true, false]);
        assert!(Granted::everything().allows(u64::MAX, 2));
    }
}
