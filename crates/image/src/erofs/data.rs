//! The data area: file contents are written from the layer stream directly to their blocks.
//!
//! Blocks of zeros are never written, so they are holes in the image file; runs of at least
//! [`MIN_HOLE`] zeros are holes in the EROFS file too (chunk-based layout). The last partial block
//! of a file may be kept in memory to be stored inline after its inode.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::fcntl::{FallocateFlags, fallocate};

use super::format::{BLOCK, BLOCK_BITS};
use crate::space::{SPACE_CHECK_INTERVAL, Space};

/// Shorter runs of zeros are stored as data blocks: a hole splits the guest's read-ahead.
const MIN_HOLE: u64 = 64 << 10;
/// Tails up to this length are stored inline; longer ones would waste about as much space there.
const MAX_TAIL: usize = 2032;
/// Memory for all tails of an image. Above it each tail takes a block: an image of a million small
/// files must not exhaust the host's memory.
const TAIL_BUDGET: usize = 64 << 20;
/// Entries of a file's chunk map. Larger files get larger chunks, so that a sparse file of
/// terabytes does not need gigabytes of metadata.
const MAX_CHUNKS: u64 = 1 << 18;
/// Holes in one image. Each costs memory until the metadata is written; above the limit zeros are
/// stored as data blocks (sparse on the host).
const MAX_HOLES: usize = 1 << 20;
const BUFFER: usize = 1 << 20;

#[derive(Debug, thiserror::Error)]
pub enum DataError {
    #[error("cannot read the file's content")]
    Read(#[source] io::Error),
    #[error("content ends {missing} bytes early")]
    Truncated { missing: u64 },
    #[error("cannot write {}", path.display())]
    Write { path: PathBuf, source: io::Error },
    #[error("image exceeds the 16 TiB that EROFS can address")]
    TooManyBlocks,
}

/// A run of chunks: `block` is its first block, `None` for a hole.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    pub chunks: u32,
    pub block: Option<u32>,
}

/// Location of a file's content.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct FileData {
    pub size: u64,
    /// First block of the contiguous part.
    pub(super) start: u32,
    pub(super) blocks: u32,
    /// Last bytes of the file, stored inline after the inode.
    pub(super) tail: Box<[u8]>,
    /// Chunk size as a power of two, and the map; empty when the file has no holes.
    pub(super) chunk_bits: u8,
    pub(super) runs: Box<[Run]>,
}

/// The image file while the data area is written.
#[derive(Debug)]
pub struct DataArea {
    file: File,
    path: PathBuf,
    next: u32,
    tail_budget: usize,
    holes: usize,
    unchecked: u64,
    buffer: Vec<u8>,
}

impl DataArea {
    /// Block 0 is reserved for the superblock.
    pub fn create(path: &Path) -> Result<Self, DataError> {
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(|source| DataError::Write { path: path.into(), source })?;
        Ok(Self {
            file,
            path: path.into(),
            next: 1,
            tail_budget: TAIL_BUDGET,
            holes: 0,
            unchecked: 0,
            buffer: vec![0; BUFFER],
        })
    }

    /// Stores `size` bytes of `content`.
    pub fn store(&mut self, content: &mut dyn Read, size: u64) -> Result<FileData, DataError> {
        let mut bits = BLOCK_BITS;
        while size >> bits > MAX_CHUNKS {
            bits += 1;
        }
        let mut placer = Placer {
            total_blocks: size.div_ceil(BLOCK as u64),
            chunk_blocks: 1 << (bits - BLOCK_BITS),
            index: 0,
            current: None,
            pending_zero: 0,
            runs: Vec::new(),
        };
        let mut left = size;
        let mut tail = Box::default();
        // Moved out because `self` is borrowed in the loop; restored below.
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = (|| {
            while left > 0 {
                let want = left.min(BUFFER as u64) as usize;
                read_full(content, &mut buffer[..want])?;
                left -= want as u64;
                let partial = want % BLOCK;
                let mut end = want;
                if left == 0 && partial != 0 {
                    let fits = partial <= MAX_TAIL.min(self.tail_budget);
                    if fits && placer.chunk_blocks == 1 && !placer.has_holes() {
                        // The tail goes last: only when the whole blocks are placed is it known
                        // whether the file has a hole.
                        placer.place(self, &buffer[..want - partial])?;
                        if !placer.has_holes() && placer.pending_zero == 0 {
                            self.tail_budget -= partial;
                            tail = buffer[want - partial..want].into();
                            placer.total_blocks -= 1;
                            return Ok(());
                        }
                        buffer.copy_within(want - partial..want, 0);
                        buffer[partial..BLOCK].fill(0);
                        return placer.place(self, &buffer[..BLOCK]);
                    }
                    end = want.next_multiple_of(BLOCK);
                    buffer[want..end].fill(0);
                }
                placer.place(self, &buffer[..end])?;
            }
            Ok(())
        })();
        self.buffer = buffer;
        result?;
        placer.finish(self)?;
        let holes = placer.has_holes();
        let first = placer.runs.iter().find_map(|run| run.block).unwrap_or(0);
        let blocks = placer.data_blocks();
        Ok(FileData {
            size,
            start: first,
            blocks,
            tail,
            chunk_bits: bits,
            runs: if holes { placer.runs.into() } else { Box::default() },
        })
    }

    /// Punches holes for the blocks of a file that a later layer hid, to free host disk space; the
    /// image reads as zeros there. On a file system without support the blocks stay allocated.
    pub fn discard(&self, data: &FileData) {
        if data.blocks == 0 {
            return;
        }
        let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
        let bytes = |blocks: u32| i64::from(blocks) << BLOCK_BITS;
        let _ = fallocate(&self.file, flags, bytes(data.start), bytes(data.blocks));
    }

    /// Allocates `count` blocks at the end of the image.
    pub(super) fn allocate(&mut self, count: u64) -> Result<u32, DataError> {
        let start = self.next;
        let next = u64::from(start) + count;
        // u32::MAX is NULL_BLOCK.
        if next >= u64::from(u32::MAX) {
            return Err(DataError::TooManyBlocks);
        }
        self.next = next as u32;
        Ok(start)
    }

    pub(super) fn next_block(&self) -> u32 {
        self.next
    }

    pub(super) fn write_at(&mut self, bytes: &[u8], offset: u64) -> Result<(), DataError> {
        self.unchecked += bytes.len() as u64;
        if self.unchecked >= SPACE_CHECK_INTERVAL {
            self.unchecked = 0;
            Space::of(&self.file)
                .and_then(|space| space.check(0))
                .map_err(|source| self.write_error(source))?;
        }
        self.file.write_all_at(bytes, offset).map_err(|source| self.write_error(source))
    }

    /// Sets the final length and makes the image durable.
    pub(super) fn seal(self, blocks: u32) -> Result<(), DataError> {
        self.file
            .set_len(u64::from(blocks) << BLOCK_BITS)
            .and_then(|()| self.file.sync_all())
            .map_err(|source| self.write_error(source))
    }

    fn write_error(&self, source: io::Error) -> DataError {
        DataError::Write { path: self.path.clone(), source }
    }
}

fn read_full(content: &mut dyn Read, mut buffer: &mut [u8]) -> Result<(), DataError> {
    while !buffer.is_empty() {
        match content.read(buffer) {
            Ok(0) => return Err(DataError::Truncated { missing: buffer.len() as u64 }),
            Ok(n) => buffer = &mut buffer[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(DataError::Read(e)),
        }
    }
    Ok(())
}

/// Classifies blocks as data or hole.
struct Placer {
    total_blocks: u64,
    chunk_blocks: u64,
    /// Index of the file's next block.
    index: u64,
    /// First image block of the current chunk, once it has data.
    current: Option<u32>,
    /// Whole chunks of zeros read and not placed yet.
    pending_zero: u64,
    runs: Vec<Run>,
}

impl Placer {
    fn has_holes(&self) -> bool {
        self.runs.iter().any(|run| run.block.is_none())
    }

    /// Image blocks used: all data runs are contiguous.
    fn data_blocks(&self) -> u32 {
        let chunks: u64 =
            self.runs.iter().filter(|r| r.block.is_some()).map(|r| u64::from(r.chunks)).sum();
        let last_is_data = self.runs.last().is_some_and(|run| run.block.is_some());
        let mut blocks = chunks * self.chunk_blocks;
        let rest = self.total_blocks % self.chunk_blocks;
        if last_is_data && rest != 0 {
            blocks -= self.chunk_blocks - rest;
        }
        blocks as u32
    }

    /// `bytes` is a whole number of blocks.
    fn place(&mut self, out: &mut DataArea, bytes: &[u8]) -> Result<(), DataError> {
        // Contiguous data blocks are written with one call.
        let mut write: Option<(usize, u64)> = None;
        for (position, block) in bytes.chunks_exact(BLOCK).enumerate() {
            let position = position * BLOCK;
            let within = self.index % self.chunk_blocks;
            let target = if is_zero(block) {
                None
            } else {
                let start = match self.current {
                    Some(start) => start,
                    None => {
                        self.flush_zero(out)?;
                        let start = self.push_data(out, 1, self.index - within)?;
                        self.current = Some(start);
                        start
                    }
                };
                Some((u64::from(start) + within) << BLOCK_BITS)
            };
            match (write, target) {
                (Some((from, at)), Some(to)) if at + (position - from) as u64 == to => {}
                (Some((from, at)), target) => {
                    out.write_at(&bytes[from..position], at)?;
                    write = target.map(|to| (position, to));
                }
                (None, target) => write = target.map(|to| (position, to)),
            }
            self.index += 1;
            if self.index.is_multiple_of(self.chunk_blocks) || self.index == self.total_blocks {
                self.pending_zero += u64::from(self.current.take().is_none());
            }
        }
        if let Some((from, at)) = write {
            out.write_at(&bytes[from..], at)?;
        }
        Ok(())
    }

    fn finish(&mut self, out: &mut DataArea) -> Result<(), DataError> {
        self.flush_zero(out)
    }

    fn flush_zero(&mut self, out: &mut DataArea) -> Result<(), DataError> {
        let chunks = std::mem::take(&mut self.pending_zero);
        if chunks == 0 {
            return Ok(());
        }
        let long = (chunks * self.chunk_blocks) << BLOCK_BITS >= MIN_HOLE;
        if long && out.holes < MAX_HOLES {
            out.holes += 1;
            self.runs.push(Run { chunks: chunks as u32, block: None });
            return Ok(());
        }
        let placed: u64 = self.runs.iter().map(|run| u64::from(run.chunks)).sum();
        self.push_data(out, chunks, placed * self.chunk_blocks).map(drop)
    }

    /// Allocates blocks for `chunks` chunks that begin at the file's block `first`.
    fn push_data(&mut self, out: &mut DataArea, chunks: u64, first: u64) -> Result<u32, DataError> {
        // The last chunk ends at the end of the file.
        let blocks = (chunks * self.chunk_blocks).min(self.total_blocks - first);
        let start = out.allocate(blocks)?;
        match self.runs.last_mut() {
            Some(run) if run.block.is_some() => run.chunks += chunks as u32,
            _ => self.runs.push(Run { chunks: chunks as u32, block: Some(start) }),
        }
        Ok(start)
    }
}

fn is_zero(block: &[u8]) -> bool {
    static ZERO: [u8; BLOCK] = [0; BLOCK];
    *block == ZERO
}
