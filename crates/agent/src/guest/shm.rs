//! The pod's `/dev/shm`: one tmpfs for all of its containers, as the IPC namespace is one.

use std::fs;
use std::path::Path;

use nix::mount::{MsFlags, mount};

use crate::error::{Doing, Result};

const DEFAULT_SIZE: u64 = 64 << 20;

/// Mounts it, or sets its size if it is mounted.
pub fn set_up(path: &Path, size: u64) -> Result<()> {
    let what = || "set up the pod's /dev/shm".to_owned();
    let size = if size == 0 { DEFAULT_SIZE } else { size };
    let data = format!("mode=1777,size={size}");
    let mut flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    fs::create_dir_all(path).doing(what)?;
    if is_mount_point(path) {
        flags |= MsFlags::MS_REMOUNT;
    }
    mount(Some("shm"), path, Some("tmpfs"), flags, Some(data.as_str())).doing(what)
}

fn is_mount_point(path: &Path) -> bool {
    use std::os::unix::fs::MetadataExt;
    let device = |path: &Path| fs::metadata(path).map(|meta| meta.dev()).ok();
    path.parent().is_some_and(|parent| device(path) != device(parent))
}
