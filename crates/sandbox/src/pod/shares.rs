//! Folders and files of the host that are shared with the guest: the pod's file server, started at
//! the first of them, and its shares.
//!
//! The server lives in the pod's cgroup and serves one virtio-fs device. If it dies, that device
//! answers with errors for ever: the pod goes on, further shares are refused.

use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use agent_api::SHARE_TAG;
use oci_spec::runtime::{LinuxIdMapping, Spec};

use super::handle::Handle;
use super::volumes::volume_id;
use crate::error::Error;
use crate::host::process::{Process, start_time};
use crate::host::share::{self, ReadOnly, ShareServer, Start, Started};
use crate::host::{blocking, cgroup};
use crate::launcher::IdRange;
use crate::model::{Access, ContainerSpec, Propagation, Volume, VolumeSource};
use crate::policy::{Change, Effect};
use crate::vmm::serial;

/// Id of the device in the VMM.
const DEVICE: &str = "shares";

/// A running file server.
#[derive(Debug)]
pub(super) struct Server {
    shares: ShareServer,
    process: Process,
}

/// Name of a share; a volume's own is longer than a share's may be.
pub(super) fn name(volume_id: &str) -> String {
    serial('f', volume_id.as_bytes())
}

/// How a container's user namespace maps ids; a share shows what stands on the disk as the guest
/// knows those ids, so that the container sees them as they are.
#[derive(Debug)]
pub(super) struct Ids {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

impl Ids {
    /// None: the container has no user namespace.
    pub(super) fn of(oci: &Spec) -> Option<Self> {
        let linux = oci.linux().as_ref()?;
        let ranges = |mappings: &Option<Vec<LinuxIdMapping>>| {
            mappings.iter().flatten().map(range).collect::<Vec<_>>()
        };
        let ids = Self { uids: ranges(linux.uid_mappings()), gids: ranges(linux.gid_mappings()) };
        (!ids.uids.is_empty() && !ids.gids.is_empty()).then_some(ids)
    }
}

fn range(mapping: &LinuxIdMapping) -> IdRange {
    IdRange { inside: mapping.container_id(), outside: mapping.host_id(), count: mapping.size() }
}

/// Shares a volume of the host under `name`.
pub(super) async fn add(
    handle: &Arc<Handle>,
    name: &str,
    source: &Path,
    volume: &Volume,
    ids: Option<Ids>,
) -> Result<(), Error> {
    let server = {
        // Goes on when our caller gives up: a server half started would be nobody's.
        let handle = handle.clone();
        let started = tokio::spawn(async move { server(&handle).await });
        started.await.map_err(|e| Error::Internal(e.into()))??
    };
    let share = share::Share {
        read_only: match volume.access {
            Access::ReadWrite => ReadOnly::No,
            Access::ReadOnly => ReadOnly::Top,
            Access::ReadOnlyRecursive => ReadOnly::Recursive,
        },
        propagation: match volume.propagation {
            Propagation::Private => share::Propagation::Private,
            Propagation::HostToContainer => share::Propagation::Slave,
            Propagation::Bidirectional => {
                return Err(Error::invalid("mounts of a VM cannot appear on its host"));
            }
        },
    };
    let shared = match ids {
        None => server.shares.add(name, source, share).await,
        Some(Ids { uids, gids }) => {
            let namespace = handle.node.launcher.user_namespace(uids, gids).await?;
            server.shares.add_mapped(name, source, share, namespace).await
        }
    };
    shared.map(drop)
}

/// Shares that a container has.
fn names(container: &str, spec: &ContainerSpec) -> Vec<String> {
    let volumes = spec.volumes.iter().enumerate();
    let shared = volumes.filter(|(_, v)| matches!(v.source, VolumeSource::Shared { .. }));
    shared.map(|(n, _)| name(&volume_id(container, n))).collect()
}

/// Takes a container's shares away; the guest uses them no more. Goes on past failures.
pub(super) async fn remove(handle: &Arc<Handle>, container: &str, spec: &ContainerSpec) {
    let names = names(container, spec);
    if names.is_empty() || find_effect(handle).is_none() {
        return;
    }
    let server = match server(handle).await {
        Ok(server) => server,
        // With the server its shares are gone.
        Err(error) => return tracing::debug!(container, %error, "no shares to be removed"),
    };
    for name in names {
        if let Err(error) = server.shares.remove(&name).await {
            tracing::warn!(container, %error, "a share stays until the pod ends");
        }
    }
}

fn find_effect(handle: &Handle) -> Option<(u32, u64)> {
    handle.pod().ledger.iter().find_map(|effect| match effect {
        Effect::FileServer { pid, started } => Some((*pid, *started)),
        _ => None,
    })
}

fn gone() -> Error {
    Error::unavailable(
        "the pod's file server has ended: its shared volumes answer with errors, and new ones \
         need a new pod",
    )
}

/// The pod's server: the one that runs, the one that a former daemon has left, or a new one.
async fn server(handle: &Arc<Handle>) -> Result<Arc<Server>, Error> {
    let mut slot = handle.shares.lock().await;
    if let Some(server) = &*slot {
        return if server.process.has_ended() { Err(gone()) } else { Ok(server.clone()) };
    }
    let server = match find_effect(handle) {
        Some((pid, started)) => {
            let failed = |e| Error::io(format!("look for file server {pid}"), e);
            let process = Process::find(pid, started).map_err(failed)?;
            if handle.machine.vmm()?.status().await?.devices.iter().any(|d| d.id == DEVICE) {
                let process = process.ok_or_else(gone)?;
                let limit = handle.node.config.vmm_call_deadline();
                let shares = ShareServer::attach(handle.paths.shares.clone(), limit);
                remove_strangers(handle, &shares).await?;
                Server { shares, process }
            } else {
                // A daemon died between its start and the plugging of the device.
                if let Some(process) = process {
                    process.kill().map_err(failed)?;
                }
                let effect = Effect::FileServer { pid, started };
                handle.commit(vec![Change::Undone(effect)]).await?;
                start(handle).await?
            }
        }
        None => start(handle).await?,
    };
    let server = Arc::new(server);
    *slot = Some(server.clone());
    let (watched, pod, closing) = (server.clone(), handle.id.clone(), handle.closing.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = closing.cancelled() => {}
            () = watched.process.ended() => {
                tracing::error!(pod, "file server has ended: the pod's shared volumes are lost");
            }
        }
    });
    Ok(server)
}

/// Shares whose containers have gone while no daemon looked.
async fn remove_strangers(handle: &Handle, shares: &ShareServer) -> Result<(), Error> {
    let pod = handle.pod();
    let known: Vec<_> = pod.containers.values().flat_map(|c| names(&c.id, &c.spec)).collect();
    for stranger in shares.list().await?.iter().filter(|name| !known.contains(name)) {
        shares.remove(stranger).await?;
    }
    Ok(())
}

async fn start(handle: &Arc<Handle>) -> Result<Server, Error> {
    let pod = handle.ready_pod()?;
    let leaf = pod.ledger.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, .. } => Some(leaf.clone()),
        _ => None,
    });
    let leaf = leaf.ok_or_else(|| Error::precondition("the pod has no cgroup any more"))?;
    let vmm = pod.vmm().map(|(pid, _)| pid);
    let log = handle.paths.folder.join("fs.log");
    let opened = {
        let (leaf, log) = (leaf.clone(), log.clone());
        blocking(move || {
            // One that a daemon started just before its death, journaled by nobody.
            cgroup::kill_others(&leaf, vmm)?;
            Ok((File::open(&leaf)?, fs::OpenOptions::new().append(true).create(true).open(&log)?))
        })
    };
    let opened: std::io::Result<(File, File)> = opened.await;
    let (cgroup, stderr) = opened.map_err(|e| Error::io("prepare the file server", e))?;
    let started = ShareServer::start(
        &*handle.node.launcher,
        Start {
            exe: handle.node.config.file_server(),
            control: handle.paths.shares.clone(),
            cgroup: OwnedFd::from(cgroup),
            stderr: stderr.into(),
            limit: handle.node.config.vmm_call_deadline(),
        },
    );
    let Started { server: shares, process, vhost } = started.await?;
    let pid = process.pid;
    let process = Process::new(pid, process.pidfd).map_err(|e| Error::io("watch a process", e))?;
    let plugged = plug(handle, pid, vhost).await;
    if plugged.is_err() {
        if let Err(error) = process.kill() {
            tracing::warn!(pod = handle.id, %error, "file server stays until the pod ends");
        }
        if let Some((pid, started)) = find_effect(handle) {
            let effect = Effect::FileServer { pid, started };
            let _ = handle.commit(vec![Change::Undone(effect)]).await;
        }
    }
    plugged.map(|()| Server { shares, process })
}

/// Writes the server down, then lets the guest see it.
async fn plug(handle: &Handle, pid: u32, vhost: OwnedFd) -> Result<(), Error> {
    let started = start_time(pid).map_err(|_| gone())?;
    handle.commit(vec![Change::FileServerStarted { pid, started }]).await?;
    handle.machine.vmm()?.add_fs(DEVICE, SHARE_TAG, vhost).await
}
