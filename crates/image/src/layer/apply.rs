//! Applies one layer blob to the tree (OCI image-spec v1.1, layer.md): contents are written to the
//! image's data area, names and metadata to the tree.

use std::io::{self, BufRead, Read};
use std::sync::atomic::{AtomicBool, Ordering};

use sha2::{Digest as _, Sha256};

use super::archive::{Entry, EntryKind, TarReader};
use super::compression::decompress;
use super::error::TarError;
use crate::digest::Digest;
use crate::erofs::{DataArea, DataError, FileData, encode_device, split_xattr_name};
use crate::path::{PathError, shown, split};
use crate::tree::{Kind, Metadata, Tree, TreeError};

const WHITEOUT: &[u8] = b".wh.";
/// Names with this prefix are aufs metadata and are skipped, except for the opaque whiteout.
const WHITEOUT_META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// The format's length field has 16 bits: one byte less than Linux's XATTR_SIZE_MAX.
const MAX_XATTR_VALUE: usize = 65535;
/// Total names and values of one inode: the format counts 4-byte words in 16 bits.
const MAX_XATTRS: usize = 128 << 10;

#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    #[error(transparent)]
    Tar(#[from] TarError),
    #[error(transparent)]
    Path(#[from] PathError),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error("{path:?}")]
    Data { path: String, source: DataError },
    #[error("whiteout {0:?} has no valid name")]
    BadWhiteout(String),
    #[error("symlink {0:?} has an empty target")]
    EmptySymlink(String),
    #[error("owner {id} of {path:?} does not fit into 32 bits")]
    BadOwner { path: String, id: u64 },
    #[error("device number {major}:{minor} of {path:?} is out of range")]
    BadDevice { path: String, major: u32, minor: u32 },
    #[error("extended attributes of {path:?} are {size} bytes long, more than {limit}")]
    XattrTooLarge { path: String, size: usize, limit: usize },
    #[error("the image unpacks to more than {limit} bytes")]
    TooLarge { limit: u64 },
    #[error("cannot decompress the layer")]
    Decompress(#[source] io::Error),
    #[error("uncompressed layer has digest {got}, the image's configuration has {expected}")]
    DiffId { expected: Digest, got: Digest },
    #[error("cancelled")]
    Cancelled,
}

impl LayerError {
    /// The I/O error if the host caused the failure, not the layer.
    pub fn host_fault(&self) -> Option<(&std::path::Path, &io::Error)> {
        match self {
            Self::Data { source: DataError::Write { path, source }, .. } => Some((path, source)),
            _ => None,
        }
    }
}

/// Limits of one image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Files, directories and so on in all layers, including hidden ones.
    pub nodes: u64,
    /// Bytes of memory for names, symlinks and attributes.
    pub metadata: u64,
    /// Bytes of all uncompressed layers, and of all files with their holes; the limit for zip
    /// bombs.
    pub unpacked: u64,
}

/// Result of applying a layer.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Applied {
    pub entries: u64,
    /// Attributes that were dropped because the host's or guest's overlayfs would interpret them,
    /// or because EROFS cannot represent their namespace.
    pub dropped_xattrs: u64,
}

/// Applies the layer `blob`; with a `diff_id` the uncompressed layer must have that digest.
/// `unpacked_left` is the remainder of [`Limits::unpacked`].
pub fn apply(
    blob: impl BufRead,
    diff_id: Option<&Digest>,
    tree: &mut Tree<FileData>,
    out: &mut DataArea,
    unpacked_left: &mut u64,
    limits: &Limits,
    cancelled: &AtomicBool,
) -> Result<Applied, LayerError> {
    let stream = Stream {
        inner: decompress(blob).map_err(LayerError::Decompress)?,
        hash: Sha256::new(),
        left: *unpacked_left,
        overflow: false,
        cancelled,
    };
    let mut files_left = *unpacked_left;
    let mut tar = TarReader::new(stream);
    tree.begin_layer();
    let mut applied = Applied::default();
    let result = (|| {
        while let Some(entry) = tar.next()? {
            applied.entries += 1;
            add_entry(&mut tar, entry, tree, out, &mut files_left, &mut applied)?;
        }
        Ok(())
    })();
    let mut stream = tar.into_inner();
    let result = result.and_then(|()| {
        // diff_id covers the padding after the archive too.
        io::copy(&mut stream, &mut io::sink()).map_err(|e| LayerError::Tar(e.into()))
    });
    if cancelled.load(Ordering::Relaxed) {
        return Err(LayerError::Cancelled);
    }
    if stream.overflow {
        return Err(LayerError::TooLarge { limit: limits.unpacked });
    }
    result.map_err(|e| match e {
        LayerError::TooLarge { .. } => LayerError::TooLarge { limit: limits.unpacked },
        other => other,
    })?;
    let got = Digest::from_hash(stream.hash.finalize().into());
    if let Some(&expected) = diff_id.filter(|&expected| *expected != got) {
        return Err(LayerError::DiffId { expected, got });
    }
    *unpacked_left = stream.left.min(files_left);
    Ok(applied)
}

fn add_entry<R: Read>(
    tar: &mut TarReader<R>,
    mut entry: Entry,
    tree: &mut Tree<FileData>,
    out: &mut DataArea,
    files_left: &mut u64,
    applied: &mut Applied,
) -> Result<(), LayerError> {
    let path_bytes = std::mem::take(&mut entry.path);
    let path = split(&path_bytes)?;
    if let Some((name, parents)) = path.split_last() {
        if *name == OPAQUE {
            return Ok(tree.opaque(parents)?);
        }
        if path.iter().any(|component| component.starts_with(WHITEOUT_META)) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(LayerError::BadWhiteout(shown(&path_bytes)));
            }
            let mut path = parents.to_vec();
            path.push(hidden);
            return Ok(tree.whiteout(&path)?);
        }
    }
    if entry.kind == EntryKind::HardLink {
        let target = split(&entry.link)?;
        return Ok(tree.add_hard_link(&path, &target)?);
    }
    let metadata = metadata(&mut entry, &path_bytes, applied)?;
    let kind = match entry.kind {
        EntryKind::Directory => return Ok(tree.add_directory(&path, metadata)?),
        EntryKind::File => {
            // Counted with holes: they use no disk space, but reading them takes time.
            *files_left =
                files_left.checked_sub(entry.size).ok_or(LayerError::TooLarge { limit: 0 })?;
            let size = entry.size;
            let data = out
                .store(&mut tar.content(&entry), size)
                .map_err(|source| LayerError::Data { path: shown(&path_bytes), source })?;
            Kind::File(data)
        }
        EntryKind::Symlink => {
            if entry.link.is_empty() {
                return Err(LayerError::EmptySymlink(shown(&path_bytes)));
            }
            check_symlink(&entry.link)?;
            Kind::Symlink(std::mem::take(&mut entry.link).into())
        }
        EntryKind::Char | EntryKind::Block => {
            let (major, minor) = entry.device;
            if entry.kind == EntryKind::Char && (major, minor) == (0, 0) {
                // Device 0:0 is overlayfs's whiteout (overlayfs.rst): the file is removed, as the
                // container would see it.
                return Ok(tree.remove(&path)?);
            }
            let rdev = encode_device(major, minor).ok_or_else(|| LayerError::BadDevice {
                path: shown(&path_bytes),
                major,
                minor,
            })?;
            match entry.kind {
                EntryKind::Char => Kind::Char { rdev },
                _ => Kind::Block { rdev },
            }
        }
        EntryKind::Fifo => Kind::Fifo,
        EntryKind::HardLink => unreachable!("handled above"),
    };
    Ok(tree.add(&path, metadata, kind)?)
}

/// Checks only what no file system could represent; the target is stored unchanged.
fn check_symlink(target: &[u8]) -> Result<(), PathError> {
    if target.len() > crate::path::MAX_PATH {
        return Err(PathError::TooLong { path: shown(target), length: target.len() });
    }
    if target.contains(&0) {
        return Err(PathError::ZeroByte(shown(target)));
    }
    Ok(())
}

fn metadata(entry: &mut Entry, path: &[u8], applied: &mut Applied) -> Result<Metadata, LayerError> {
    let owner =
        |id: u64| u32::try_from(id).map_err(|_| LayerError::BadOwner { path: shown(path), id });
    let too_large = |size: usize, limit: usize| {
        Err(LayerError::XattrTooLarge { path: shown(path), size, limit })
    };
    let mut xattrs = std::mem::take(&mut entry.xattrs);
    let before = xattrs.len();
    // `trusted.overlay.*` would let an image forge whiteouts and redirects in the guest's
    // overlayfs; no ordinary build sets other attributes of that namespace.
    xattrs.retain(|name, _| {
        !name.starts_with(b"trusted.") && split_xattr_name(name).is_some() && !name.contains(&0)
    });
    applied.dropped_xattrs += (before - xattrs.len()) as u64;
    let mut total = 0;
    for (name, value) in &xattrs {
        if value.len() > MAX_XATTR_VALUE {
            return too_large(value.len(), MAX_XATTR_VALUE);
        }
        if name.len() > crate::path::MAX_NAME {
            return too_large(name.len(), crate::path::MAX_NAME);
        }
        total += name.len() + value.len() + 8;
    }
    if total > MAX_XATTRS {
        return too_large(total, MAX_XATTRS);
    }
    Ok(Metadata {
        mode: entry.mode,
        uid: owner(entry.uid)?,
        gid: owner(entry.gid)?,
        mtime: entry.mtime.0,
        mtime_nsec: entry.mtime.1,
        xattrs,
    })
}

/// The uncompressed layer stream: counts, hashes, and fails on cancellation.
struct Stream<'a> {
    inner: Box<dyn Read + 'a>,
    hash: Sha256,
    left: u64,
    overflow: bool,
    cancelled: &'a AtomicBool,
}

impl Read for Stream<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.cancelled.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::ConnectionAborted.into());
        }
        let read = self.inner.read(buffer)?;
        self.hash.update(&buffer[..read]);
        match self.left.checked_sub(read as u64) {
            Some(left) => self.left = left,
            None => {
                self.overflow = true;
                return Err(io::ErrorKind::FileTooLarge.into());
            }
        }
        Ok(read)
    }
}
