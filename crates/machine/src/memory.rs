//! Guest RAM: one memfd, mapped shared, in one or two pieces; one more for the room to grow.
//!
//! Shared and from a memfd rather than anonymous: a template's memory can be mapped privately by
//! others later, and a device in another process can be given the descriptor. Reserved in no way
//! (`MAP_NORESERVE`; tmpfs takes pages on first touch), so only touched pages cost anything. Left
//! out of core dumps: it is the tenant's data.
//!
//! Huge pages are asked for, and it is the operator who grants them: `shmem_enabled` is `never` on
//! most hosts, `advise` lets this advice count. Measured for a lean kernel up to its init: 9,300
//! exits become 2,050 and the boot takes half the time, for 39 instead of 32 MiB of touched memory.
#![allow(unsafe_code)] // madvise and mprotect take raw addresses

use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::mmap::{MmapRegionBuilder, MmapRegionError};
use vm_memory::{
    FileOffset, GuestAddress, GuestMemoryBackend, GuestRegionCollectionError, GuestRegionMmap,
    MmapRegion,
};

use crate::Ram;
use crate::layout::Layout;

#[derive(Debug, thiserror::Error)]
pub enum MemoryError {
    #[error("cannot create a memfd of {size} bytes for the guest's memory")]
    Memfd { size: u64, source: io::Error },
    #[error("cannot map {size} bytes of guest memory")]
    Map { size: u64, source: MmapRegionError },
    #[error("cannot advise the kernel about guest memory")]
    Advise(#[source] Errno),
    #[error("{part:#x?} is no guest memory")]
    NotRam { part: Range<u64> },
    #[error("cannot open {part:#x?} of guest memory to devices")]
    Open { part: Range<u64>, source: Errno },
    #[error("guest memory does not form an address space")]
    Collection(#[from] GuestRegionCollectionError),
}

/// Creates the memfd and maps it as `layout` says.
pub fn allocate(layout: &Layout) -> Result<Ram, MemoryError> {
    let size = layout.ram.iter().map(|piece| piece.end - piece.start).sum();
    let file = memfd(size).map_err(|source| MemoryError::Memfd { size, source })?;
    let file = Arc::new(file);
    let mut offset = 0;
    let mut regions = Vec::new();
    for piece in &layout.ram {
        regions.push(map(&file, offset, piece, libc::PROT_READ | libc::PROT_WRITE)?);
        offset += piece.end - piece.start;
    }
    Ok(Ram::from_regions(regions)?)
}

/// Adds room to grow to `ram`, with a memfd of its own, from which pages can be taken again.
///
/// Nothing in this process can touch it before [`open`] has been called for it.
/// Attack: a guest that is given a small part of its room points a device at the rest, and has the
/// host fill that for it. A device's system call fails then; its own accesses are checked before
/// (virtio's `granted`), as they would end the VM.
pub fn add_room(ram: &Ram, room: &Range<u64>) -> Result<Ram, MemoryError> {
    let size = room.end - room.start;
    let file = memfd(size).map_err(|source| MemoryError::Memfd { size, source })?;
    Ok(ram.insert_region(Arc::new(map(&Arc::new(file), 0, room, libc::PROT_NONE)?))?)
}

/// Opens whole pages of the room to this process.
pub(crate) fn open(ram: &Ram, part: &Range<u64>) -> Result<(), MemoryError> {
    let not_ram = |_| MemoryError::NotRam { part: part.clone() };
    let size = part.end.saturating_sub(part.start) as usize;
    let slice = ram.get_slice(GuestAddress(part.start), size).map_err(not_ram)?;
    let address = slice.ptr_guard_mut().as_ptr();
    // SAFETY: these are addresses of a live mapping of guest memory, which nothing but vm-memory's
    // volatile accesses reaches: that they may be written from now on invalidates no reference.
    let done = unsafe { libc::mprotect(address.cast(), size, libc::PROT_READ | libc::PROT_WRITE) };
    let failed = |source| MemoryError::Open { part: part.clone(), source };
    Errno::result(done).map(drop).map_err(failed)
}

fn map(
    file: &Arc<File>,
    offset: u64,
    piece: &Range<u64>,
    protection: libc::c_int,
) -> Result<GuestRegionMmap, MemoryError> {
    let size = piece.end - piece.start;
    let region = MmapRegionBuilder::new(size as usize)
        .with_mmap_prot(protection)
        .with_mmap_flags(libc::MAP_SHARED | libc::MAP_NORESERVE)
        .with_file_offset(FileOffset::from_arc(file.clone(), offset))
        .build()
        .map_err(|source| MemoryError::Map { size, source })?;
    advise(&region, libc::MADV_DONTDUMP).map_err(MemoryError::Advise)?;
    match advise(&region, libc::MADV_HUGEPAGE) {
        // A kernel without transparent huge pages.
        Ok(()) | Err(Errno::EINVAL) => {}
        Err(e) => return Err(MemoryError::Advise(e)),
    }
    GuestRegionMmap::new(region, GuestAddress(piece.start))
        .ok_or(MemoryError::Collection(GuestRegionCollectionError::NoMemoryRegion))
}

fn advise(region: &MmapRegion, advice: libc::c_int) -> nix::Result<()> {
    // SAFETY: `region` is a mapping of exactly this address and length, alive during the call; the
    // kinds of advice used here change no contents.
    let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
    Errno::result(done).map(drop)
}

fn memfd(size: u64) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"guest-ram", flags)?);
    file.set_len(size)?;
    // Nobody who is handed this descriptor can pull pages from under the mapping (SIGBUS).
    let seals = nix::fcntl::SealFlag::F_SEAL_SHRINK | nix::fcntl::SealFlag::F_SEAL_GROW;
    nix::fcntl::fcntl(&file, nix::fcntl::FcntlArg::F_ADD_SEALS(seals))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::os::linux::fs::MetadataExt;

    use vm_memory::{Bytes, GuestMemoryRegion};

    use super::*;

    #[test]
    fn only_touched_pages_cost_anything() {
        let layout = Layout::new(8192, 46).unwrap();
        let ram = allocate(&layout).unwrap();
        ram.write_obj(1u64, GuestAddress(layout.ram[1].start)).unwrap();
        let region = ram.find_region(GuestAddress(0)).unwrap();
        let file = region.file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().st_blocks() * 512, 4096);
        assert!(file.set_len(4096).is_err(), "memory can be pulled from under the guest");
    }

    #[test]
    fn room_to_grow_is_a_region_in_a_file_of_its_own_that_costs_nothing() {
        let layout = Layout::with_room(512, 16_384, 46).unwrap();
        let room = layout.room.clone().unwrap();
        let ram = add_room(&allocate(&layout).unwrap(), &room).unwrap();
        let region = ram.find_region(GuestAddress(room.start)).unwrap();
        assert_eq!(region.len(), room.end - room.start);
        let backing = region.file_offset().unwrap();
        assert_eq!((backing.start(), backing.file().metadata().unwrap().st_blocks()), (0, 0));
        assert!(ram.write_obj(1u8, GuestAddress(room.start - 1)).is_err());
    }

    #[test]
    fn room_that_was_not_opened_cannot_be_filled_by_a_device() {
        let layout = Layout::with_room(512, 16_384, 46).unwrap();
        let room = layout.room.clone().unwrap();
        let ram = add_room(&allocate(&layout).unwrap(), &room).unwrap();
        // As a disk does it: a system call that reads from a file into the guest's memory.
        let fill = |addr| {
            let mut zeros = File::open("/dev/zero").unwrap();
            ram.read_exact_volatile_from(GuestAddress(addr), &mut zeros, 8).is_ok()
        };
        assert!(!fill(room.start) && !fill(room.end - 8));
        open(&ram, &(room.start..room.start + (2 << 20))).unwrap();
        assert!(fill(room.start) && fill(room.start + (2 << 20) - 8));
        assert!(!fill(room.start + (2 << 20)));
        assert!(ram.write_obj(1u8, GuestAddress(room.start)).is_ok());
        let beyond = open(&ram, &(room.end..room.end + 4096));
        assert!(matches!(beyond, Err(MemoryError::NotRam { .. })));
    }

    #[test]
    fn the_hole_is_not_backed() {
        let ram = allocate(&Layout::new(4096, 46).unwrap()).unwrap();
        assert!(ram.write_obj(0u8, GuestAddress((3 << 30) - 1)).is_ok());
        assert!(ram.write_obj(0u8, GuestAddress(3 << 30)).is_err());
        assert!(ram.write_obj(0u8, GuestAddress(4 << 30)).is_ok());
    }
}
