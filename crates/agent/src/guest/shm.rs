//! IPC resources that the pod's containers share: `/dev/shm`, one tmpfs for all, and POSIX message
//! queues.

use std::fs;
use std::os::unix::fs::chown;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::error::{Context, Result};
use crate::oci::userns::Mapping;

const DEFAULT_SIZE: u64 = 64 << 20;

/// Mounts the tmpfs, or changes its size (bytes; 0 for 64 MiB) if it is mounted.
pub fn set_up(path: &Path, size: u64) -> Result<()> {
    let what = || "mount the pod's /dev/shm".to_owned();
    let size = if size == 0 { DEFAULT_SIZE } else { size };
    let data = format!("mode=1777,size={size}");
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    fs::create_dir_all(path).context(what)?;
    if is_mount_point(path) {
        flags |= MsFlags::MS_REMOUNT;
    }
    mount(Some("shm"), path, Some("tmpfs"), flags, Some(data.as_str())).context(what)
}

/// Makes the root of the pod's user namespace its owner.
pub fn set_owner(path: &Path, mapping: &Mapping) -> Result<()> {
    let (uid, gid) = mapping.root();
    chown(path, Some(uid), Some(gid)).context(|| "chown /dev/shm to the pod's root".to_owned())
}

/// Mounts the pod's mqueue file system, as the source of bind mounts for containers in a user
/// namespace.
pub fn mount_mqueue(path: &Path) -> Result<()> {
    let what = || "mount the pod's message queues".to_owned();
    fs::create_dir_all(path).context(what)?;
    if is_mount_point(path) {
        return Ok(());
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    mount(Some("mqueue"), path, Some("mqueue"), flags, None::<&str>).context(what)
}

pub(super) fn is_mount_point(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    path.parent().is_some_and(|parent| device(path) != device(parent))
}
