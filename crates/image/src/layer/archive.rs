//! Reads a tar stream: ustar, GNU (long names, sparse files) and pax, with limits on everything
//! that is kept in memory.

use std::collections::BTreeMap;
use std::io::{self, Read};

use tar::{EntryType, GnuExtSparseHeader};

use super::error::{MAX_EXTENSIONS, TarError};
use super::header::RawHeader;
use super::pax::{self, Pax};
use crate::path::MAX_PATH;

const BLOCK: u64 = 512;
/// Maximum size of one pax header. Mostly attributes, which Linux limits to 64 KiB per value.
const MAX_PAX: u64 = 1 << 20;
/// Maximum segments of one sparse file; the map is kept in memory.
const MAX_SEGMENTS: usize = 1 << 16;
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EntryKind {
    File,
    Directory,
    HardLink,
    Symlink,
    Char,
    Block,
    Fifo,
}

/// An entry with all its extensions applied.
#[derive(Debug)]
pub struct Entry {
    pub kind: EntryKind,
    pub path: Vec<u8>,
    /// Target of a hard link or symlink.
    pub link: Vec<u8>,
    pub mode: u16,
    pub uid: u64,
    pub gid: u64,
    pub mtime: (i64, u32),
    pub device: (u32, u32),
    /// Size of the extracted file in bytes, including holes.
    pub size: u64,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Offset and length of the data segments; `None` for a file without holes.
    sparse: Option<Vec<(u64, u64)>>,
}

impl Entry {
    pub fn is_sparse(&self) -> bool {
        self.sparse.is_some()
    }
}

pub struct TarReader<R> {
    input: R,
    /// Unread bytes of the current entry, including padding.
    left: u64,
}

impl<R: Read> TarReader<R> {
    pub fn new(input: R) -> Self {
        Self { input, left: 0 }
    }

    pub fn next(&mut self) -> Result<Option<Entry>, TarError> {
        let mut pax = Pax::default();
        let (mut long_name, mut long_link) = (None, None);
        for _ in 0..=MAX_EXTENSIONS {
            self.skip_rest()?;
            let Some(header) = self.header()? else { return Ok(None) };
            match header.kind() {
                EntryType::XHeader => pax = Pax::parse(&self.extension(&header, MAX_PAX)?)?,
                // Global headers are skipped, as in containerd.
                EntryType::XGlobalHeader => self.set_size(header.size()?)?,
                EntryType::GNULongName => long_name = Some(self.name_extension(&header)?),
                EntryType::GNULongLink => long_link = Some(self.name_extension(&header)?),
                _ => return self.entry(&header, pax, long_name, long_link).map(Some),
            }
        }
        Err(TarError::TooManyExtensions)
    }

    /// The content of `entry`, which must be the last result of [`Self::next`], with zeros for its
    /// holes.
    pub fn content<'a>(&'a mut self, entry: &'a Entry) -> Content<'a, R> {
        Content { reader: self, size: entry.size, position: 0, segments: entry.sparse.as_deref() }
    }

    /// The input, positioned after the header of the last entry.
    pub fn get_ref(&self) -> &R {
        &self.input
    }

    pub fn get_mut(&mut self) -> &mut R {
        &mut self.input
    }

    /// For seekable input: the length of the current entry's unread part with padding, which the
    /// caller must skip.
    pub fn take_rest(&mut self) -> u64 {
        std::mem::take(&mut self.left)
    }

    /// The input, positioned after the end of the archive.
    pub fn into_inner(self) -> R {
        self.input
    }

    fn entry(
        &mut self,
        header: &RawHeader,
        pax: Pax,
        long_name: Option<Vec<u8>>,
        long_link: Option<Vec<u8>>,
    ) -> Result<Entry, TarError> {
        let path = pax.path.or(long_name).unwrap_or_else(|| header.path());
        let kind = match header.kind() {
            // Pre-POSIX tars mark a directory with a trailing slash.
            EntryType::Regular if header_is_v7_directory(header, &path) => EntryKind::Directory,
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => EntryKind::File,
            EntryType::Link => EntryKind::HardLink,
            EntryType::Symlink => EntryKind::Symlink,
            EntryType::Char => EntryKind::Char,
            EntryType::Block => EntryKind::Block,
            EntryType::Directory => EntryKind::Directory,
            EntryType::Fifo => EntryKind::Fifo,
            other => return Err(TarError::UnknownType(char::from(other.as_byte()))),
        };
        let mut entry = Entry {
            kind,
            path,
            link: pax.link.or(long_link).unwrap_or_else(|| header.link()),
            mode: header.mode()?,
            uid: pax.uid.map_or_else(|| header.uid(), Ok)?,
            gid: pax.gid.map_or_else(|| header.gid(), Ok)?,
            mtime: pax.mtime.unwrap_or_else(|| (header.mtime(), 0)),
            device: match kind {
                EntryKind::Char | EntryKind::Block => header.device()?,
                _ => (0, 0),
            },
            size: 0,
            xattrs: pax.xattrs,
            sparse: None,
        };
        // Only regular files have content; the size of other types is ignored.
        if kind == EntryKind::File {
            entry.size = pax.size.map_or_else(|| header.size(), Ok)?;
            self.set_size(entry.size)?;
            if header.kind() == EntryType::GNUSparse {
                self.old_sparse(header, &mut entry)?;
            } else {
                self.pax_sparse(pax.sparse, &mut entry)?;
            }
        }
        Ok(entry)
    }

    /// Type `S`: the map starts in the header and continues in blocks before the data.
    fn old_sparse(&mut self, header: &RawHeader, entry: &mut Entry) -> Result<(), TarError> {
        let (size, mut map, mut extended) = header.gnu_sparse()?;
        while extended {
            let mut block = GnuExtSparseHeader::new();
            // The entry's size does not include these blocks.
            read_exact(&mut self.input, block.as_mut_bytes())?;
            for part in block.sparse() {
                if part.is_empty() {
                    break;
                }
                map.push(part.offset().map_err(|_| TarError::BadSparse)?);
                map.push(part.length().map_err(|_| TarError::BadSparse)?);
            }
            if map.len() > 2 * MAX_SEGMENTS {
                return Err(TarError::BadSparse);
            }
            extended = block.is_extended();
        }
        set_sparse(entry, size, &map)
    }

    fn pax_sparse(&mut self, sparse: pax::Sparse, entry: &mut Entry) -> Result<(), TarError> {
        let Some(size) = sparse.real_size else { return Ok(()) };
        if let Some(name) = sparse.name {
            entry.path = name;
        }
        match (sparse.major.unwrap_or(0), sparse.minor.unwrap_or(0)) {
            (0, _) => set_sparse(entry, size, &sparse.map),
            (1, 0) => {
                let map = self.sparse_map()?;
                entry.size -= entry.size.min(BLOCK * map.0);
                set_sparse(entry, size, &map.1)
            }
            _ => Err(TarError::BadSparse),
        }
    }

    /// Format 1.0: the map precedes the data as decimal lines, padded to a block. Returns its
    /// number of blocks and the map.
    fn sparse_map(&mut self) -> Result<(u64, Vec<u64>), TarError> {
        let mut blocks = 0;
        let mut text = Vec::new();
        let mut numbers: Vec<u64> = Vec::new();
        loop {
            let mut block = [0; BLOCK as usize];
            if self.left < BLOCK {
                return Err(TarError::BadSparse);
            }
            read_exact(&mut self.input, &mut block)?;
            self.left -= BLOCK;
            blocks += 1;
            for &byte in &block {
                match byte {
                    b'\n' => {
                        numbers.push(pax::number(&text).ok_or(TarError::BadSparse)?);
                        text.clear();
                    }
                    _ if text.len() >= 20 => return Err(TarError::BadSparse),
                    byte => text.push(byte),
                }
                let Some(&count) = numbers.first() else { continue };
                if count > MAX_SEGMENTS as u64 {
                    return Err(TarError::BadSparse);
                }
                if numbers.len() as u64 == 1 + 2 * count {
                    numbers.remove(0);
                    return Ok((blocks, numbers));
                }
            }
        }
    }

    fn header(&mut self) -> Result<Option<RawHeader>, TarError> {
        let mut block = [0; BLOCK as usize];
        // Archives without the final zero blocks are common.
        if !read_or_end(&mut self.input, &mut block)? {
            return Ok(None);
        }
        if let Some(header) = RawHeader::parse(&block)? {
            return Ok(Some(header));
        }
        if read_or_end(&mut self.input, &mut block)? && block != [0; BLOCK as usize] {
            return Err(TarError::LoneZeroBlock);
        }
        Ok(None)
    }

    fn name_extension(&mut self, header: &RawHeader) -> Result<Vec<u8>, TarError> {
        // Twice the limit, because some writers pad names; the path itself is checked later.
        let mut name = self.extension(header, 2 * MAX_PATH as u64)?;
        let end = name.iter().position(|&b| b == 0).unwrap_or(name.len());
        name.truncate(end);
        Ok(name)
    }

    fn extension(&mut self, header: &RawHeader, limit: u64) -> Result<Vec<u8>, TarError> {
        let size = header.size()?;
        if size > limit {
            return Err(TarError::HeaderTooLarge { size, limit });
        }
        self.set_size(size)?;
        let mut bytes = vec![0; size as usize];
        read_exact(&mut self.input, &mut bytes)?;
        self.left -= size;
        Ok(bytes)
    }

    fn set_size(&mut self, size: u64) -> Result<(), TarError> {
        self.left = size.checked_next_multiple_of(BLOCK).ok_or(TarError::BadNumber("size"))?;
        Ok(())
    }

    fn skip_rest(&mut self) -> Result<(), TarError> {
        let skipped = io::copy(&mut (&mut self.input).take(self.left), &mut io::sink())?;
        if skipped < self.left {
            return Err(TarError::Truncated);
        }
        self.left = 0;
        Ok(())
    }
}

fn header_is_v7_directory(header: &RawHeader, path: &[u8]) -> bool {
    header.kind().as_byte() == 0 && path.last() == Some(&b'/')
}

/// Checks the map: ordered, not overlapping, inside the file, and its sum equals the stored data.
fn set_sparse(entry: &mut Entry, size: u64, map: &[u64]) -> Result<(), TarError> {
    if !map.len().is_multiple_of(2) || map.len() > 2 * MAX_SEGMENTS {
        return Err(TarError::BadSparse);
    }
    let (mut end, mut stored) = (0u64, 0u64);
    let mut segments = Vec::new();
    for part in map.chunks_exact(2) {
        let (offset, length) = (part[0], part[1]);
        let next = offset.checked_add(length).ok_or(TarError::BadSparse)?;
        if offset < end || next > size {
            return Err(TarError::BadSparse);
        }
        end = next;
        stored += length;
        if length > 0 {
            segments.push((offset, length));
        }
    }
    if stored != entry.size {
        return Err(TarError::BadSparse);
    }
    entry.size = size;
    entry.sparse = Some(segments);
    Ok(())
}

fn read_exact(input: &mut impl Read, bytes: &mut [u8]) -> Result<(), TarError> {
    input.read_exact(bytes).map_err(|e| match e.kind() {
        io::ErrorKind::UnexpectedEof => TarError::Truncated,
        _ => TarError::Read(e),
    })
}

/// False at the end of the stream; an error inside a block.
fn read_or_end(input: &mut impl Read, block: &mut [u8; BLOCK as usize]) -> Result<bool, TarError> {
    let mut filled = 0;
    while filled < block.len() {
        match input.read(&mut block[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(TarError::Truncated),
            Ok(n) => filled += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e.into()),
        }
    }
    Ok(true)
}

/// Reads one file's content.
pub struct Content<'a, R> {
    reader: &'a mut TarReader<R>,
    size: u64,
    position: u64,
    /// Data segments that are not read completely.
    segments: Option<&'a [(u64, u64)]>,
}

impl<R: Read> Read for Content<'_, R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut limit = (self.size - self.position).min(buffer.len() as u64);
        if limit == 0 {
            return Ok(0);
        }
        if let Some(segments) = &mut self.segments {
            while let [(offset, length), rest @ ..] = segments {
                if self.position < offset + length {
                    break;
                }
                *segments = rest;
            }
            let (start, end) = match segments {
                [(offset, length), ..] => (*offset, offset + length),
                [] => (self.size, self.size),
            };
            if self.position < start {
                limit = limit.min(start - self.position);
                buffer[..limit as usize].fill(0);
                self.position += limit;
                return Ok(limit as usize);
            }
            limit = limit.min(end - self.position);
        }
        let read = self.reader.input.read(&mut buffer[..limit as usize])?;
        if read == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.reader.left -= read as u64;
        self.position += read as u64;
        Ok(read)
    }
}
