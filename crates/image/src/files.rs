//! Durable files (readers see the old or the new content, also after a crash) and the free-space
//! check of their file system.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::Error;

/// Bytes written between two checks of the free space.
pub const SPACE_CHECK_INTERVAL: u64 = 64 << 20;
/// Upper bound of [`Space`]'s reserve in bytes.
const MAX_RESERVE: u64 = 1 << 30;

pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), Error> {
    let partial = path.with_extension("partial");
    let written = File::create(&partial)
        .and_then(|mut file| {
            file.write_all(bytes)?;
            file.sync_all()
        })
        .and_then(|()| fs::rename(&partial, path));
    if let Err(source) = written {
        let _ = fs::remove_file(&partial);
        return Err(Error::io("write", path, source));
    }
    sync_directory(path.parent().expect("files of the store have a parent directory"))
}

pub fn sync_directory(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|dir| dir.sync_all()).map_err(|e| Error::io("sync", path, e))
}

pub fn create_directory(path: &Path) -> Result<(), Error> {
    fs::create_dir_all(path).map_err(|e| Error::io("create", path, e))
}

pub fn remove_directory(path: &Path) -> Result<(), Error> {
    fs::remove_dir_all(path).map_err(|e| Error::io("remove", path, e))
}

/// Removes a file, or a directory with what is in it.
pub fn remove_any(path: &Path) -> Result<(), Error> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => fs::remove_dir_all(path),
        _ => fs::remove_file(path),
    };
    removed.map_err(|e| Error::io("remove", path, e))
}

/// Entries of a directory with their names; names that are not UTF-8 are skipped.
pub fn list(path: &Path) -> Result<Vec<(String, fs::DirEntry)>, Error> {
    let entries = fs::read_dir(path).map_err(|e| Error::io("list", path, e))?;
    let mut list = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| Error::io("list", path, e))?;
        if let Ok(name) = entry.file_name().into_string() {
            list.push((name, entry));
        }
    }
    Ok(list)
}

/// Bytes on disk and number of files of `path`, recursively. Files that vanish during the walk are
/// not counted.
pub fn usage(path: &Path) -> (u64, u64) {
    let (mut bytes, mut inodes) =
        fs::symlink_metadata(path).map_or((0, 0), |metadata| (metadata.blocks() * 512, 1));
    let mut directories = vec![path.to_owned()];
    while let Some(directory) = directories.pop() {
        let Ok(entries) = fs::read_dir(&directory) else { continue };
        for entry in entries.flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            // st_blocks counts units of 512 bytes (stat(2)).
            bytes += metadata.blocks() * 512;
            inodes += 1;
            if metadata.is_dir() {
                directories.push(entry.path());
            }
        }
    }
    (bytes, inodes)
}

/// Free space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    free: u64,
    /// 2 % of the file system, at most 1 GiB, which neither images nor downloads may use: the
    /// node's other components need it.
    reserve: u64,
}

impl Space {
    /// Of the file system that contains this file.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = nix::sys::statvfs::fstatvfs(file)?;
        let total = stat.blocks() as u64 * stat.fragment_size() as u64;
        let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
        Ok(Self::new(total, free))
    }

    fn new(total: u64, free: u64) -> Self {
        // Some file systems report no block count.
        let free = if total == 0 { u64::MAX } else { free };
        Self { free, reserve: (total / 50).min(MAX_RESERVE) }
    }

    /// Fails unless `needed` bytes fit without using the reserve.
    pub fn check(self, needed: u64) -> io::Result<()> {
        let Self { free, reserve } = self;
        if free >= reserve.saturating_add(needed) {
            return Ok(());
        }
        let message = match needed {
            0 => format!("{free} bytes are free, {reserve} are reserved for the node"),
            _ => format!(
                "{needed} bytes are needed, {free} are free, of which {reserve} are reserved for \
                 the node"
            ),
        };
        Err(io::Error::new(io::ErrorKind::StorageFull, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_kept_for_the_node() {
        for (total, reserve) in [(100 << 20, 2 << 20), (1 << 40, MAX_RESERVE)] {
            let space = Space::new(total, reserve + 10);
            space.check(0).unwrap();
            space.check(10).unwrap();
            let error = space.check(11).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            let message = format!("11 bytes are needed, {} are free", reserve + 10);
            assert!(error.to_string().starts_with(&message), "{error}");
            Space::new(total, reserve - 1).check(0).unwrap_err();
            space.check(u64::MAX).unwrap_err();
        }
        Space::new(0, 0).check(1 << 40).unwrap();
    }

    #[test]
    fn the_free_space_of_a_real_file_system_is_read() {
        let file = tempfile::tempfile().unwrap();
        assert!(Space::of(&file).unwrap().free > 0);
    }
}
