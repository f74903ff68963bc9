//! Mounts, and unmounts what may be busy or late.

use std::fs;
use std::path::Path;
use std::time::Duration;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::blocking::{MOUNT_TIMEOUT, Pool};
use crate::error::{Context, Result};

/// Time in which a mount may stay busy: the mount namespace ends shortly after its last process.
const BUSY_DEADLINE: Duration = Duration::from_secs(5);

/// Undoes a mount that succeeded after its deadline.
pub(super) fn detach(target: &Path) {
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    if let Err(error) = umount2(target, flags) {
        tracing::warn!(target = %target.display(), %error, "cannot unmount a late mount");
    }
}

pub(super) fn mount_at(
    source: &Path,
    target: &Path,
    kind: &str,
    flags: MsFlags,
    data: &str,
) -> Result<()> {
    let what = || format!("mount {} ({kind}) at {}", source.display(), target.display());
    fs::create_dir_all(target).context(what)?;
    mount(Some(source), target, Some(kind), flags, Some(data)).context(what)
}

pub(super) async fn unmount(pool: &Pool, target: &Path) -> Result<()> {
    let deadline = tokio::time::Instant::now() + BUSY_DEADLINE;
    let mut pause = Duration::from_millis(1);
    loop {
        let path = target.to_owned();
        let work = move || Ok(umount2(&path, MntFlags::UMOUNT_NOFOLLOW));
        let result =
            pool.run(&format!("unmount {}", target.display()), MOUNT_TIMEOUT, work).await?;
        match result {
            // EINVAL: not a mount point.
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(100));
            }
            Err(error) => {
                return Err(error).context(|| format!("unmount {}", target.display()));
            }
        }
    }
}
