//! CreateContainer: plugs disks, prepares volumes in the guest, creates the process.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_api::v1;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use super::handle::Handle;
use super::undo::remove_files;
use super::volumes::{self, Prepared};
use super::{cpuset, disks, empty_dirs, host_pod, oom_score, shares, sync};
use crate::apparmor::AppArmor;
use crate::error::Error;
use crate::host::blocking;
use crate::host::scratch::INODE_RATIO;
use crate::logs::{self, LogPaths, LogWriter, Source};
use crate::model::{BlockDevice, ContainerId, ContainerSpec, Identity, PidMode};
use crate::policy::{Change, Container, ContainerPhase, Phase, Pod};

/// Supplementary groups that the kernel accepts (NGROUPS_MAX); limits the guest's reply.
const MAX_GROUPS: usize = 65536;
/// Limit of an undo call to a guest, which may have caused the failure.
const UNDO_LIMIT: Duration = Duration::from_secs(5);

const CREATION: &str = "creation of the container";

/// A new container.
pub(crate) fn new_container(pod: &Pod, id: ContainerId, spec: ContainerSpec) -> Container {
    let log_path = if spec.log_path.is_empty() || pod.spec.log_directory.is_empty() {
        PathBuf::new()
    } else {
        Path::new(&pod.spec.log_directory).join(&spec.log_path)
    };
    let limits = spec.oci.linux().as_ref().and_then(|l| l.resources().clone());
    Container {
        id,
        phase: ContainerPhase::Creating,
        created_at: SystemTime::now(),
        started_at: None,
        exit: None,
        drained: false,
        oom: false,
        log_path,
        resources: limits.unwrap_or_default(),
        user: None,
        shares: Vec::new(),
        spec: Arc::new(spec),
    }
}

pub(super) async fn create_container(
    handle: &Arc<Handle>,
    mut container: Container,
    cancel: &CancellationToken,
) -> Result<(), Error> {
    let id = container.id.clone();
    // Before the container is journaled: its record has the location of its emptyDirs.
    let resolved = tokio::select! {
        result = empty_dirs::resolve(handle, &mut container) => result,
        () = cancel.cancelled() => Err(Error::Cancelled { what: CREATION }),
        () = handle.stopping.cancelled() => Err(Error::precondition("the pod was stopped")),
    };
    let planned = match resolved {
        Ok(()) => handle.commit(vec![Change::ContainerPlanned(Box::new(container))]).await,
        Err(e) => Err(e),
    };
    let result = match planned {
        Err(e) => Err(e),
        Ok(()) => {
            oom_score::apply(handle).await;
            let mut disks = None;
            let made = tokio::select! {
                result = create(handle, &id, &mut disks) => result,
                () = cancel.cancelled() => Err(Error::Cancelled { what: CREATION }),
                () = handle.stopping.cancelled() => Err(Error::precondition("the pod was stopped")),
            };
            let made = match made {
                Ok(_) if !handle.node.registry.complete_container(&id) => {
                    Err(Error::Cancelled { what: CREATION })
                }
                Ok(user) => {
                    let created = Change::ContainerCreated { id: id.clone(), user };
                    handle.commit(vec![created]).await
                }
                Err(e) => Err(e),
            };
            if made.is_err() {
                // Files created and disks plugged after the undo would leak.
                if let Some(disks) = disks {
                    let _ = disks.await;
                }
                undo(handle, &id).await;
            }
            made
        }
    };
    if result.is_err() && !handle.pod().containers.contains_key(&id) {
        handle.node.registry.release_container(&id);
    }
    result
}

/// Name of the container's layer for the agent, or the limits of its directory on the scratch disk.
type Layer = (String, Option<v1::ScratchLayer>);
type DiskTask = JoinHandle<Result<Layer, Error>>;

/// Creates the container's files and plugs its disks. Every step has a deadline. Runs to completion
/// if the caller is cancelled.
fn make_disks(handle: &Arc<Handle>, id: &str, spec: &Arc<ContainerSpec>) -> DiskTask {
    let (handle, id, spec) = (handle.clone(), id.to_owned(), spec.clone());
    tokio::spawn(async move { make_and_plug(&handle, &id, &spec).await })
}

async fn make_and_plug(
    handle: &Arc<Handle>,
    id: &str,
    spec: &Arc<ContainerSpec>,
) -> Result<Layer, Error> {
    let written = !spec.rootfs.read_only || !spec.rootfs.volumes.is_empty();
    let size = handle.node.config.scratch_size;
    let (mut layer, mut scratch, mut disk) = (String::new(), None, None);
    if !written {
        // The guest uses a tmpfs for its own mount points.
    } else if handle.machine.host().is_some() {
        let made = host_pod::make_layer(handle.paths.layer(id));
        layer = handle.node.failpoints.wrap("host: make a layer", made).await?;
    } else if handle.pod().has_scratch_disk() {
        scratch = Some(v1::ScratchLayer { bytes: size, inodes: size / INODE_RATIO });
    } else {
        let (handle, path) = (handle.clone(), handle.paths.scratch(id));
        disk = Some(blocking(move || handle.node.scratch.clone_to(&path, size)).await?);
        layer = disks::scratch_serial(id);
    }
    disks::plug(handle, id, spec, disk).await?;
    Ok((layer, scratch))
}

/// `disks` is set while that task runs.
async fn create(
    handle: &Arc<Handle>,
    id: &str,
    disks: &mut Option<DiskTask>,
) -> Result<Identity, Error> {
    let container = handle.container(id)?;
    let spec = &container.spec;
    cpuset::pin(handle, None).await?;
    let policies = apparmor_policies(handle, spec).await?;
    let made = disks.insert(make_disks(handle, id, spec)).await;
    *disks = None;
    let (layer, scratch) = made.map_err(|e| Error::Internal(e.into()))??;
    let Prepared { mounts, synced, lower } = volumes::prepare(handle, id, spec).await?;
    let lower_serial = match lower {
        Some(_) => String::new(),
        None => handle.machine.image(&spec.rootfs.image),
    };
    let lower = lower.unwrap_or_default();
    let rootfs = v1::RootFs {
        lower_serial,
        lower_share: lower.share,
        lower_sub_path: lower.sub_path,
        lower_ids_mapped: lower.ids_mapped,
        upper_serial: layer,
        read_only: spec.rootfs.read_only,
        volumes: spec.rootfs.volumes.clone(),
        scratch,
    };
    let request = request(id, &cpuset::spec_for_guest(handle, spec), mounts, rootfs, policies)?;
    let made = handle
        .guest
        .call("create the container", |mut c| async move { c.create_container(request).await })
        .await?;
    start_log(handle, &container).await?;
    sync::start(handle, id, synced);
    let v1::CreateContainerReply { pid: _, uid, gid, mut groups } = made;
    groups.truncate(MAX_GROUPS);
    Ok(Identity { uid, gid, groups })
}

/// Opens the container's log; an error fails the creation.
async fn start_log(handle: &Handle, container: &Container) -> Result<(), Error> {
    if handle.node.config.caller_reads_output {
        return Ok(());
    }
    let (source, LogPaths { path, sidecar }) = output(handle, container);
    let shown = container.log_path.display().to_string();
    let what = format!("open the container's log {shown}");
    let opened = async {
        let writer =
            handle.log_writes.run_with_limit(what, move || LogWriter::open(path, &sidecar)).await?;
        writer.map_err(|e| Error::io(format!("open the container's log {shown}"), e))
    };
    let writer = handle.node.failpoints.wrap("host: open a log", opened).await?;
    handle.set_log(&container.id, logs::start(source, writer));
    Ok(())
}

/// Continues the container's log where it ends. Opens it in the background: nothing waits for it.
pub(super) fn resume_log(handle: &Handle, container: &Container) {
    let (source, paths) = output(handle, container);
    handle.set_log(&container.id, logs::resume(source, paths));
}

fn output(handle: &Handle, container: &Container) -> (Source, LogPaths) {
    let path = Some(container.log_path.clone()).filter(|p| !p.as_os_str().is_empty());
    let paths = LogPaths { path, sidecar: handle.paths.sidecar(&container.id) };
    let source = Source {
        address: handle.guest.address().clone(),
        container: container.id.clone(),
        tty: container.spec.tty,
        writes: handle.log_writes.clone(),
    };
    (source, paths)
}

/// Policies of the container's AppArmor profile for the guest kernel; none for a host pod.
async fn apparmor_policies(handle: &Handle, spec: &ContainerSpec) -> Result<Vec<Vec<u8>>, Error> {
    let profile =
        spec.oci.process().as_ref().and_then(|process| process.apparmor_profile().clone());
    let Some(profile) = profile.filter(|_| handle.machine.host().is_none()) else {
        return Ok(Vec::new());
    };
    if !handle.node.config.apparmor {
        return Err(Error::precondition(format!(
            "AppArmor profile {profile:?}: this node's configuration has `apparmor = false` in \
             [pods], so a pod's VM runs without AppArmor"
        )));
    }
    blocking(move || AppArmor::of_host().policy(&profile))
        .await
        .map_err(|error| Error::precondition(format!("AppArmor: {error}")))
}

fn request(
    id: &str,
    spec: &ContainerSpec,
    volumes: Vec<v1::VolumeMount>,
    rootfs: v1::RootFs,
    apparmor_policies: Vec<Vec<u8>>,
) -> Result<v1::CreateContainerRequest, Error> {
    let (pid_mode, pid_target) = match &spec.pid {
        PidMode::Container => (v1::PidMode::Container, String::new()),
        PidMode::Pod => (v1::PidMode::Pod, String::new()),
        PidMode::Target(id) => (v1::PidMode::Target, id.clone()),
        PidMode::Node => (v1::PidMode::Node, String::new()),
    };
    let oci_spec = serde_json::to_vec(&spec.oci).map_err(|e| Error::Internal(e.into()))?;
    let process = spec.oci.process().as_ref();
    let cwd = process.map(|p| p.cwd().to_string_lossy().into_owned()).unwrap_or_default();
    let size = process.and_then(|p| p.console_size());
    Ok(v1::CreateContainerRequest {
        container_id: id.to_owned(),
        oci_spec,
        rootfs: Some(rootfs),
        user: spec.user.clone(),
        pid_mode: pid_mode.into(),
        pid_target,
        stdin: spec.stdin,
        tty: spec.tty,
        volumes,
        tty_width: size.map_or(0, |s| s.width() as u32),
        tty_height: size.map_or(0, |s| s.height() as u32),
        stdin_once: spec.stdin_once,
        cwd,
        strict_groups: spec.strict_groups,
        block_devices: spec.devices.iter().map(block_device).collect(),
        apparmor_policies,
    })
}

fn block_device(device: &BlockDevice) -> v1::BlockDevice {
    v1::BlockDevice {
        disk_serial: disks::device_serial(device),
        path: device.container_path.clone(),
        permissions: device.permissions.clone(),
    }
}

/// Undoes a creation as far as it got. If the guest cannot remove the container, its disk stays and
/// the pod's owner retries.
pub(super) async fn undo(handle: &Arc<Handle>, id: &str) {
    handle.drop_container_tasks(id);
    let Ok(container) = handle.container(id) else { return };
    if !handle.stopping.is_cancelled() {
        let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
        let removed =
            handle.guest.call_within(UNDO_LIMIT, "remove the container", |mut c| async move {
                c.remove_container(request).await
            });
        if let Err(error) = removed.await {
            tracing::warn!(container = id, %error, "cannot remove a failed container in the guest");
            return;
        }
        shares::remove(handle, id).await;
        if let Err(error) = disks::unplug(handle, id, &container.spec).await {
            tracing::warn!(container = id, %error, "cannot unplug a disk");
        }
    }
    if let Err(error) = delete_container(handle, id).await {
        tracing::warn!(container = id, %error, "cannot remove files of a container");
    }
}

/// Removes a container's files, then its record, then its name.
pub(super) async fn delete_container(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    remove_files(handle, id).await?;
    handle.commit(vec![Change::ContainerRemoved { id: id.to_owned() }]).await?;
    if handle.pod().phase == Phase::Ready {
        cpuset::pin_or_log(handle).await;
        oom_score::apply(handle).await;
    }
    handle.node.registry.release_container(&id.to_owned());
    Ok(())
}
