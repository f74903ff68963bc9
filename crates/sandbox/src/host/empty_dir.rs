//! Attributes of a kubelet's emptyDir on the host, for the one in the guest.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::error::Error;

const PERMISSIONS: u32 = 0o7777;

/// Owner and permissions of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Ownership {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) mode: u32,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) struct EmptyDirInfo {
    /// A tmpfs (medium Memory).
    pub(crate) memory: bool,
    /// Size limit, bytes; 0: none.
    pub(crate) size_limit: u64,
    pub(crate) owned: Ownership,
    pub(crate) is_empty: bool,
}

/// Blocks.
pub(crate) fn inspect(directory: &Path) -> Result<EmptyDirInfo, Error> {
    read_info(directory).map_err(|e| Error::io(format!("stat emptyDir {}", directory.display()), e))
}

fn read_info(directory: &Path) -> io::Result<EmptyDirInfo> {
    let meta = fs::symlink_metadata(directory)?;
    if !meta.is_dir() {
        return Err(io::ErrorKind::NotADirectory.into());
    }
    let parent = directory.parent().unwrap_or(Path::new("/"));
    let is_mount = fs::metadata(parent)?.dev() != meta.dev();
    let system = statfs(directory)?;
    // Size of the file system, or the limit of a directory with a project quota (ext4, XFS).
    let size = system.blocks().saturating_mul(system.block_size().unsigned_abs());
    let memory = is_mount && system.filesystem_type() == TMPFS_MAGIC;
    let limited = !is_mount && system.blocks() < statfs(parent)?.blocks();
    Ok(EmptyDirInfo {
        memory,
        size_limit: if memory || limited { size } else { 0 },
        owned: owned(&meta),
        is_empty: fs::read_dir(directory)?.next().is_none(),
    })
}

fn owned(meta: &fs::Metadata) -> Ownership {
    Ownership { uid: meta.uid(), gid: meta.gid(), mode: meta.mode() & PERMISSIONS }
}

/// Ownership of a directory, or of a file's parent directory. Blocks.
pub(crate) fn owner(path: &Path) -> io::Result<Ownership> {
    let meta = fs::metadata(path)?;
    match path.parent() {
        Some(parent) if !meta.is_dir() => fs::metadata(parent).map(|meta| owned(&meta)),
        _ => Ok(owned(&meta)),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_directory_and_a_tmpfs_are_distinguished() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("cache");
        fs::create_dir(&directory).unwrap();
        fs::set_permissions(&directory, fs::Permissions::from_mode(0o2775)).unwrap();
        let meta = fs::metadata(&directory).unwrap();
        let owned = Ownership { uid: meta.uid(), gid: meta.gid(), mode: 0o2775 };
        let expected = EmptyDirInfo { memory: false, size_limit: 0, owned, is_empty: true };
        assert_eq!(inspect(&directory).unwrap(), expected);
        fs::write(directory.join("file"), "x").unwrap();
        assert!(!inspect(&directory).unwrap().is_empty);
        assert_eq!(owner(&directory).unwrap(), owned);
        assert_eq!(owner(&directory.join("file")).unwrap(), owned);
        assert!(inspect(&directory.join("file")).is_err());
        let shm = Path::new("/dev/shm");
        let is_mount = fs::metadata(shm).is_ok_and(|shm| shm.dev() != meta.dev())
            && statfs(shm).is_ok_and(|system| system.filesystem_type() == TMPFS_MAGIC)
            && fs::metadata("/dev").unwrap().dev() != fs::metadata(shm).unwrap().dev();
        if is_mount {
            let found = inspect(shm).unwrap();
            assert!(found.memory && found.size_limit > 0 && found.owned.mode == 0o1777);
        }
    }
}
