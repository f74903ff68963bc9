//! The guest memory that devices may access.
//!
//! The hotplug region is part of the guest memory map from the start, but is mapped accessible to
//! the guest and to this process only as far as it was granted.
//! Attack: a ring or a buffer in the rest of the region, to end the VMM with SIGSEGV.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{Error, GuestMemorySliceIterator};
use vm_memory::{GuestAddress, GuestMemory, GuestMemoryMmap, Permissions};

/// How much of the hotplug region is granted; shared by all devices. It only grows, so an address
/// that was found granted stays granted.
#[derive(Debug, Clone, Default)]
pub struct Granted(Option<Arc<Hotplug>>);

#[derive(Debug)]
struct Hotplug {
    range: Range<u64>,
    /// End address of the granted part.
    end: AtomicU64,
}

impl Granted {
    /// All memory is accessible: there is no hotplug region.
    pub fn all() -> Self {
        Self::default()
    }

    /// All memory is accessible except the hotplug region `range`, of which nothing is granted yet.
    pub fn with_hotplug(range: Range<u64>) -> Self {
        let end = AtomicU64::new(range.start);
        Self(Some(Arc::new(Hotplug { range, end })))
    }

    /// Grants the first `bytes` of the hotplug region, which must be mapped accessible already.
    pub fn grant(&self, bytes: u64) {
        let Some(hotplug) = &self.0 else { return };
        let end = hotplug.range.start.saturating_add(bytes).min(hotplug.range.end);
        hotplug.end.fetch_max(end, Ordering::AcqRel);
    }

    /// Whether none of these bytes lies in the part that is not granted.
    pub fn allows(&self, addr: u64, len: usize) -> bool {
        let Some(hotplug) = &self.0 else { return true };
        let Some(end) = addr.checked_add(len as u64) else { return false };
        let denied = hotplug.end.load(Ordering::Acquire)..hotplug.range.end;
        end <= denied.start || addr >= denied.end
    }
}

/// The accessible part of guest memory, through which rings are read and written.
#[derive(Debug, Clone)]
pub(crate) struct AccessibleMemory {
    mem: Arc<GuestMemoryMmap>,
    granted: Granted,
}

impl AccessibleMemory {
    pub(crate) fn new(mem: Arc<GuestMemoryMmap>, granted: Granted) -> Self {
        Self { mem, granted }
    }

    /// All guest memory, for addresses that were already checked.
    pub(crate) fn all(&self) -> &Arc<GuestMemoryMmap> {
        &self.mem
    }
}

impl GuestMemory for AccessibleMemory {
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
    fn only_the_part_of_the_hotplug_region_that_is_not_granted_is_denied() {
        let granted = Granted::with_hotplug(0x1000..0x4000);
        let all = [(0, 0x1000), (0xfff, 2), (0x1000, 1), (0x3fff, 1), (0x4000, 8), (u64::MAX, 2)];
        let allowed = |granted: &Granted| all.map(|(addr, len)| granted.allows(addr, len));
        assert_eq!(allowed(&granted), [true, false, false, false, true, false]);
        granted.grant(0x1000);
        assert!(granted.allows(0x1000, 0x1000) && !granted.allows(0x1000, 0x1001));
        granted.grant(1);
        assert!(granted.allows(0x1fff, 1), "a grant is never reduced");
        granted.grant(u64::MAX);
        assert_eq!(allowed(&granted), [true, true, true, true, true, false]);
        assert!(Granted::all().allows(u64::MAX, 2));
    }
}
