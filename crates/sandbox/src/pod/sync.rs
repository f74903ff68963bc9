//! Volumes that follow a host directory while their container lives (ConfigMap, Secret, projected,
//! downward API): a copy in the guest, replaced atomically when the host's `..data` link changes.
//!
//! ```text
//! watch the directory -> read ..data -> changed? -> copy, swap -> wait for an event
//!        ^                                 | fails: backoff                |
//!        +---------------------------------+-------------------------------+
//! ```

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::disks::swap_volume;
use super::handle::Handle;
use super::volume_ids::volume_id;
use crate::error::Error;
use crate::host::volumes::{Limits, current, generation};
use crate::host::watch::Watch;
use crate::model::VolumeSource;
use crate::policy::Container;

/// A volume is held in memory while it is copied: at most this many bytes. A kubelet's are at most
/// a few MiB.
const MAX_BYTES: u64 = 16 << 20;
/// Delay after a change, as a writer makes several at once.
const DEBOUNCE: Duration = Duration::from_millis(20);
const RETRY_MIN: Duration = Duration::from_millis(200);
const RETRY_MAX: Duration = Duration::from_secs(30);
/// Interval of checks without a notification: with a watch, and without one.
const RECHECK: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_secs(5);

/// A volume and its state in the guest.
#[derive(Debug)]
pub(super) struct Synced {
    id: String,
    directory: PathBuf,
    /// Generation in the guest; None: unknown.
    shown: Option<OsString>,
    /// A copy may have been aborted.
    incomplete: bool,
}

/// Copies a volume into the guest for the first time.
pub(super) async fn initial_copy(
    handle: &Handle,
    id: String,
    directory: PathBuf,
) -> Result<Synced, Error> {
    let mut volume = Synced { id, directory, shown: None, incomplete: false };
    copy(handle, &mut volume).await?;
    Ok(volume)
}

/// Starts updating volumes.
pub(super) fn start(handle: &Arc<Handle>, container: &str, volumes: Vec<Synced>) {
    if volumes.is_empty() {
        return;
    }
    let mut tasks = JoinSet::new();
    for volume in volumes {
        tasks.spawn(keep(handle.clone(), container.to_owned(), volume));
    }
    handle.set_syncs(container, tasks);
}

/// After a restart of the daemon: the generation in the guest is unknown.
pub(super) fn resume(handle: &Arc<Handle>, container: &Container) {
    let volumes = container.spec.volumes.iter().enumerate();
    let synced = volumes.filter_map(|(n, volume)| match &volume.source {
        VolumeSource::Synced { host_path } => Some(Synced {
            id: volume_id(&container.id, n),
            directory: host_path.clone(),
            shown: None,
            incomplete: true,
        }),
        _ => None,
    });
    start(handle, &container.id, synced.collect());
}

async fn keep(handle: Arc<Handle>, container: String, mut volume: Synced) {
    let ended =
        handle.wait_for(|pod| pod.containers.get(&container).is_none_or(|c| c.exit.is_some()));
    tokio::select! {
        _ = ended => {}
        () = handle.stopping.cancelled() => {}
        () = follow(&handle, &mut volume) => {}
    }
}

async fn follow(handle: &Handle, volume: &mut Synced) {
    let mut pause = RETRY_MIN;
    loop {
        // Watch before the check, so that no change is missed.
        let (watcher, directory) = (handle.node.watcher.clone(), volume.directory.clone());
        let what = format!("watch {}", directory.display());
        let watching = handle.lookups.run_with_limit(what, move || watcher.watch(&directory)).await;
        let updated = match watching {
            Ok(watch) => copy_if_changed(handle, volume).await.map(|()| watch),
            Err(e) => Err(e),
        };
        match updated {
            Ok(watch) => {
                pause = RETRY_MIN;
                wait(watch).await;
            }
            Err(error) => {
                let directory = volume.directory.display();
                tracing::warn!(pod = handle.id, %directory, %error, "cannot update a volume");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MAX);
            }
        }
    }
}

async fn wait(watch: Option<Watch>) {
    let Some(mut watch) = watch else { return tokio::time::sleep(POLL).await };
    match tokio::time::timeout(RECHECK, watch.changed()).await {
        Ok(true) => tokio::time::sleep(DEBOUNCE).await,
        Ok(false) => tokio::time::sleep(POLL).await,
        Err(_) => {}
    }
}

async fn copy_if_changed(handle: &Handle, volume: &mut Synced) -> Result<(), Error> {
    let directory = volume.directory.clone();
    let what = format!("access {}", directory.display());
    let now = handle.lookups.run_with_limit(&*what, move || current(&directory)).await?;
    let now = now.map_err(|e| Error::io(what, e))?;
    // Content is never removed: a kubelet that tears the volume down empties it.
    if now.is_empty() || volume.shown.as_ref() == Some(&now) {
        return Ok(());
    }
    copy(handle, volume).await
}

async fn copy(handle: &Handle, volume: &mut Synced) -> Result<(), Error> {
    let config = &handle.node.config;
    let limits = Limits { bytes: config.volume_bytes.min(MAX_BYTES), files: config.volume_files };
    let directory = volume.directory.clone();
    let what = format!("read {}", directory.display());
    let read =
        handle.lookups.run_with_limit(what, move || generation(&directory, limits)).await??;
    // Two generations exist for a moment, and tmpfs counts pages.
    let size = 4 * limits.bytes;
    let incomplete = std::mem::replace(&mut volume.incomplete, true);
    swap_volume(&handle.guest, &volume.id, read.batches, size, incomplete).await?;
    volume.incomplete = false;
    volume.shown = Some(read.name);
    Ok(())
}
