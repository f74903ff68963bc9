//! Folders and files of the host that are shared with the guest: the pod's file server, started at
//! the first of them, and its shares.
//!
//! A share is one of the pod, not of a container: those that mount one folder have one share, which
//! goes with the last of them ([`super::share_plan`]). Who uses which stands with the container, in
//! the journal, before the server has it.
//!
//! The server lives in the pod's cgroup and serves one virtio-fs device. If it dies, that device
//! answers with errors for ever: the pod goes on, further shares are refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use agent_api::SHARE_TAG;
use oci_spec::runtime::{LinuxIdMapping, Spec};

use vmm_api::shares::{Access, VERSION_ACCESS};

use super::handle::Handle;
use super::oom_score;
use super::share_plan::{self, Wanted};
use super::volumes::volume_id;
use crate::error::Error;
use crate::host::process::{Process, start_time};
use crate::host::share::{self, ShareServer, Start, Started};
use crate::host::{blocking, cgroup};
use crate::launcher::IdRange;
use crate::model::{self, ContainerSpec, Propagation, ShareUse, Volume, VolumeSource};
use crate::policy::{Change, Container, Effect, Pod};
use crate::vmm::serial;

/// Id of the device in the VMM.
const DEVICE: &str = "shares";

/// A running file server.
#[derive(Debug)]
pub(super) struct Server {
    shares: ShareServer,
    process: Process,
    /// It protects shares by what their users may write to (`vmm_api::shares::Access`).
    keeps_access: bool,
}

/// How a container's user namespace maps ids; a share shows what stands on the disk as the guest
/// knows those ids, so that the container sees them as they are.
#[derive(Debug)]
struct Ids {
    uids: Vec<IdRange>,
    gids: Vec<IdRange>,
}

impl Ids {
    /// None: the container has no user namespace.
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

/// Shares what a container's volumes need of the host; by the volume's number.
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
        return Err(Error::invalid("mounts of a VM cannot appear on its host"));
    }
    let server = {
        // Goes on when our caller gives up: a server half started would be nobody's.
        let handle = handle.clone();
        let started = tokio::spawn(async move { server(&handle).await });
        started.await.map_err(|e| Error::Internal(e.into()))??
    };
    // Until they are in the server: those of another container go meanwhile, and come.
    let _sharing = handle.sharing.lock().await;
    let ids = Ids::of(&spec.oci);
    let wanted = wanted(handle, spec, ids.as_ref());
    let uses = match server.keeps_access {
        true => {
            let known = uses(&handle.pod(), |_| true);
            let paths: Vec<_> = wanted.iter().map(|w| w.path.display().to_string()).collect();
            let what = format!("look at the volumes {}", paths.join(", "));
            handle.lookups.look(what, move || share_plan::plan(&known, wanted)).await??
        }
        // A server of the release before: each volume has a share of its own.
        false => {
            let named = |wanted: Wanted| {
                let name = former_name(container, wanted.volume);
                wanted.under(name)
            };
            wanted.into_iter().map(named).collect()
        }
    };
    let change = Change::ContainerShares { id: container.to_owned(), shares: uses.clone() };
    handle.commit(vec![change]).await?;
    for share in &uses {
        add(handle, &server, share, ids.as_ref()).await?;
    }
    Ok(uses.into_iter().map(|share| (share.volume, share)).collect())
}

fn wanted(handle: &Handle, spec: &ContainerSpec, ids: Option<&Ids>) -> Vec<Wanted> {
    let ids = ids.map(Ids::to_string).unwrap_or_default();
    let mut wanted = Vec::new();
    for (n, volume) in spec.volumes.iter().enumerate() {
        let VolumeSource::Shared { host_path } = &volume.source else { continue };
        wanted.push(Wanted {
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
    server: &Server,
    share: &ShareUse,
    ids: Option<&Ids>,
) -> Result<(), Error> {
    let made = share::Share {
        access: access(&handle.pod(), &share.name, |_| true).unwrap_or(share_access(share.access)),
        propagation: match share.propagation {
            Propagation::HostToContainer => share::Propagation::Slave,
            Propagation::Private | Propagation::Bidirectional => share::Propagation::Private,
        },
        kept: server.keeps_access,
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

/// What containers of the pod have shared.
fn uses(pod: &Pod, of: impl Fn(&Container) -> bool) -> Vec<ShareUse> {
    let containers = pod.containers.values().filter(|container| of(container));
    containers.flat_map(|container| container.shares.iter().cloned()).collect()
}

/// What these containers may write to in a share; none of them has it otherwise.
fn access(pod: &Pod, name: &str, of: impl Fn(&Container) -> bool) -> Option<Access> {
    let uses = uses(pod, of);
    uses.iter().filter(|share| share.name == name).map(|share| share_access(share.access)).max()
}

/// Name of the share of a container's volume in a server of the release before.
fn former_name(container: &str, volume: usize) -> String {
    serial('f', volume_id(container, volume).as_bytes())
}

fn former_names(container: &Container) -> Vec<String> {
    let volumes = container.spec.volumes.iter().enumerate();
    let shared = volumes.filter(|(_, v)| matches!(v.source, VolumeSource::Shared { .. }));
    shared.map(|(n, _)| former_name(&container.id, n)).collect()
}

/// Takes away those of a container's shares that no other one has; the guest uses them no more.
/// Goes on past failures.
pub(super) async fn remove(handle: &Arc<Handle>, container: &str) {
    let Ok(gone) = handle.container(container) else { return };
    let mut names: BTreeSet<String> = gone.shares.iter().map(|share| share.name.clone()).collect();
    if names.is_empty() {
        names.extend(former_names(&gone));
    }
    if names.is_empty() || find_effect(handle).is_none() {
        return;
    }
    let server = match server(handle).await {
        Ok(server) => server,
        // With the server its shares are gone.
        Err(error) => return tracing::debug!(container, %error, "no shares to be removed"),
    };
    let _sharing = handle.sharing.lock().await;
    let pod = handle.pod();
    for name in names {
        let done = match access(&pod, &name, |other| other.id != container) {
            Some(access) if server.keeps_access => server.shares.access(&name, access).await,
            Some(_) => Ok(()),
            None => server.shares.remove(&name).await,
        };
        if let Err(error) = done {
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
                let (control, lookups) = (handle.paths.shares.clone(), handle.lookups.clone());
                let shares = ShareServer::attach(control, limit, lookups);
                let keeps_access = put_in_order(handle, &shares).await?;
                Server { shares, process, keeps_access }
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

/// Takes away shares whose containers have gone while no daemon looked, and protects the others as
/// they are to be. Whether the server keeps their access.
async fn put_in_order(handle: &Handle, shares: &ShareServer) -> Result<bool, Error> {
    let pod = handle.pod();
    let (names, version) = shares.list().await?;
    let keeps_access = version >= VERSION_ACCESS;
    let former: Vec<String> = pod.containers.values().flat_map(former_names).collect();
    for name in names {
        match access(&pod, &name, |_| true) {
            Some(access) if keeps_access => shares.access(&name, access).await?,
            Some(_) => {}
            None if former.contains(&name) => {}
            None => shares.remove(&name).await?,
        }
    }
    Ok(keeps_access)
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
            lookups: handle.lookups.clone(),
        },
    );
    let started = handle.node.failpoints.around("host: launch the file server", started);
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
    plugged.map(|()| Server { shares, process, keeps_access: true })
}

/// Writes the server down, then lets the guest see it.
async fn plug(handle: &Handle, pid: u32, vhost: OwnedFd) -> Result<(), Error> {
    let started = start_time(pid).map_err(|_| gone())?;
    handle.commit(vec![Change::FileServerStarted { pid, started }]).await?;
    oom_score::apply(handle).await;
    handle.machine.vmm()?.add_fs(DEVICE, SHARE_TAG, vhost).await
}
