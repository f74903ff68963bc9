//! The metadata area: walks the finished tree, assigns each inode its offset, and writes inodes,
//! attributes, inline tails and chunk maps, and last the superblock.

use std::collections::BTreeMap;
use std::collections::HashMap;

use super::data::{DataArea, DataError, FileData};
use super::format::{
    self, BLOCK, BLOCK_BITS, INODE_SIZE, Layout, NULL_BLOCK, RawInode, SLOT, SuperBlock,
    XATTR_ENTRY_SIZE, XATTR_HEADER_SIZE,
};
use super::{data::Run, dir};
use crate::tree::{Child, Kind, Node, NodeId, ROOT, Tree};

/// UUID of the superblock, derived from the image id.
type Uuid = [u8; 16];

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Summary {
    pub inodes: u64,
    /// Length of the image file.
    pub bytes: u64,
}

/// Position of an inode and of the data stored with it.
struct Place {
    id: NodeId,
    parent: NodeId,
    /// In bytes from the start of the metadata area.
    offset: u64,
    nlink: u32,
    xattr_size: usize,
    layout: Layout,
    /// First block of a directory's whole blocks.
    dir_block: u32,
    size: u64,
}

/// Writes the metadata and completes the image begun with `out`.
pub fn write_metadata(
    tree: &Tree<FileData>,
    mut out: DataArea,
    uuid: Uuid,
) -> Result<Summary, DataError> {
    for node in tree.hidden() {
        if let Kind::File(data) = &node.kind {
            out.discard(data);
        }
    }
    let (mut places, index) = walk(tree);
    let end = lay_out(tree, &mut places, &mut out)?;
    let nid = |id: NodeId| places[index[&id]].offset / SLOT;

    let meta_blocks = end.div_ceil(BLOCK as u64);
    let meta_block = out.allocate(meta_blocks)?;
    let mut meta = MetaWriter::new(u64::from(meta_block) << BLOCK_BITS);
    for place in &places {
        let node = tree.node(place.id);
        meta.seek(&mut out, place.offset)?;
        meta.push(&raw_inode(node, place).encode());
        meta.push(&encode_xattrs(&node.metadata.xattrs, place.xattr_size));
        match &node.kind {
            Kind::Directory(children) => {
                let bytes = dir::encode(&entries(tree, children, place, &nid));
                let inline = place.layout == Layout::FlatInline;
                let tail = if inline { bytes.len() % BLOCK } else { 0 };
                let whole = bytes.len() - tail;
                out.write_at(&bytes[..whole], u64::from(place.dir_block) << BLOCK_BITS)?;
                meta.push(&bytes[whole..]);
            }
            Kind::Symlink(target) if place.layout == Layout::FlatInline => meta.push(target),
            Kind::Symlink(target) => {
                out.write_at(target, u64::from(place.dir_block) << BLOCK_BITS)?;
            }
            Kind::File(data) if place.layout == Layout::ChunkBased => {
                // Inode and attributes are multiples of 4 bytes, so the map is aligned.
                meta.push_chunk_map(&data.runs, data.chunk_bits);
            }
            Kind::File(data) => meta.push(&data.tail),
            Kind::Char { .. } | Kind::Block { .. } | Kind::Fifo => {}
        }
    }
    meta.flush(&mut out)?;

    let blocks = out.next_block();
    let chunked = places.iter().any(|place| place.layout == Layout::ChunkBased);
    let superblock = SuperBlock {
        // The root is the first inode, so its nid fits into 16 bits.
        root_nid: nid(ROOT) as u16,
        inodes: places.len() as u64,
        blocks,
        meta_block,
        uuid,
        incompat: if chunked { format::INCOMPAT_CHUNKED_FILE } else { 0 },
    };
    out.write_at(&superblock.encode(), 0)?;
    out.seal(blocks)?;
    Ok(Summary { inodes: places.len() as u64, bytes: u64::from(blocks) << BLOCK_BITS })
}

/// Each inode once, parents first and siblings adjacent, with its link count.
fn walk(tree: &Tree<FileData>) -> (Vec<Place>, HashMap<NodeId, usize>) {
    let place = |id, parent| Place {
        id,
        parent,
        offset: 0,
        nlink: 0,
        xattr_size: 0,
        layout: Layout::FlatPlain,
        dir_block: 0,
        size: 0,
    };
    let mut places = vec![place(ROOT, ROOT)];
    let mut index = HashMap::from([(ROOT, 0)]);
    let mut directories = vec![ROOT];
    while let Some(id) = directories.pop() {
        let Kind::Directory(children) = &tree.node(id).kind else { continue };
        // `.`, the name in the parent (for the root: `..`), and the `..` of each subdirectory.
        places[index[&id]].nlink = 2;
        let mut inner = Vec::new();
        for child in children.values() {
            let position = *index.entry(child.node).or_insert_with(|| {
                places.push(place(child.node, id));
                places.len() - 1
            });
            if matches!(tree.node(child.node).kind, Kind::Directory(_)) {
                let parent = index[&id];
                places[parent].nlink += 1;
                inner.push(child.node);
            } else {
                places[position].nlink += 1;
            }
        }
        directories.extend(inner.into_iter().rev());
    }
    (places, index)
}

/// Assigns each inode its offset, and directories and long symlinks their blocks; returns the
/// length of the metadata area in bytes.
fn lay_out(
    tree: &Tree<FileData>,
    places: &mut [Place],
    out: &mut DataArea,
) -> Result<u64, DataError> {
    // nid 0 means "no inode" in directory entries.
    let mut cursor = SLOT;
    for place in places {
        let node = tree.node(place.id);
        place.xattr_size = xattr_size(&node.metadata.xattrs);
        let head = INODE_SIZE + place.xattr_size;
        let inline_bytes = match &node.kind {
            Kind::Directory(children) => {
                let mut names: Vec<&[u8]> = children.keys().map(|name| &name[..]).collect();
                names.extend([&b"."[..], b".."]);
                names.sort_unstable();
                place.size = dir::size(names.into_iter());
                let tail = (place.size % BLOCK as u64) as usize;
                let inline = tail > 0 && head + tail <= BLOCK;
                place.layout = if inline { Layout::FlatInline } else { Layout::FlatPlain };
                let blocks = place.size / BLOCK as u64 + u64::from(!inline && tail > 0);
                place.dir_block = out.allocate(blocks)?;
                if inline { tail } else { 0 }
            }
            Kind::Symlink(target) => {
                place.size = target.len() as u64;
                if head + target.len() <= BLOCK {
                    place.layout = Layout::FlatInline;
                    target.len()
                } else {
                    place.dir_block = out.allocate(1)?;
                    0
                }
            }
            Kind::File(data) => {
                place.size = data.size;
                if !data.runs.is_empty() {
                    place.layout = Layout::ChunkBased;
                    4 * data.runs.iter().map(|run| run.chunks as usize).sum::<usize>()
                } else {
                    if !data.tail.is_empty() {
                        place.layout = Layout::FlatInline;
                    }
                    data.tail.len()
                }
            }
            Kind::Char { .. } | Kind::Block { .. } | Kind::Fifo => 0,
        };
        cursor = cursor.next_multiple_of(SLOT);
        let block = BLOCK as u64;
        let whole = (head + inline_bytes) as u64;
        if whole <= block {
            // A tail must not cross a block; a symlink's must be in the block of its inode.
            if whole > block - cursor % block {
                cursor = cursor.next_multiple_of(block);
            }
        } else {
            // Large attributes or a chunk map may cross blocks; the inode itself and a tail after
            // the attributes may not. A tail here is a file's, at most half a block, so some slot
            // always fits.
            let crosses = |at: u64, length: usize| at % block + length as u64 > block;
            let tail = if place.layout == Layout::FlatInline { inline_bytes } else { 0 };
            while crosses(cursor, INODE_SIZE) || crosses(cursor + head as u64, tail) {
                cursor += SLOT;
            }
        }
        place.offset = cursor;
        cursor += whole;
    }
    Ok(cursor)
}

fn raw_inode(node: &Node<FileData>, place: &Place) -> RawInode {
    let meta = &node.metadata;
    let (kind, union) = match &node.kind {
        Kind::Directory(_) => (format::S_IFDIR, place.dir_block),
        Kind::Symlink(_) => (format::S_IFLNK, place.dir_block),
        Kind::File(data) if place.layout == Layout::ChunkBased => {
            (format::S_IFREG, u32::from(data.chunk_bits - BLOCK_BITS))
        }
        Kind::File(data) => (format::S_IFREG, data.start),
        Kind::Char { rdev } => (format::S_IFCHR, *rdev),
        Kind::Block { rdev } => (format::S_IFBLK, *rdev),
        Kind::Fifo => (format::S_IFIFO, 0),
    };
    let xattr_count = match place.xattr_size {
        0 => 0,
        size => ((size - XATTR_HEADER_SIZE) / XATTR_ENTRY_SIZE + 1) as u16,
    };
    RawInode {
        layout: place.layout,
        xattr_count,
        mode: kind | (meta.mode & 0o7777),
        size: place.size,
        union,
        ino: (place.offset / SLOT) as u32,
        uid: meta.uid,
        gid: meta.gid,
        mtime: meta.mtime,
        mtime_nsec: meta.mtime_nsec,
        nlink: place.nlink,
    }
}

fn entries<'a>(
    tree: &Tree<FileData>,
    children: &'a BTreeMap<Box<[u8]>, Child>,
    place: &Place,
    nid: &dyn Fn(NodeId) -> u64,
) -> Vec<dir::Entry<'a>> {
    let mut entries: Vec<_> = children
        .iter()
        .map(|(name, child)| dir::Entry {
            name,
            nid: nid(child.node),
            kind: match tree.node(child.node).kind {
                Kind::Directory(_) => format::TYPE_DIR,
                Kind::File(_) => format::TYPE_FILE,
                Kind::Symlink(_) => format::TYPE_SYMLINK,
                Kind::Char { .. } => format::TYPE_CHAR,
                Kind::Block { .. } => format::TYPE_BLOCK,
                Kind::Fifo => format::TYPE_FIFO,
            },
        })
        .collect();
    let dot = |name, id| dir::Entry { name, nid: nid(id), kind: format::TYPE_DIR };
    entries.push(dot(&b"."[..], place.id));
    entries.push(dot(&b".."[..], place.parent));
    entries.sort_unstable_by_key(|entry| entry.name);
    entries
}

/// Bytes of the inline attributes, a multiple of four; 0 without attributes.
fn xattr_size(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>) -> usize {
    let entries: usize = xattrs
        .iter()
        .filter_map(|(name, value)| {
            let (_, rest) = format::split_xattr_name(name)?;
            Some((XATTR_ENTRY_SIZE + rest.len() + value.len()).next_multiple_of(4))
        })
        .sum();
    if entries == 0 { 0 } else { XATTR_HEADER_SIZE + entries }
}

fn encode_xattrs(xattrs: &BTreeMap<Vec<u8>, Vec<u8>>, size: usize) -> Vec<u8> {
    if size == 0 {
        return Vec::new();
    }
    // Header: no name filter, no shared attributes.
    let mut out = vec![0; XATTR_HEADER_SIZE];
    for (name, value) in xattrs {
        let Some((index, rest)) = format::split_xattr_name(name) else { continue };
        out.extend_from_slice(&[rest.len() as u8, index]);
        out.extend_from_slice(&(value.len() as u16).to_le_bytes());
        out.extend_from_slice(rest);
        out.extend_from_slice(value);
        out.resize(out.len().next_multiple_of(4), 0);
    }
    debug_assert_eq!(out.len(), size);
    out
}

/// Buffers the metadata area and writes it in large pieces.
struct MetaWriter {
    start: u64,
    /// Offset of `buffer` from the start of the metadata area.
    base: u64,
    buffer: Vec<u8>,
}

impl MetaWriter {
    fn new(start: u64) -> Self {
        Self { start, base: 0, buffer: Vec::new() }
    }

    /// Pads with zeros up to `offset`, which must not be before the current position.
    fn seek(&mut self, out: &mut DataArea, offset: u64) -> Result<(), DataError> {
        if self.buffer.len() >= 1 << 20 {
            self.flush(out)?;
        }
        self.buffer.resize((offset - self.base) as usize, 0);
        Ok(())
    }

    fn push(&mut self, bytes: &[u8]) {
        self.buffer.extend_from_slice(bytes);
    }

    fn push_chunk_map(&mut self, runs: &[Run], chunk_bits: u8) {
        let step = 1u32 << (chunk_bits - BLOCK_BITS);
        for run in runs {
            for chunk in 0..run.chunks {
                let block = run.block.map_or(NULL_BLOCK, |block| block + chunk * step);
                self.buffer.extend_from_slice(&block.to_le_bytes());
            }
        }
    }

    fn flush(&mut self, out: &mut DataArea) -> Result<(), DataError> {
        out.write_at(&self.buffer, self.start + self.base)?;
        self.base += self.buffer.len() as u64;
        self.buffer.clear();
        Ok(())
    }
}

/// UUID for an image's superblock.
pub fn uuid(id: &[u8; 32]) -> Uuid {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&id[..16]);
    // RFC 9562, version 8 (custom), variant 10.
    uuid[6] = (uuid[6] & 0x0f) | 0x80;
    uuid[8] = (uuid[8] & 0x3f) | 0x80;
    uuid
}
