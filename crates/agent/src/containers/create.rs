//! CreateContainer: mounts the root file system and volumes, creates the cgroup, completes the OCI
//! spec and starts an init process that waits for StartContainer.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::{LinuxDevice, LinuxResources, Process as OciProcess, Spec};

use super::process::{Process, Status};
use super::rootfs::Rootfs;
use super::volumes::StagedVolumes;
use super::{Container, Parts, namespaces, streams};
use crate::agent::{Agent, Owner};
use crate::blocking::{LOOKUP_TIMEOUT, MOUNT_TIMEOUT};
use crate::error::{Error, Result};
use crate::guest::huge_pages;
use crate::guest::inroot::Root;
use crate::oci::cgroup::Cgroup;
use crate::oci::console::ConsoleSocket;
use crate::oci::create::Bundle;
use crate::oci::helper::Streams;
use crate::oci::seccomp::Filter;
use crate::oci::spec::{Bind, SpecContext, UserNamespaceContext, complete};
use crate::oci::user::Database;
use crate::oci::userns::{Mapping, UserNamespace};
use crate::oci::{apparmor, device_filter, devices};

/// Maximum containers of a pod, stopped ones included: each holds mounts, a cgroup and buffers.
const MAX_CONTAINERS: usize = 512;

/// Returns the pid and the user of the init process.
pub async fn create(
    agent: &Arc<Agent>,
    request: v1::CreateContainerRequest,
) -> Result<v1::CreateContainerReply> {
    let id = request.container_id.clone();
    crate::ids::check("container_id", &id)?;
    let _guard = agent.lock_container(&id).await;
    {
        let state = agent.lock();
        if state.containers.contains_key(&id) {
            return Err(Error::Exists { what: "container", id });
        }
        if state.containers.len() >= MAX_CONTAINERS {
            return Err(Error::Exhausted {
                what: "containers of a pod",
                limit: MAX_CONTAINERS as u64,
            });
        }
    }
    let spec: Spec = serde_json::from_slice(&request.oci_spec)
        .map_err(|error| Error::invalid("oci_spec", error.to_string()))?;
    let mut parts = Parts::default();
    match build(agent, &request, spec, &mut parts).await {
        Ok(reply) => Ok(reply),
        Err(error) => {
            if let Err(second) = parts.dismantle(agent).await {
                tracing::error!(container = id, error = %second.chain(), "cannot clean up");
            }
            agent.delete_trash();
            if let Err(second) = release_huge_pages(agent, &id).await {
                tracing::error!(container = id, error = %second.chain(), "cannot clean up");
            }
            if let Err(second) = agent.lock().volumes.remove_container_volumes(&id) {
                tracing::error!(container = id, error = %second.chain(), "cannot clean up");
            }
            Err(error)
        }
    }
}

/// Builds the container; what was built is in `parts` also after a failure.
async fn build(
    agent: &Arc<Agent>,
    request: &v1::CreateContainerRequest,
    spec: Spec,
    parts: &mut Parts,
) -> Result<v1::CreateContainerReply> {
    let id = &request.container_id;
    let wanted = request.rootfs.as_ref().ok_or_else(|| Error::invalid("rootfs", "is missing"))?;
    let mapping = spec.linux().as_ref().map(Mapping::of).transpose()?.flatten();
    let userns = match mapping {
        Some(mapping) => Some(namespaces::user_namespace(agent, mapping).await?),
        None => None,
    };
    if !request.apparmor_policies.is_empty() {
        // Policies are never loaded into the host's kernel.
        agent.config.require_vm()?;
        apparmor::load(&request.apparmor_policies)?;
    }
    // At the same time, as the filter takes CPU time and the mount waits for disks.
    let (rootfs, seccomp) =
        tokio::join!(Rootfs::mount(agent, id, wanted, userns.as_ref()), filter(agent, id, &spec));
    let rootfs = parts.rootfs.insert(rootfs?).path();
    let seccomp = seccomp?;
    let cgroup = parts.cgroup.insert(agent.pod_cgroup.create(id)?).clone();
    let volumes = parts.volumes.insert(StagedVolumes::new(agent, id));
    let mut binds = volumes.stage(agent, &request.volumes, userns.as_ref()).await?;
    let (pid, pid_fd) = namespaces::pid_namespace(agent, request, userns.as_deref()).await?;
    let hostname = agent.lock().pod.as_ref().map(|pod| pod.hostname.clone()).unwrap_or_default();
    let pool = agent.pools.for_container(id);
    let requested = spec.linux().as_ref().and_then(|linux| linux.resources().clone());
    if !request.block_devices.is_empty() {
        agent.config.require_vm()?;
    }
    let extra = Devices::find(agent, request, &requested.unwrap_or_default(), userns.is_some())?;
    let cwd = working_directory(&spec, request);
    let (at, root_user) = (rootfs.clone(), userns.as_ref().map(|userns| userns.mapping.root()));
    // Mount points in one call with the look-up, unless the image's VOLUMEs add some: each call takes
    // a thread and two wake-ups.
    let early = wanted
        .volumes
        .is_empty()
        .then(|| MountPoints::new(&cwd, binds.clone(), extra.outside_dev.clone()));
    let open = move || {
        let root = Root::open(&at)?;
        let root = root.owned_by(root_user.unwrap_or((0, 0)));
        let users = Database::read(&root);
        if let Some(points) = early {
            points.make(&root)?;
        }
        Ok((Arc::new(root), users))
    };
    let (root, users) =
        pool.run("read the user database of the root", LOOKUP_TIMEOUT, open).await?;
    if let Some(layer) = parts.rootfs.as_ref().and_then(Rootfs::layer)
        && !wanted.volumes.is_empty()
    {
        binds.extend(volumes.stage_image_volumes(&root, layer, &wanted.volumes).await?);
        let points = MountPoints::new(&cwd, binds.clone(), extra.outside_dev.clone());
        let root = Arc::clone(&root);
        let make = move || points.make(&root);
        pool.run("create the working directory and mount points", LOOKUP_TIMEOUT, make).await?;
    }
    let (mqueue, userns_path) =
        (agent.config.base.join("mqueue"), userns.as_ref().map(|u| u.path()));
    if userns.is_some() {
        crate::guest::shm::mount_mqueue(&mqueue)?;
    }
    let (mut spec, resources) = complete(
        spec,
        &users,
        &SpecContext {
            rootfs: &rootfs,
            read_only: wanted.read_only,
            cgroup: cgroup.path(),
            pid,
            shm: &agent.config.base.join("shm"),
            binds: &binds,
            shared_mounts: StagedVolumes::is_shared(&request.volumes),
            devices: extra.in_dev,
            userns: userns.as_ref().zip(userns_path.as_ref()).map(|(userns, path)| {
                UserNamespaceContext { path, mapping: &userns.mapping, mqueue: &mqueue }
            }),
            hostname: &hostname,
            tty: request.tty,
            user: &request.user,
            strict_groups: request.strict_groups,
            cwd: &request.cwd,
        },
    )?;
    let mut rules = resources.devices().clone().unwrap_or_default();
    rules.extend(extra.rules);
    device_filter::attach(&rules, &cgroup.dir())?;
    if let Some(userns) = &userns {
        cgroup.delegate(userns.mapping.root())?;
    }
    if agent.config.require_vm().is_ok() && huge_pages::are_wanted(&resources) {
        reserve_huge_pages(agent, id, &resources).await?;
    }
    cgroup.apply(&resources)?;
    let process = spec
        .process_mut()
        .take()
        .ok_or_else(|| Error::invalid("oci_spec.process", "is missing"))?;
    // A working directory that does not exist is created, as runc does; in the volume if it is inside
    // one.
    if let Some((source, below)) = enclosing_volume(process.cwd(), &binds) {
        // Holds no descriptor of the root, so a hung volume does not prevent its unmount.
        let owner = root.owner();
        let make = move || Root::open(&source)?.owned_by(owner).make_dirs(&below);
        pool.run("create the working directory in its volume", LOOKUP_TIMEOUT, make).await?;
    }
    drop(root);
    let rlimits = rlimits_before_userns(&process, userns.is_some());
    spec.set_process(Some(without_rlimits(process.clone(), userns.is_some())));

    let number = agent.lock().allocate_number();
    let bundle =
        parts.bundle.insert(Bundle::new(&agent.config.base, number, spec, seccomp.clone())?);
    let console = if request.tty { Some(ConsoleSocket::new(bundle.dir())?) } else { None };
    let owner = owner(&process, userns.as_deref())?;
    let (child_stdio, ends) = if request.tty {
        (Streams::null(), None)
    } else {
        let (child_stdio, ends) = streams::pipes(request.stdin, owner)?;
        (child_stdio, Some(ends))
    };
    let spawn_guard = agent.begin_spawn();
    let path = console.as_ref().map(|console| console.path().to_owned());
    let inherit = pid_fd.into_iter().collect();
    let spawned = bundle
        .create(child_stdio, path, rlimits, inherit, |pid| agent.register_helper(pid))
        .await?;
    let mut init = Process::new(spawned.pid, Status::Created);
    match (ends, &console) {
        (Some(ends), _) => ends.connect(&mut init, request.stdin_once)?,
        (None, Some(console)) => {
            let size = (request.tty_width, request.tty_height);
            let master = console.receive()?;
            streams::connect_terminal(master, request.stdin, size, owner, &mut init)?;
        }
        (None, None) => {}
    }
    let user = process.user();
    let others = user.additional_gids().clone().unwrap_or_default();
    let others = others.into_iter().filter(|gid| *gid != user.gid());
    let reply = v1::CreateContainerReply {
        pid: spawned.pid.unsigned_abs(),
        uid: user.uid(),
        gid: user.gid(),
        groups: std::iter::once(user.gid()).chain(others).collect(),
    };
    agent.oom.add(id, &cgroup);
    let container = Container {
        init,
        execs: std::collections::BTreeMap::new(),
        oom_kills: 0,
        parts: std::mem::take(parts),
        start: Some(spawned.start),
        process,
        seccomp,
        userns,
        starts: Arc::default(),
    };
    agent.lock().containers.insert(id.clone(), container);
    agent.track(spawned.pid, Owner::Process { container: id.clone(), exec: String::new() });
    drop(spawn_guard);
    Ok(reply)
}

/// The compiled filter of the spec's seccomp profile.
async fn filter(agent: &Arc<Agent>, id: &str, spec: &Spec) -> Result<Option<Filter>> {
    let profile = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let Some(profile) = profile else { return Ok(None) };
    let (pool, agent) = (agent.pools.for_container(id), Arc::clone(agent));
    let compile = move || {
        let filter = agent.filters.get(&profile);
        filter.map(Some).map_err(|reason| Error::invalid("oci_spec.linux.seccomp", reason))
    };
    pool.run("compile the seccomp filter", MOUNT_TIMEOUT, compile).await
}

async fn reserve_huge_pages(
    agent: &Arc<Agent>,
    id: &str,
    resources: &LinuxResources,
) -> Result<()> {
    let pool = agent.pools.for_container(id);
    let (agent, id, resources) = (Arc::clone(agent), id.to_owned(), resources.clone());
    let work = move || agent.huge_pages.reserve(&id, &resources, |id| agent.has_exited(id));
    pool.run("reserve huge pages", MOUNT_TIMEOUT, work).await
}

pub(super) async fn release_huge_pages(agent: &Arc<Agent>, id: &str) -> Result<()> {
    let pool = agent.pools.for_removal(id);
    let (agent, id) = (Arc::clone(agent), id.to_owned());
    let work = move || {
        agent.huge_pages.release(&id);
        Ok(())
    };
    pool.run("release huge pages", MOUNT_TIMEOUT, work).await
}

/// Device nodes beyond the default ones of the OCI runtime spec.
#[derive(Default)]
struct Devices {
    /// Below `/dev`; created by libcontainer.
    in_dev: Vec<LinuxDevice>,
    /// Elsewhere, which libcontainer refuses; created in the root file system.
    outside_dev: Vec<LinuxDevice>,
    rules: Vec<oci_spec::runtime::LinuxDeviceCgroup>,
}

impl Devices {
    fn find(
        agent: &Agent,
        request: &v1::CreateContainerRequest,
        resources: &LinuxResources,
        in_user_namespace: bool,
    ) -> Result<Self> {
        if in_user_namespace && !request.block_devices.is_empty() {
            return Err(Error::invalid("block_devices", "cannot be opened in a user namespace"));
        }
        let mut found = Self::default();
        if devices::allows_all(resources) {
            // In a user namespace nodes are bind mounts of the guest's nodes, so only existing ones
            // are possible.
            let of_guest = agent.config.require_vm().is_ok() && !in_user_namespace;
            found.in_dev = if of_guest { devices::all_with_loops() } else { devices::all() };
        }
        for volume in devices::block_volumes(&request.block_devices)? {
            let place = if volume.node.path().starts_with("/dev") {
                &mut found.in_dev
            } else {
                &mut found.outside_dev
            };
            place.push(volume.node);
            found.rules.push(volume.rule);
        }
        Ok(found)
    }
}

/// The user of a process as uid and gid outside of the user namespace.
pub(super) fn owner(process: &OciProcess, userns: Option<&UserNamespace>) -> Result<(u32, u32)> {
    let (uid, gid) = (process.user().uid(), process.user().gid());
    userns.map_or(Ok((uid, gid)), |userns| userns.mapping.outside(uid, gid))
}

/// Rlimits to set before the process joins a user namespace, where raising one needs a capability
/// it lacks.
fn rlimits_before_userns(
    process: &OciProcess,
    in_user_namespace: bool,
) -> Vec<oci_spec::runtime::PosixRlimit> {
    if in_user_namespace { process.rlimits().clone().unwrap_or_default() } else { Vec::new() }
}

/// The process without its rlimits in a user namespace; see [`rlimits_before_userns`].
fn without_rlimits(mut process: OciProcess, in_user_namespace: bool) -> OciProcess {
    if in_user_namespace {
        process.set_rlimits(None);
    }
    process
}

/// The working directory as `complete` sets it, before it is checked.
fn working_directory(spec: &Spec, request: &v1::CreateContainerRequest) -> PathBuf {
    if !request.cwd.is_empty() {
        return PathBuf::from(&request.cwd);
    }
    spec.process().as_ref().map(|process| process.cwd().clone()).unwrap_or_default()
}

/// What the root file system has to have before libcontainer mounts into it.
struct MountPoints {
    /// The working directory, if it is in the root file system.
    cwd: Option<PathBuf>,
    binds: Vec<Bind>,
    /// Device nodes outside of `/dev`.
    nodes: Vec<LinuxDevice>,
}

impl MountPoints {
    fn new(cwd: &Path, binds: Vec<Bind>, nodes: Vec<LinuxDevice>) -> Self {
        // A path that is not absolute is refused later.
        let own = cwd.is_absolute() && enclosing_volume(cwd, &binds).is_none();
        Self { cwd: own.then(|| cwd.to_owned()), binds, nodes }
    }

    fn make(&self, root: &Root) -> Result<()> {
        if let Some(cwd) = &self.cwd {
            root.make_dirs(cwd)?;
        }
        make_targets(root, &self.binds)?;
        self.nodes.iter().try_for_each(|node| root.make_node(node))
    }
}

/// The innermost volume that contains `path`: its directory, and the path relative to it.
fn enclosing_volume(path: &Path, binds: &[Bind]) -> Option<(PathBuf, PathBuf)> {
    let (bind, below) = binds
        .iter()
        .filter_map(|bind| Some((bind, path.strip_prefix(&bind.destination).ok()?)))
        .max_by_key(|(bind, _)| bind.destination.components().count())?;
    bind.directory.then(|| (bind.source.clone(), below.to_owned()))
}

/// Creates the mount points of volumes; libcontainer creates those inside other volumes.
fn make_targets(root: &Root, binds: &[Bind]) -> Result<()> {
    for bind in binds {
        let nested = binds.iter().any(|other| {
            other.destination != bind.destination
                && bind.destination.starts_with(&other.destination)
        });
        if !nested && !bind.destination.starts_with("/dev") {
            root.make_target(&bind.destination, bind.directory)?;
        }
    }
    Ok(())
}

impl Parts {
    /// Removes all parts in reverse order; continues after a failure. May be called again for what
    /// is left.
    pub async fn dismantle(&mut self, agent: &Agent) -> Result<()> {
        let mut result = Ok(());
        if let Some(bundle) = self.bundle.take() {
            bundle.remove();
        }
        if let Some(cgroup) = &self.cgroup {
            match Cgroup::remove(cgroup).await {
                Ok(()) => self.cgroup = None,
                Err(error) => result = Err(error),
            }
        }
        if let Some(volumes) = &mut self.volumes {
            match volumes.unstage(agent).await {
                Ok(()) => self.volumes = None,
                Err(error) => result = Err(error),
            }
        }
        if let Some(rootfs) = &mut self.rootfs {
            match rootfs.unmount(agent).await {
                Ok(()) => self.rootfs = None,
                Err(error) => result = Err(error),
            }
        }
        result
    }
}
