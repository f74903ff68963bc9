//! Guest RAM: one memfd, mapped shared, in one or two regions; another memfd for the hotplug
//! region.
//!
//! A shared memfd rather than anonymous memory, because vhost-user backends need its file
//! descriptor, and because a template's memory can be mapped privately by other VMs later. No
//! memory is reserved (`MAP_NORESERVE`; tmpfs allocates pages on first touch). It is excluded from
//! core dumps: it is the tenant's data.
//!
//! MADV_HUGEPAGE is set; it has an effect only if the operator sets `shmem_enabled` to `advise`
//! (most hosts have `never`). Measured for a minimal kernel up to its init: 2,050 instead of 9,300
//! exits and half the boot time, for 39 instead of 32 MiB of touched memory.
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
    #[error("madvise on guest memory failed")]
    Advise(#[source] Errno),
    #[error("{part:#x?} is not guest memory")]
    NotRam { part: Range<u64> },
    #[error("cannot make {part:#x?} of guest memory accessible")]
    MakeAccessible { part: Range<u64>, source: Errno },
    #[error("cannot read saved guest memory")]
    Load { source: io::Error },
    #[error("saved guest memory has {got} bytes, the VM has {want}")]
    SavedSize { got: u64, want: u64 },
    #[error("regions of guest memory overlap or are empty")]
    Collection(#[from] GuestRegionCollectionError),
}

/// Creates the memfd and maps the RAM regions of `layout`.
pub fn allocate(layout: &Layout) -> Result<Ram, MemoryError> {
    let size = size(layout);
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

/// The file of the RAM regions, one after the other.
pub fn file<'a>(ram: &'a Ram, layout: &Layout) -> Result<&'a File, MemoryError> {
    Ok(backing(ram, &layout.ram[0])?.file())
}

/// Copies a file with the contents of the RAM regions, one after the other ([`file`]), into RAM that
/// nothing has written yet. Holes stay holes.
///
/// # Errors
/// If the file has another size than the RAM, or cannot be read.
pub fn load(ram: &Ram, layout: &Layout, file: &File) -> Result<(), MemoryError> {
    let failed = |source| MemoryError::Load { source };
    let (want, got) = (size(layout), file.metadata().map_err(failed)?.len());
    if want != got {
        return Err(MemoryError::SavedSize { got, want });
    }
    let mut offset = 0;
    for piece in &layout.ram {
        let backing = backing(ram, piece)?;
        let end = offset + (piece.end - piece.start);
        let mut at = offset;
        while let Some(data) = next_data(file, at, end).map_err(failed)? {
            at = data.end;
            copy(file, data.clone(), backing.file(), backing.start() + (data.start - offset))
                .map_err(failed)?;
        }
        offset = end;
    }
    Ok(())
}

fn size(layout: &Layout) -> u64 {
    layout.ram.iter().map(|piece| piece.end - piece.start).sum()
}

fn backing<'a>(ram: &'a Ram, piece: &Range<u64>) -> Result<&'a FileOffset, MemoryError> {
    let region = ram.find_region(GuestAddress(piece.start));
    let backing = region.and_then(|region| region.file_offset());
    backing.ok_or_else(|| MemoryError::NotRam { part: piece.clone() })
}

/// The next range with data in `from..end`; none if only a hole is left.
fn next_data(file: &File, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let seek = |at: u64, whence| match nix::unistd::lseek(file, at as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    if from >= end {
        return Ok(None);
    }
    let Some(start) = seek(from, nix::unistd::Whence::SeekData)?.filter(|start| *start < end)
    else {
        return Ok(None);
    };
    let stop = seek(start, nix::unistd::Whence::SeekHole)?.unwrap_or(end);
    Ok(Some(start..stop.min(end)))
}

/// Copies a range of a file to `offset` of another one, in the kernel.
fn copy(from: &File, range: Range<u64>, to: &File, offset: u64) -> io::Result<()> {
    nix::unistd::lseek(to, offset as i64, nix::unistd::Whence::SeekSet)?;
    let mut at = range.start as i64;
    while (at as u64) < range.end {
        let len = (range.end - at as u64) as usize;
        if nix::sys::sendfile::sendfile(to, from, Some(&mut at), len)? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Adds the hotplug region to `ram`, with a memfd of its own, into which holes can be punched.
///
/// It is mapped PROT_NONE until [`make_accessible`] is called for a part of it.
/// Attack: a guest that was granted a small part of the region uses the rest for buffers of a
/// device, so that the host allocates it. A system call of the device then fails with EFAULT;
/// accesses by the VMM itself, which would end it with SIGSEGV, are checked before (virtio's
/// `granted`).
pub fn add_hotplug_region(ram: &Ram, region: &Range<u64>) -> Result<Ram, MemoryError> {
    let size = region.end - region.start;
    let file = memfd(size).map_err(|source| MemoryError::Memfd { size, source })?;
    Ok(ram.insert_region(Arc::new(map(&Arc::new(file), 0, region, libc::PROT_NONE)?))?)
}

/// Makes whole pages of the hotplug region accessible to this process.
pub(crate) fn make_accessible(ram: &Ram, part: &Range<u64>) -> Result<(), MemoryError> {
    let not_ram = |_| MemoryError::NotRam { part: part.clone() };
    let size = part.end.saturating_sub(part.start) as usize;
    let slice = ram.get_slice(GuestAddress(part.start), size).map_err(not_ram)?;
    let address = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range is part of a live mapping of guest memory, which is only accessed through
    // vm-memory's volatile accesses: that it becomes writable invalidates no reference.
    let done = unsafe { libc::mprotect(address.cast(), size, libc::PROT_READ | libc::PROT_WRITE) };
    let failed = |source| MemoryError::MakeAccessible { part: part.clone(), source };
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
    // kinds of advice used here do not change contents.
    let done = unsafe { libc::madvise(region.as_ptr().cast(), region.size(), advice) };
    Errno::result(done).map(drop)
}

fn memfd(size: u64) -> io::Result<File> {
    let flags = MFdFlags::MFD_CLOEXEC | MFdFlags::MFD_ALLOW_SEALING;
    let file = File::from(memfd_create(c"guest-ram", flags)?);
    file.set_len(size)?;
    // A process with this file descriptor cannot truncate the file under the mapping (SIGBUS).
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
    fn only_touched_pages_are_allocated() {
        let layout = Layout::new(8192, 46).unwrap();
        let ram = allocate(&layout).unwrap();
        ram.write_obj(1u64, GuestAddress(layout.ram[1].start)).unwrap();
        let region = ram.find_region(GuestAddress(0)).unwrap();
        let file = region.file_offset().unwrap().file();
        assert_eq!(file.metadata().unwrap().st_blocks() * 512, 4096);
        assert!(file.set_len(4096).is_err(), "the file can be truncated");
    }

    #[test]
    fn the_hotplug_region_has_a_file_of_its_own_without_allocated_pages() {
        let layout = Layout::with_hotplug(512, 16_384, 46).unwrap();
        let region = layout.hotplug.clone().unwrap();
        let ram = add_hotplug_region(&allocate(&layout).unwrap(), &region).unwrap();
        let found = ram.find_region(GuestAddress(region.start)).unwrap();
        assert_eq!(found.len(), region.end - region.start);
        let backing = found.file_offset().unwrap();
        assert_eq!((backing.start(), backing.file().metadata().unwrap().st_blocks()), (0, 0));
        assert!(ram.write_obj(1u8, GuestAddress(region.start - 1)).is_err());
    }

    #[test]
    fn system_calls_cannot_write_to_hotplug_memory_that_is_not_accessible() {
        let layout = Layout::with_hotplug(512, 16_384, 46).unwrap();
        let region = layout.hotplug.clone().unwrap();
        let ram = add_hotplug_region(&allocate(&layout).unwrap(), &region).unwrap();
        // As a disk does: a system call that reads from a file into guest memory.
        let fill = |addr| {
            let mut zeros = File::open("/dev/zero").unwrap();
            ram.read_exact_volatile_from(GuestAddress(addr), &mut zeros, 8).is_ok()
        };
        assert!(!fill(region.start) && !fill(region.end - 8));
        make_accessible(&ram, &(region.start..region.start + (2 << 20))).unwrap();
        assert!(fill(region.start) && fill(region.start + (2 << 20) - 8));
        assert!(!fill(region.start + (2 << 20)));
        assert!(ram.write_obj(1u8, GuestAddress(region.start)).is_ok());
        let beyond = make_accessible(&ram, &(region.end..region.end + 4096));
        assert!(matches!(beyond, Err(MemoryError::NotRam { .. })));
    }

    #[test]
    fn saved_memory_is_loaded_and_its_holes_stay_holes() {
        let layout = Layout::new(4096, 46).unwrap();
        let saved = allocate(&layout).unwrap();
        let places = [0, 0x1000, 1 << 20, (3 << 30) - 8, 4 << 30, (5 << 30) - 8];
        for (value, at) in (1u64..).zip(places) {
            saved.write_obj(value, GuestAddress(at)).unwrap();
        }
        let ram = allocate(&layout).unwrap();
        load(&ram, &layout, file(&saved, &layout).unwrap()).unwrap();
        for (value, at) in (1u64..).zip(places) {
            assert_eq!(ram.read_obj::<u64>(GuestAddress(at)).unwrap(), value, "{at:#x}");
        }
        let loaded = file(&ram, &layout).unwrap().metadata().unwrap();
        assert_eq!((loaded.len(), loaded.st_blocks() * 512), (4 << 30, 6 * 4096));

        let smaller = Layout::new(2048, 46).unwrap();
        let other = allocate(&smaller).unwrap();
        let refused = load(&other, &smaller, file(&saved, &layout).unwrap());
        let (got, want) = (4 << 30, 2 << 30);
        assert!(matches!(refused, Err(MemoryError::SavedSize { got: g, want: w })
            if (g, w) == (got, want)));
    }

    #[test]
    fn the_hole_is_not_backed() {
        let ram = allocate(&Layout::new(4096, 46).unwrap()).unwrap();
        assert!(ram.write_obj(0u8, GuestAddress((3 << 30) - 1)).is_ok());
        assert!(ram.write_obj(0u8, GuestAddress(3 << 30)).is_err());
        assert!(ram.write_obj(0u8, GuestAddress(4 << 30)).is_ok());
    }
}
