//! Durable files: readers see the old or the new content, also after a crash.

use std::fs::{self, File};
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::error::Error;

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
