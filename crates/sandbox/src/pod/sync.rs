//! Volumes that are kept in step with a folder of the host while their container lives (ConfigMap,
//! Secret, projected, downward API): a copy in the guest, replaced in one step whenever the host's
//! `..data` link points elsewhere.
//!
//! ```text
//! watch the folder -> look at ..data -> other than shown? -> copy, swap -> wait for a change
//!        ^                                   | fails: pause, longer each time         |
//!        +-----------------------------------+----------------------------------------+
//! ```

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use super::disks::swap_volume;
use super::handle::Handle;
use super::volumes::volume_id;
use crate::error::Error;
use crate::host::volumes::{Limits, current, generation};
use crate::host::watch::Watch;
use crate::model::VolumeSource;
use crate::policy::Container;

/// Such a volume stands in our memory while it is copied: at most this much of it, bytes. A kubelet
/// makes none of more than a few MiB.
const MAX_BYTES: u64 = 16 << 20;
/// A writer makes several changes at once.
const DEBOUNCE: Duration = Duration::from_millis(20);
const RETRY_FIRST: Duration = Duration::from_millis(200);
const RETRY_MOST: Duration = Duration::from_secs(30);
/// Looks without having been told: always, and where the host cannot tell.
const LOOK_ANYWAY: Duration = Duration::from_secs(60);
const POLL: Duration = Duration::from_secs(5);

/// A volume and what of it the guest has.
#[derive(Debug)]
pub(super) struct Synced {
    id: String,
    folder: PathBuf,
    /// None: not known.
    shown: Option<OsString>,
    /// A copy may have been given up half-way.
    torn: bool,
}

/// Brings a volume into the guest.
pub(super) async fn first(handle: &Handle, id: String, folder: PathBuf) -> Result<Synced, Error> {
    let mut volume = Synced { id, folder, shown: None, torn: false };
    copy(handle, &mut volume).await?;
    Ok(volume)
}

/// Keeps volumes in step from now on.
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

/// After a restart of the daemon: what the guest has is not known.
pub(super) fn start_again(handle: &Arc<Handle>, container: &Container) {
    let volumes = container.spec.volumes.iter().enumerate();
    let synced = volumes.filter_map(|(n, volume)| match &volume.source {
        VolumeSource::Synced { host_path } => Some(Synced {
            id: volume_id(&container.id, n),
            folder: host_path.clone(),
            shown: None,
            torn: true,
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
        () = handle.closing.cancelled() => {}
        () = follow(&handle, &mut volume) => {}
    }
}

async fn follow(handle: &Handle, volume: &mut Synced) {
    let mut pause = RETRY_FIRST;
    loop {
        // Armed before the look, so that nothing is missed in between.
        let (watcher, folder) = (handle.node.watcher.clone(), volume.folder.clone());
        let what = format!("watch {}", folder.display());
        let armed = handle.lookups.look(what, move || watcher.watch(&folder)).await;
        let looked = match armed {
            Ok(watch) => look(handle, volume).await.map(|()| watch),
            Err(e) => Err(e),
        };
        match looked {
            Ok(watch) => {
                pause = RETRY_FIRST;
                wait(watch).await;
            }
            Err(error) => {
                let folder = volume.folder.display();
                tracing::warn!(pod = handle.id, %folder, %error, "volume is not in step");
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(RETRY_MOST);
            }
        }
    }
}

async fn wait(watch: Option<Watch>) {
    let Some(mut watch) = watch else { return tokio::time::sleep(POLL).await };
    match tokio::time::timeout(LOOK_ANYWAY, watch.changed()).await {
        Ok(true) => tokio::time::sleep(DEBOUNCE).await,
        Ok(false) => tokio::time::sleep(POLL).await,
        Err(_) => {}
    }
}

async fn look(handle: &Handle, volume: &mut Synced) -> Result<(), Error> {
    let folder = volume.folder.clone();
    let what = format!("look at {}", folder.display());
    let now = handle.lookups.look(&*what, move || current(&folder)).await?;
    let now = now.map_err(|e| Error::io(what, e))?;
    // What was there once is not taken away: a kubelet that tears the volume down empties it.
    if now.is_empty() || volume.shown.as_ref() == Some(&now) {
        return Ok(());
    }
    copy(handle, volume).await
}

async fn copy(handle: &Handle, volume: &mut Synced) -> Result<(), Error> {
    let config = &handle.node.config;
    let limits = Limits { bytes: config.volume_bytes.min(MAX_BYTES), files: config.volume_files };
    let folder = volume.folder.clone();
    let what = format!("read {}", folder.display());
    let read = handle.lookups.look(what, move || generation(&folder, limits)).await??;
    // Two generations stand side by side for a moment, and tmpfs counts pages.
    let size = 4 * limits.bytes;
    let torn = std::mem::replace(&mut volume.torn, true);
    swap_volume(&handle.guest, &volume.id, read.batches, size, torn).await?;
    volume.torn = false;
    volume.shown = Some(read.name);
    Ok(())
}
