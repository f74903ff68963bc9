//! CreateContainer: root, cgroup, volumes, specification, and an init process that waits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::{LinuxDevice, LinuxResources, Process as OciProcess, Spec};

use super::process::{Life, Process};
use super::rootfs::Rootfs;
use super::volumes::Staged;
use super::{Container, Parts, namespaces, streams};
use crate::agent::{Agent, Owner};
use crate::error::{Error, Result};
use crate::guest::inroot::Root;
use crate::lanes::{LOOK_UP, MOUNT};
use crate::oci::cgroup::Cgroup;
use crate::oci::console::ConsoleSocket;
use crate::oci::create::Bundle;
use crate::oci::helper::Streams;
use crate::oci::spec::{Bind, InUserNamespace, Surroundings, complete};
use crate::oci::user::Database;
use crate::oci::userns::{Mapping, UserNamespace};
use crate::oci::{apparmor, device_filter, devices};

/// Containers of a pod, ended ones included: each holds mounts, a cgroup and buffers.
const MAX_CONTAINERS: usize = 512;

/// Answers the init process' pid and user.
pub async fn create(
    agent: &Arc<Agent>,
    request: v1::CreateContainerRequest,
) -> Result<v1::CreateContainerReply> {
    let id = request.container_id.clone();
    crate::ids::check("container_id", &id)?;
    let _turn = agent.verb(&id).await;
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
                tracing::error!(container = id, error = %second.chain(), "left behind");
            }
            agent.empty_trash();
            if let Err(second) = release_huge_pages(agent, &id).await {
                tracing::error!(container = id, error = %second.chain(), "left behind");
            }
            if let Err(second) = agent.lock().volumes.remove_of(&id) {
                tracing::error!(container = id, error = %second.chain(), "left behind");
            }
            Err(error)
        }
    }
}

/// What `build` has to give to a new container.
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
        // Never into the host's kernel.
        agent.config.has_devices()?;
        apparmor::load(&request.apparmor_policies)?;
    }
    let rootfs = Rootfs::mount(agent, id, wanted, userns.as_ref()).await?;
    let rootfs = parts.rootfs.insert(rootfs).path();
    let cgroup = parts.cgroup.insert(agent.pod_cgroup.create(id)?).clone();
    let volumes = parts.volumes.insert(Staged::new(agent, id));
    let mut binds = volumes.stage(agent, &request.volumes, userns.as_ref()).await?;
    let pid = namespaces::pid_namespace(agent, request, userns.as_deref()).await?;
    let hostname = agent.lock().pod.as_ref().map(|pod| pod.hostname.clone()).unwrap_or_default();
    let lane = agent.lanes.of_container(id);
    let (at, root_user) = (rootfs.clone(), userns.as_ref().map(|userns| userns.mapping.root()));
    let open = move || {
        let root = Root::open(&at)?;
        let root = root.owned_by(root_user.unwrap_or((0, 0)));
        let users = Database::read(&root);
        Ok((Arc::new(root), users))
    };
    let (root, users) = lane.run("look up users in the root", LOOK_UP, open).await?;
    if let Some(layer) = parts.rootfs.as_ref().and_then(Rootfs::layer) {
        binds.extend(volumes.stage_of_image(&root, layer, &wanted.volumes).await?);
    }
    let asked = spec.linux().as_ref().and_then(|linux| linux.resources().clone());
    if !request.block_devices.is_empty() {
        agent.config.has_devices()?;
    }
    let extra = Devices::find(agent, request, &asked.unwrap_or_default(), userns.is_some())?;
    let (mqueue, userns_path) =
        (agent.config.base.join("mqueue"), userns.as_ref().map(|u| u.path()));
    if userns.is_some() {
        crate::guest::shm::mount_mqueue(&mqueue)?;
    }
    let (mut spec, resources) = complete(
        spec,
        &users,
        &Surroundings {
            rootfs: &rootfs,
            read_only: wanted.read_only,
            cgroup: cgroup.path(),
            pid,
            shm: &agent.config.base.join("shm"),
            binds: &binds,
            shared_mounts: Staged::is_shared(&request.volumes),
            devices: extra.in_dev,
            userns: userns.as_ref().zip(userns_path.as_ref()).map(|(userns, path)| {
                InUserNamespace { path, mapping: &userns.mapping, mqueue: &mqueue }
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
    if agent.config.has_devices().is_ok() {
        reserve_huge_pages(agent, id, &resources).await?;
    }
    cgroup.apply(&resources)?;
    let process = spec
        .process_mut()
        .take()
        .ok_or_else(|| Error::invalid("oci_spec.process", "is missing"))?;
    let (cwd, nodes) = (process.cwd().clone(), extra.elsewhere);
    // A working directory that the image does not hold is made, in the volume if it lies in one.
    let in_volume = in_volume(&cwd, &binds);
    if let Some((source, below)) = in_volume.clone() {
        // Without a hold on the root, which could not be unmounted while this hangs.
        let owner = root.owner();
        let make = move || Root::open(&source)?.owned_by(owner).make_dirs(&below);
        lane.run("make the working directory in its volume", LOOK_UP, make).await?;
    }
    let make = move || {
        if in_volume.is_none() {
            root.make_dirs(&cwd)?;
        }
        make_targets(&root, &binds)?;
        nodes.iter().try_for_each(|node| root.make_node(node))
    };
    lane.run("make the working directory and mount points", LOOK_UP, make).await?;
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());
    let rlimits = limits_before(&process, userns.is_some());
    spec.set_process(Some(inside(process.clone(), userns.is_some())));

    let number = agent.lock().number();
    let bundle = parts.bundle.insert(Bundle::new(&agent.config.base, number, spec)?);
    let console = if request.tty { Some(ConsoleSocket::new(bundle.dir())?) } else { None };
    let owner = owner(&process, userns.as_deref())?;
    let (given, ends) = if request.tty {
        (Streams::null(), None)
    } else {
        let (given, ends) = streams::pipes(request.stdin, owner)?;
        (given, Some(ends))
    };
    let expecting = agent.expect_child();
    let path = console.as_ref().map(|console| console.path().to_owned());
    let made = bundle.create(given, path, rlimits, |pid| agent.know_helper(pid)).await?;
    let mut init = Process::new(made.pid, Life::Created);
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
        pid: made.pid.unsigned_abs(),
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
        start: Some(made.start),
        process,
        seccomp,
        userns,
    };
    agent.lock().containers.insert(id.clone(), container);
    agent.adopt(made.pid, Owner::Process { container: id.clone(), exec: String::new() });
    drop(expecting);
    Ok(reply)
}

async fn reserve_huge_pages(
    agent: &Arc<Agent>,
    id: &str,
    resources: &LinuxResources,
) -> Result<()> {
    let lane = agent.lanes.of_container(id);
    let (agent, id, resources) = (Arc::clone(agent), id.to_owned(), resources.clone());
    let work = move || agent.huge_pages.reserve(&id, &resources, |id| agent.has_ended(id));
    lane.run("reserve huge pages", MOUNT, work).await
}

pub(super) async fn release_huge_pages(agent: &Arc<Agent>, id: &str) -> Result<()> {
    let lane = agent.lanes.of_removal(id);
    let (agent, id) = (Arc::clone(agent), id.to_owned());
    let work = move || {
        agent.huge_pages.release(&id);
        Ok(())
    };
    lane.run("release huge pages", MOUNT, work).await
}

/// Devices beyond those that every container has.
#[derive(Default)]
struct Devices {
    /// libcontainer makes these.
    in_dev: Vec<LinuxDevice>,
    /// ... and refuses these, whose nodes are made in the root file system.
    elsewhere: Vec<LinuxDevice>,
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
            return Err(Error::invalid(
                "block_devices",
                "nobody in a user namespace could open them",
            ));
        }
        let mut found = Self::default();
        if devices::allows_all(resources) {
            // In a user namespace nodes are mounts of the guest's, so there are only those that it has.
            let of_guest = agent.config.has_devices().is_ok() && !in_user_namespace;
            found.in_dev = if of_guest { devices::all_of_guest() } else { devices::all() };
        }
        for volume in devices::block_volumes(&request.block_devices)? {
            let place = if volume.node.path().starts_with("/dev") {
                &mut found.in_dev
            } else {
                &mut found.elsewhere
            };
            place.push(volume.node);
            found.rules.push(volume.rule);
        }
        Ok(found)
    }
}

/// The guest's ids of a process' user.
pub(super) fn owner(process: &OciProcess, userns: Option<&UserNamespace>) -> Result<(u32, u32)> {
    let (uid, gid) = (process.user().uid(), process.user().gid());
    userns.map_or(Ok((uid, gid)), |userns| userns.mapping.outside(uid, gid))
}

/// Limits that the process' maker has to have before it enters a user namespace, where nobody may
/// raise any.
fn limits_before(
    process: &OciProcess,
    in_user_namespace: bool,
) -> Vec<oci_spec::runtime::PosixRlimit> {
    if in_user_namespace { process.rlimits().clone().unwrap_or_default() } else { Vec::new() }
}

/// See [`limits_before`].
fn inside(mut process: OciProcess, in_user_namespace: bool) -> OciProcess {
    if in_user_namespace {
        process.set_rlimits(None);
    }
    process
}

/// The folder that is mounted as a volume around a path, and the path in it.
fn in_volume(path: &Path, binds: &[Bind]) -> Option<(PathBuf, PathBuf)> {
    let (bind, below) = binds
        .iter()
        .filter_map(|bind| Some((bind, path.strip_prefix(&bind.destination).ok()?)))
        .max_by_key(|(bind, _)| bind.destination.components().count())?;
    bind.directory.then(|| (bind.source.clone(), below.to_owned()))
}

/// What volumes are mounted on, unless it lies in another volume: then libcontainer makes it.
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
    /// Takes everything down, last built first; goes on past failures. What is left may be tried
    /// again.
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
