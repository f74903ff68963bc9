//! Reading directories.
//!
//! The host's kernel fills a buffer with entries; a request of the guest takes fewer, as the FUSE
//! format is larger. The rest stays in the handle for the next request, so most requests need no
//! system call.

use std::ffi::CStr;
use std::io;
use std::os::fd::AsFd;
use std::sync::Arc;

use nix::unistd::{Whence, lseek64};
use virtiofsd::filesystem::{DirEntry, DirectoryIterator};

use super::calls;
use super::handles::Handle;
use super::stat::InodeNumbers;

/// Size of the buffer for entries, bytes.
const BUFFER: usize = 32 << 10;
/// `struct linux_dirent64`: d_ino, d_off (8 bytes each), d_reclen (2), d_type (1), d_name.
const HEADER: usize = 19;

/// The entries for one request.
#[derive(Debug)]
pub(crate) struct Entries {
    handle: Arc<Handle>,
    numbers: Arc<InodeNumbers>,
    entries: Vec<u8>,
    /// Position of the next entry in `entries`.
    at: usize,
}

/// A `struct linux_dirent64`.
struct Raw<'a> {
    ino: u64,
    /// d_off: offset of the next entry.
    offset: u64,
    length: usize,
    kind: u8,
    name: &'a CStr,
}

fn parse(bytes: &[u8]) -> Option<Raw<'_>> {
    let wide = |at: usize| Some(u64::from_ne_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let length = usize::from(u16::from_ne_bytes(bytes.get(16..18)?.try_into().ok()?));
    let name = CStr::from_bytes_until_nul(bytes.get(HEADER..length)?).ok()?;
    Some(Raw { ino: wide(0)?, offset: wide(8)?, length, kind: *bytes.get(18)?, name })
}

/// Position of the entry at `offset` in `entries`: after the entry whose d_off it is.
fn find(entries: &[u8], offset: u64) -> Option<usize> {
    let mut at = 0;
    while let Some(entry) = entries.get(at..).and_then(parse) {
        at += entry.length;
        if entry.offset == offset {
            return Some(at).filter(|at| *at < entries.len());
        }
    }
    None
}

impl Entries {
    /// The entries from `offset` on; 0 reads the directory anew.
    pub(super) fn read(
        handle: Arc<Handle>,
        numbers: Arc<InodeNumbers>,
        offset: u64,
    ) -> io::Result<Self> {
        let mut position = handle.position();
        let mut entries = std::mem::take(&mut position.entries);
        let over = if offset == 0 { None } else { find(&entries, offset) };
        let at = match over {
            Some(at) => at,
            None => {
                if position.next != offset || offset == 0 {
                    let signed = i64::try_from(offset).map_err(|_| invalid())?;
                    lseek64(&handle.file, signed, Whence::SeekSet)?;
                }
                position.next = offset;
                entries.resize(BUFFER, 0);
                let filled = calls::read_entries(handle.file.as_fd(), &mut entries)?;
                entries.truncate(filled);
                let mut end = 0;
                while let Some(entry) = entries.get(end..).and_then(parse) {
                    end += entry.length;
                    position.next = entry.offset;
                }
                0
            }
        };
        drop(position);
        Ok(Self { handle, numbers, entries, at })
    }
}

fn invalid() -> io::Error {
    io::Error::from_raw_os_error(libc::EINVAL)
}

impl DirectoryIterator for Entries {
    fn next(&mut self) -> Option<DirEntry<'_>> {
        let entry = self.entries.get(self.at..).and_then(parse)?;
        self.at += entry.length;
        Some(DirEntry {
            ino: self.numbers.number(self.handle.dev(), entry.ino),
            offset: entry.offset,
            type_: u32::from(entry.kind),
            name: entry.name,
        })
    }
}

impl Drop for Entries {
    fn drop(&mut self) {
        // At the end of the directory there is nothing to keep.
        if !self.entries.is_empty() {
            self.handle.position().entries = std::mem::take(&mut self.entries);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::fs::File;

    use super::*;
    use crate::passthrough::handles::Handles;
    use crate::passthrough::node::{Place, Table};

    #[test]
    fn every_entry_is_returned_once_with_any_request_size() {
        let dir = tempfile::tempdir().unwrap();
        let names: BTreeSet<String> = (0..3000).map(|n| format!("a-longer-name-{n}")).collect();
        for name in &names {
            File::create(dir.path().join(name)).unwrap();
        }
        let file = File::open(dir.path()).unwrap();
        let stat = calls::stat_of(file.as_fd()).unwrap();
        let node = Table::default().reset(&stat, Place::new(None, c"", stat.mount));
        let handles = Handles::default();
        let handle = handles.get(node.id, handles.add(node, file)).unwrap();
        let numbers = Arc::new(InodeNumbers::default());
        for taken in [1, 7, 100_000] {
            let (mut seen, mut offset) = (Vec::new(), 0);
            loop {
                let mut entries = Entries::read(handle.clone(), numbers.clone(), offset).unwrap();
                let mut got = 0;
                while got < taken
                    && let Some(entry) = entries.next()
                {
                    got += 1;
                    offset = entry.offset;
                    seen.push(entry.name.to_str().unwrap().to_owned());
                }
                // One more is taken and not counted, as when it does not fit into the answer.
                entries.next();
                if got == 0 {
                    break;
                }
            }
            seen.retain(|name| !matches!(name.as_str(), "." | ".."));
            assert_eq!(seen.len(), names.len(), "{taken} at a time");
            assert_eq!(seen.into_iter().collect::<BTreeSet<_>>(), names);
        }
        // Offset 0 reads the directory anew.
        File::create(dir.path().join("new")).unwrap();
        let mut entries = Entries::read(handle.clone(), numbers.clone(), 0).unwrap();
        let mut found = false;
        let mut offset = 0;
        while !entries.entries.is_empty() {
            while let Some(entry) = entries.next() {
                found |= entry.name == c"new";
                offset = entry.offset;
            }
            drop(entries);
            entries = Entries::read(handle.clone(), numbers.clone(), offset).unwrap();
        }
        drop(entries);
        assert!(found);
        assert!(Entries::read(handle, numbers, u64::MAX).is_err());
    }

    #[test]
    fn two_requests_at_once_leave_the_offset_of_the_kernel_known() {
        let dir = tempfile::tempdir().unwrap();
        for n in 0..3000 {
            File::create(dir.path().join(format!("a-longer-name-{n}"))).unwrap();
        }
        let file = File::open(dir.path()).unwrap();
        let stat = calls::stat_of(file.as_fd()).unwrap();
        let node = Table::default().reset(&stat, Place::new(None, c"", stat.mount));
        let handles = Handles::default();
        let handle = handles.get(node.id, handles.add(node, file)).unwrap();
        let read = |offset| {
            Entries::read(handle.clone(), Arc::new(InodeNumbers::default()), offset).unwrap()
        };
        let end_of = |entries: &mut Entries| {
            let mut end = 0;
            while let Some(entry) = entries.next() {
                end = entry.offset;
            }
            end
        };
        let mut first = read(0);
        let first_end = end_of(&mut first);
        // The second one continues while the first has not ended, and ends before it.
        let mut second = read(first_end);
        let expected = second.next().unwrap().name.to_owned();
        drop(second);
        drop(first);
        assert_eq!(read(first_end).next().unwrap().name, expected.as_c_str());
    }

    #[test]
    fn an_invalid_entry_ends_the_list() {
        let mut whole = vec![0; 24];
        whole[16..18].copy_from_slice(&24u16.to_ne_bytes());
        whole[19] = b'x';
        assert_eq!(parse(&whole).unwrap().name, c"x");
        for length in [0u16, 5, 19, 20, 25, u16::MAX] {
            let mut bad = whole.clone();
            bad[16..18].copy_from_slice(&length.to_ne_bytes());
            assert!(parse(&bad).is_none(), "{length}");
        }
        assert!(parse(&whole[..18]).is_none());
    }
}
