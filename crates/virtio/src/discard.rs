//! Returns pages of guest memory to the host. They read as zeroes afterwards and use no memory
//! until the guest or a device touches them.
//!
//! For shared memory a hole is punched into its file (`fallocate`), which frees the pages for every
//! process that maps the file: the VMM, KVM, and a vhost-user backend. `madvise(MADV_DONTNEED)`
//! would only unmap them in this process. For private memory MADV_DONTNEED is enough.
#![allow(unsafe_code)] // madvise takes a raw address

use std::io;
use std::ops::Range;

use nix::fcntl::{FallocateFlags, fallocate};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

/// Smallest range that can be returned, and the alignment of its ends, bytes.
pub(crate) const PAGE: u64 = 4096;

#[derive(Debug, thiserror::Error)]
pub(crate) enum DiscardError {
    #[error("{part:#x?} is not page-aligned guest memory")]
    Part { part: Range<u64> },
    #[error("cannot punch a hole for {part:#x?} into the file of guest memory")]
    Punch { part: Range<u64>, source: io::Error },
    #[error("cannot discard {part:#x?} of guest memory")]
    Drop { part: Range<u64>, source: io::Error },
}

/// Returns whole pages of `mem` to the host. Blocks while the kernel frees them, some milliseconds
/// for 64 MiB.
pub(crate) fn discard(mem: &GuestMemoryMmap, part: Range<u64>) -> Result<(), DiscardError> {
    if !part.start.is_multiple_of(PAGE) || !part.end.is_multiple_of(PAGE) {
        return Err(DiscardError::Part { part });
    }
    let mut at = part.start;
    while at < part.end {
        let region = mem.find_region(GuestAddress(at));
        let Some(region) = region else { return Err(DiscardError::Part { part }) };
        let offset = at - region.start_addr().raw_value();
        let len = (region.len() - offset).min(part.end - at);
        let piece = at..at + len;
        let shared = region.flags() & libc::MAP_SHARED != 0;
        match region.file_offset().filter(|_| shared) {
            Some(file) => {
                let flags =
                    FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
                // Below 2^63: the file is mapped up to this offset.
                let start = (file.start() + offset) as i64;
                fallocate(file.file(), flags, start, len as i64)
                    .map_err(|e| DiscardError::Punch { part: piece, source: e.into() })?;
            }
            None => drop_pages(mem, piece)?,
        }
        at += len;
    }
    Ok(())
}

/// `part` lies in one region.
fn drop_pages(mem: &GuestMemoryMmap, part: Range<u64>) -> Result<(), DiscardError> {
    let len = (part.end - part.start) as usize;
    let slice = mem.get_slice(GuestAddress(part.start), len);
    let slice = slice.map_err(|_| DiscardError::Part { part: part.clone() })?;
    let address = slice.ptr_guard_mut().as_ptr();
    // SAFETY: the range is part of a mapping of guest memory, which `mem` keeps alive during the
    // call and which is only accessed through vm-memory's volatile accesses: that its bytes become
    // zero invalidates no reference.
    if unsafe { libc::madvise(address.cast(), len, libc::MADV_DONTNEED) } != 0 {
        return Err(DiscardError::Drop { part, source: io::Error::last_os_error() });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::linux::fs::MetadataExt;

    use nix::sys::memfd::{MFdFlags, memfd_create};
    use vm_memory::{Bytes, FileOffset};

    use super::*;
    use crate::mock::memory;

    const SIZE: u64 = 16 * PAGE;

    #[test]
    fn pages_of_adjacent_regions_are_freed_in_the_file_of_each() {
        let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(2 * SIZE + PAGE).unwrap();
        let backing = |at| Some(FileOffset::new(file.try_clone().unwrap(), at));
        // Adjacent in guest memory, not in the file.
        let mem = GuestMemoryMmap::from_ranges_with_files([
            (GuestAddress(0), SIZE as usize, backing(SIZE + PAGE)),
            (GuestAddress(SIZE), SIZE as usize, backing(0)),
        ]);
        let mem = mem.unwrap();
        for page in 0..2 * SIZE / PAGE {
            mem.write_obj(7u8, GuestAddress(page * PAGE)).unwrap();
        }
        let pages = || file.metadata().unwrap().st_blocks() * 512 / PAGE;
        assert_eq!(pages(), 32);
        discard(&mem, SIZE - 2 * PAGE..SIZE + PAGE).unwrap();
        assert_eq!(pages(), 29);
        let read = |page: u64| mem.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
        assert_eq!([13, 14, 15, 16, 17].map(read), [7, 0, 0, 0, 7]);
    }

    #[test]
    fn discarded_private_pages_read_as_zeroes() {
        let mem = memory(SIZE as usize);
        for page in 0..3 {
            mem.write_obj(7u8, GuestAddress(page * PAGE)).unwrap();
        }
        discard(&mem, PAGE..2 * PAGE).unwrap();
        let read = |page: u64| mem.read_obj::<u8>(GuestAddress(page * PAGE)).unwrap();
        assert_eq!([0, 1, 2].map(read), [7, 0, 7]);
    }

    #[test]
    fn ranges_outside_memory_or_not_page_aligned_are_refused() {
        let mem = memory(SIZE as usize);
        for part in [0..SIZE + PAGE, SIZE..SIZE + PAGE, 1..PAGE, 0..PAGE + 1] {
            assert!(matches!(discard(&mem, part), Err(DiscardError::Part { .. })));
        }
        discard(&mem, PAGE..PAGE).unwrap();
    }
}
