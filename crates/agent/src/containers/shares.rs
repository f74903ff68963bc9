//! Volumes on the pod's share.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use crate::agent::Agent;
use crate::blocking::{LOOKUP_TIMEOUT, MOUNT_TIMEOUT, Pool, with_timeout};
use crate::error::Result;
use crate::guest::share;

/// Opens an entry of the pod's share, or `sub_path` in it.
pub(super) async fn open_share(
    agent: &Agent,
    pool: &Pool,
    operation: String,
    id: &str,
    sub_path: &str,
) -> Result<OwnedFd> {
    agent.config.require_vm()?;
    let wait = Arc::clone(&agent.share).lock_owned();
    let mut share = with_timeout("lock the pod's share", MOUNT_TIMEOUT, wait).await?;
    // The lock is held for the mount only. A path lookup may reach a mount that a container made in
    // the share.
    let mount = move || share.mount().map(|()| share.mount_point().to_owned());
    let at = pool.run("mount the pod's share", MOUNT_TIMEOUT, mount).await?;
    let (id, sub_path) = (id.to_owned(), sub_path.to_owned());
    pool.run(&operation, LOOKUP_TIMEOUT, move || share::open(&at, &id, &sub_path)).await
}
