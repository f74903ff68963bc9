//! Properties of the host's file systems.

use std::collections::HashMap;
use std::fs::File;
use std::sync::{PoisonError, RwLock};

use nix::sys::statfs::{
    BTRFS_SUPER_MAGIC, EXT4_SUPER_MAGIC, FsType, OVERLAYFS_SUPER_MAGIC, TMPFS_MAGIC,
    XFS_SUPER_MAGIC, fstatfs,
};

/// File systems on which close(2) neither fails nor writes back. On others, mainly network file
/// systems, it writes back and reports errors.
const LOCAL: [FsType; 5] =
    [EXT4_SUPER_MAGIC, XFS_SUPER_MAGIC, BTRFS_SUPER_MAGIC, TMPFS_MAGIC, OVERLAYFS_SUPER_MAGIC];
/// Most file systems in the table. Attack: see [`super::stat`].
const FILE_SYSTEMS_MAX: usize = 64 << 10;

#[derive(Debug, Default)]
pub(super) struct FileSystems {
    no_flush: RwLock<HashMap<u64, bool>>,
}

impl FileSystems {
    /// Whether the guest need not send FLUSH at close(2) for files of file system `dev`, of which
    /// `file` is one.
    pub(super) fn close_needs_no_flush(&self, dev: u64, file: &File) -> bool {
        let known = self.no_flush.read().unwrap_or_else(PoisonError::into_inner).get(&dev).copied();
        known.unwrap_or_else(|| {
            let no_flush =
                fstatfs(file).is_ok_and(|found| LOCAL.contains(&found.filesystem_type()));
            let mut all = self.no_flush.write().unwrap_or_else(PoisonError::into_inner);
            if all.len() < FILE_SYSTEMS_MAX {
                all.insert(dev, no_flush);
            }
            no_flush
        })
    }
}
