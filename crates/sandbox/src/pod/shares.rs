//! Shares of a pod: its file server, started when first needed, and the host directories and files
//! that it serves.
//!
//! A share belongs to the pod, not to a container: containers that mount one directory use one
//! share, which is removed with its last user ([`super::share_plan`]). The container's record has
//! its shares before the server does.
//!
//! The server runs in the pod's cgroup and serves one virtio-fs device. If it exits, that device
//! fails for good: the pod continues, further shares are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use agent_api::SHARE_TAG;
use oci_spec::runtime::{LinuxIdMapping, Spec};

use vmm_api::shares::{Access, VERSION_ACCESS};

use super::file_server::FileServer;
use super::handle::Handle;
use super::oom_score;
use super::share_plan::{self, ShareRequest};
use super::volume_ids::volume_id;
use crate::error::Error;
use crate::host::process::{Process, start_time};
use crate::host::share::{self, ShareServer, Start, Started};
use crate::host::{blocking, cgroup};
use crate::launcher::IdRange;
use crate::model::{self, ContainerSpec, Propagation, ShareUse, Volume, VolumeSource};
use crate::policy::{Change, Container, Effect, Pod};
use crate::vmm::serial;

/// Id of the virtio-fs device in the VMM.
const DEVICE: &str = "shares";

/// Id mappings of a container's user namespace. A share maps ids on disk to the guest's ids, so
/// that the container sees them unchanged.
#[derive(Debug)]
struct Ids {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

impl Ids {
    /// None without a user namespace.
    fn of(oci: &Spec) -> Option<Self> {
        let linux = oci.linux().as_ref()?;
        let ranges = |mappings: &Option<Vec<LinuxIdMapping>>| {
            mappings.iter().flatten().map(range).collect::<Vec<_>>()
        };
        let ids = Self { uids: ranges(linux.uid_mappings()), gids: ranges(linux.gid_mappings()) };
        (!ids.uids.is_empty() && !ids.gids.is_empty()).then_some(ids)
    }
}

impl fmt::Display for Ids {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (kind, ranges) in [("uid", &self.uids), ("gid", &self.gids)] {
            for IdRange { inside, outside, count } in ranges {
                write!(f, "{kind} {inside} {outside} {count};")?;
            }
        }
        Ok(())
    }
}

fn range(mapping: &LinuxIdMapping) -> IdRange {
    IdRange { inside: mapping.container_id(), outside: mapping.host_id(), count: mapping.size() }
}

/// Shares a container's volumes; returns the shares by volume index.
pub(super) async fn prepare(
    handle: &Arc<Handle>,
    container: &str,
    spec: &ContainerSpec,
) -> Result<BTreeMap<usize, ShareUse>, Error> {
    let is_shared = |volume: &&Volume| matches!(volume.source, VolumeSource::Shared { .. });
    let mut shared = spec.volumes.iter().filter(is_shared).peekable();
    if handle.machine.host().is_some() || shared.peek().is_none() {
        return Ok(BTreeMap::new());
    }
    if shared.any(|volume| volume.propagation == Propagation::Bidirectional) {
        return Err(Error::invalid("a VM cannot propagate mounts to its host (Bidirectional)"));
    }
    let server = {
        // Not cancelled with the caller: a half-started server would leak.
        let handle = handle.clone();
        let started = tokio::spawn(async move { server(&handle).await });
        started.await.map_err(|e| Error::Internal(e.into()))??
    };
    // Held until they are in the server: other containers add and remove shares concurrently.
    let _sharing = handle.shares_lock.lock().await;
    let ids = Ids::of(&spec.oci);
    let wanted = wanted(handle, spec, ids.as_ref());
    let uses = match server.checks_access {
        true => {
            let known = uses(&handle.pod(), |_| true);
            let paths: Vec<_> = wanted.iter().map(|w| w.path.display().to_string()).collect();
            let what = format!("stat the volumes {}", paths.join(", "));
            handle.lookups.run_with_limit(what, move || share_plan::plan(&known, wanted)).await??
        }
        // A server of an earlier release: each volume has its own share.
        false => {
            let with_legacy_name = |wanted: ShareRequest| {
                let name = legacy_name(container, wanted.volume);
                wanted.named(name)
            };
            wanted.into_iter().map(with_legacy_name).collect()
        }
    };
    let change = Change::ContainerShares { id: container.to_owned(), shares: uses.clone() };
    handle.commit(vec![change]).await?;
    for share in &uses {
        add(handle, &server, share, ids.as_ref()).await?;
    }
    Ok(uses.into_iter().map(|share| (share.volume, share)).collect())
}

fn wanted(handle: &Handle, spec: &ContainerSpec, ids: Option<&Ids>) -> Vec<ShareRequest> {
    let ids = ids.map(Ids::to_string).unwrap_or_default();
    let mut wanted = Vec::new();
    for (n, volume) in spec.volumes.iter().enumerate() {
        let VolumeSource::Shared { host_path } = &volume.source else { continue };
        wanted.push(ShareRequest {
            volume: n,
            path: host_path.clone(),
            access: volume.access,
            propagation: volume.propagation,
            ids: ids.clone(),
            strict: handle.node.config.strict_volumes
                || spec.strict_volumes.contains(&volume.container_path),
        });
    }
    wanted
}

async fn add(
    handle: &Handle,
    server: &FileServer,
    share: &ShareUse,
    ids: Option<&Ids>,
) -> Result<(), Error> {
    let made = share::Share {
        access: access(&handle.pod(), &share.name, |_| true).unwrap_or(share_access(share.access)),
        propagation: match share.propagation {
            Propagation::HostToContainer => share::Propagation::Slave,
            Propagation::Private | Propagation::Bidirectional => share::Propagation::Private,
        },
        server_checks_access: server.checks_access,
    };
    let (name, source) = (&share.name, &share.source);
    let shared = match ids {
        None => server.shares.add(name, source, made).await,
        Some(Ids { uids, gids }) => {
            let (uids, gids) = (uids.clone(), gids.clone());
            let namespace = handle.node.launcher.user_namespace(uids, gids).await?;
            server.shares.add_mapped(name, source, made, namespace).await
        }
    };
    shared.map(drop)
}

fn share_access(access: model::Access) -> Access {
    match access {
        model::Access::ReadWrite => Access::ReadWrite,
        model::Access::ReadOnly => Access::ReadOnly,
        model::Access::ReadOnlyRecursive => Access::ReadOnlyRecursive,
    }
}

/// Shares in use by containers that match `of`.
fn uses(pod: &Pod, of: impl Fn(&Container) -> bool) -> Vec<ShareUse> {
    let containers = pod.containers.values().filter(|container| of(container));
    containers.flat_map(|container| container.shares.iter().cloned()).collect()
}

/// The widest access of these containers to a share; None if none uses it.
fn access(pod: &Pod, name: &str, of: impl Fn(&Container) -> bool) -> Option<Access> {
    let uses = uses(pod, of);
    uses.iter().filter(|share| share.name == name).map(|share| share_access(share.access)).max()
}

/// Name of a volume's share in a server of an earlier release.
fn legacy_name(container: &str, volume: usize) -> String {
    serial('f', volume_id(container, volume).as_bytes())
}

fn legacy_names(container: &Container) -> Vec<String> {
    let volumes = container.spec.volumes.iter().enumerate();
    let shared = volumes.filter(|(_, v)| matches!(v.source, VolumeSource::Shared { .. }));
    shared.map(|(n, _)| legacy_name(&container.id, n)).collect()
}

/// Removes those shares of a container that no other container uses; the guest has unmounted them.
/// Continues after failures.
pub(super) async fn remove(handle: &Arc<Handle>, container: &str) {
    let Ok(gone) = handle.container(container) else { return };
    let mut names: BTreeSet<String> = gone.shares.iter().map(|share| share.name.clone()).collect();
    if names.is_empty() {
        names.extend(legacy_names(&gone));
    }
    if names.is_empty() || file_server_effect(handle).is_none() {
        return;
    }
    let server = match server(handle).await {
        Ok(server) => server,
        // Without a server there are no shares.
        Err(error) => return tracing::debug!(container, %error, "no shares to remove"),
    };
    let _sharing = handle.shares_lock.lock().await;
    let pod = handle.pod();
    for name in names {
        let done = match access(&pod, &name, |other| other.id != container) {
            Some(access) if server.checks_access => server.shares.access(&name, access).await,
            Some(_) => Ok(()),
            None => server.shares.remove(&name).await,
        };
        if let Err(error) = done {
            tracing::warn!(container, %error, "cannot remove a share");
        }
    }
}

fn file_server_effect(handle: &Handle) -> Option<(u32, u64)> {
    handle.pod().ledger.iter().find_map(|effect| match effect {
        Effect::FileServer { pid, started } => Some((*pid, *started)),
        _ => None,
    })
}

fn server_ended() -> Error {
    Error::unavailable(
        "the pod's file server has ended: its shared volumes answer with errors, and new ones \
         need a new pod",
    )
}

/// The pod's server: the running one, the previous daemon's, or a new one.
async fn server(handle: &Arc<Handle>) -> Result<Arc<FileServer>, Error> {
    let mut slot = handle.shares.lock().await;
    if let Some(server) = &*slot {
        return if server.process.has_ended() { Err(server_ended()) } else { Ok(server.clone()) };
    }
    let server = match file_server_effect(handle) {
        Some((pid, started)) => {
            let failed = |e| Error::io(format!("find file server {pid}"), e);
            let process = Process::find(pid, started).map_err(failed)?;
            if handle.machine.vmm()?.status().await?.devices.iter().any(|d| d.id == DEVICE) {
                let process = process.ok_or_else(server_ended)?;
                let limit = handle.node.config.vmm_call_deadline();
                let (control, lookups) = (handle.paths.shares.clone(), handle.lookups.clone());
                let shares = ShareServer::attach(control, limit, lookups);
                let checks_access = reconcile(handle, &shares).await?;
                FileServer { shares, process, checks_access }
            } else {
                // A daemon stopped between the server's start and the plugging of the device.
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
    let (watched, pod, stopping) = (server.clone(), handle.id.clone(), handle.stopping.clone());
    tokio::spawn(async move {
        tokio::select! {
            () = stopping.cancelled() => {}
            () = watched.process.ended() => {
                tracing::error!(pod, "file server exited: the pod's shared volumes are lost");
            }
        }
    });
    Ok(server)
}

/// Removes shares whose containers are gone, and sets the access of the others. Returns whether the
/// server enforces access.
async fn reconcile(handle: &Handle, shares: &ShareServer) -> Result<bool, Error> {
    let pod = handle.pod();
    let (names, version) = shares.list().await?;
    let checks_access = version >= VERSION_ACCESS;
    let legacy: Vec<String> = pod.containers.values().flat_map(legacy_names).collect();
    for name in names {
        match access(&pod, &name, |_| true) {
            Some(access) if checks_access => shares.access(&name, access).await?,
            Some(_) => {}
            None if legacy.contains(&name) => {}
            None => shares.remove(&name).await?,
        }
    }
    Ok(checks_access)
}

async fn start(handle: &Arc<Handle>) -> Result<FileServer, Error> {
    let pod = handle.ready_pod()?;
    let leaf = pod.ledger.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, .. } => Some(leaf.clone()),
        _ => None,
    });
    let leaf = leaf.ok_or_else(|| Error::precondition("the pod has no cgroup"))?;
    let vmm = pod.vmm().map(|(pid, _)| pid);
    let log = handle.paths.directory.join("fs.log");
    let opened = {
        let (leaf, log) = (leaf.clone(), log.clone());
        blocking(move || {
            // A server started just before a crash, not journaled.
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
            lookups: handle.lookups.clone(),
        },
    );
    let started = handle.node.failpoints.wrap("host: launch the file server", started);
    let Started { server: shares, process, vhost } = started.await?;
    let pid = process.pid;
    let process =
        Process::new(pid, process.pidfd).map_err(|e| Error::io("watch the file server", e))?;
    let plugged = plug(handle, pid, vhost).await;
    if plugged.is_err() {
        if let Err(error) = process.kill() {
            tracing::warn!(pod = handle.id, %error, "cannot kill the file server");
        }
        if let Some((pid, started)) = file_server_effect(handle) {
            let effect = Effect::FileServer { pid, started };
            let _ = handle.commit(vec![Change::Undone(effect)]).await;
        }
    }
    plugged.map(|()| FileServer { shares, process, checks_access: true })
}

/// Journals the server, then plugs its device.
async fn plug(handle: &Handle, pid: u32, vhost: OwnedFd) -> Result<(), Error> {
    let started = start_time(pid).map_err(|_| server_ended())?;
    handle.commit(vec![Change::FileServerStarted { pid, started }]).await?;
    oom_score::apply(handle).await;
    handle.machine.vmm()?.add_fs(DEVICE, SHARE_TAG, vhost).await
}
