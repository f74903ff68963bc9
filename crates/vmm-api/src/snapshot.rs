//! The memory of a saved VM: a sparse file with the VM's boot memory from address 0, without the
//! hole below 4 GiB.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use nix::errno::Errno;
use nix::unistd::{Whence, lseek};

const PAGE: usize = 4096;
/// Bytes that are read at once; whole pages.
const PIECE: usize = 1 << 20;

/// Copies the first `len` bytes of guest memory, the file of [`crate::Reply::Saved`], to an empty file.
/// Pages that are zero become holes. The pages of `to` are charged to the caller's memory cgroup. Returns the number of
/// bytes that were not zero.
///
/// # Errors
/// If a file cannot be read or written, for example because the disk is full.
pub fn copy_memory(from: &File, to: &File, len: u64) -> io::Result<u64> {
    to.set_len(len)?;
    let mut buffer = vec![0; PIECE];
    let (mut at, mut copied) = (0, 0);
    while let Some(data) = next_data(from, at, len)? {
        at = data.end;
        let mut offset = data.start;
        while offset < data.end {
            let bytes = &mut buffer[..(data.end - offset).min(PIECE as u64) as usize];
            from.read_exact_at(bytes, offset)?;
            copied += write_pages(to, bytes, offset)?;
            offset += bytes.len() as u64;
        }
    }
    Ok(copied)
}

/// The next range with data in `from..end`; none if only a hole is left. The file's position is
/// changed.
pub fn next_data(file: &File, from: u64, end: u64) -> io::Result<Option<Range<u64>>> {
    let seek = |at: u64, whence| match lseek(file, at as i64, whence) {
        Ok(found) => Ok(Some(found as u64)),
        Err(Errno::ENXIO) => Ok(None),
        Err(error) => Err(io::Error::from(error)),
    };
    if from >= end {
        return Ok(None);
    }
    let Some(start) = seek(from, Whence::SeekData)?.filter(|start| *start < end) else {
        return Ok(None);
    };
    let stop = seek(start, Whence::SeekHole)?.unwrap_or(end);
    Ok(Some(start..stop.min(end)))
}

/// Writes the pages of `bytes` that are not zero at `offset`; returns their number of bytes.
fn write_pages(to: &File, bytes: &[u8], offset: u64) -> io::Result<u64> {
    let zero = |page: &[u8]| page.iter().all(|byte| *byte == 0);
    let pages: Vec<&[u8]> = bytes.chunks(PAGE).collect();
    let (mut at, mut written) = (0, 0);
    // One write for pages in succession.
    for run in pages.chunk_by(|a, b| zero(a) == zero(b)) {
        let len: usize = run.iter().map(|page| page.len()).sum();
        if !zero(run[0]) {
            to.write_all_at(&bytes[at..at + len], offset + at as u64)?;
            written += len as u64;
        }
        at += len;
    }
    Ok(written)
}

#[cfg(test)]
mod tests {
    use std::os::linux::fs::MetadataExt;

    use super::*;

    #[test]
    fn pages_with_data_are_copied_and_zero_pages_become_holes() {
        const MIB: u64 = 1 << 20;
        let (from, to) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        from.set_len(64 * MIB).unwrap();
        let places = [0, 4096, 3 * MIB - 4, 63 * MIB, 64 * MIB - 8];
        for at in places {
            from.write_all_at(&at.to_le_bytes().map(|byte| byte | 1), at).unwrap();
        }
        // Allocated, but zero.
        from.write_all_at(&vec![0; 2 << 20], 8 * MIB).unwrap();
        // The third value lies on two pages.
        assert_eq!(copy_memory(&from, &to, 64 * MIB).unwrap(), 6 * 4096);
        assert_eq!(to.metadata().unwrap().len(), 64 * MIB);
        assert_eq!(to.metadata().unwrap().st_blocks() * 512, 6 * 4096);
        let read = |file: &File| {
            let mut all = vec![0; 64 << 20];
            file.read_exact_at(&mut all, 0).unwrap();
            all
        };
        assert!(read(&from) == read(&to));
    }

    #[test]
    fn an_empty_file_and_one_without_data_have_no_next_data() {
        let file = tempfile::tempfile().unwrap();
        assert_eq!(next_data(&file, 0, 0).unwrap(), None);
        file.set_len(1 << 20).unwrap();
        assert_eq!(next_data(&file, 0, 1 << 20).unwrap(), None);
        file.write_all_at(&[1], 1 << 19).unwrap();
        assert_eq!(next_data(&file, 0, 1 << 20).unwrap(), Some(1 << 19..(1 << 19) + 4096));
        assert_eq!(next_data(&file, 0, 1 << 19).unwrap(), None);
    }
}
