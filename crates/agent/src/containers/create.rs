//! CreateContainer: root, cgroup, volumes, specification, and an init process that waits.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::Spec;

use super::process::{Life, Process};
use super::rootfs::Rootfs;
use super::{Container, Parts, streams};
use crate::agent::{Agent, Owner};
use crate::error::{Error, Result};
use crate::guest::inroot::Root;
use crate::oci::cgroup::Cgroup;
use crate::oci::console::ConsoleSocket;
use crate::oci::create::Bundle;
use crate::oci::helper::Streams;
use crate::oci::spec::{Bind, PidNamespace, Surroundings, complete};
use crate::oci::user::Database;
use crate::oci::{device_filter, pod_pid};

/// Containers of a pod, ended ones included: each holds mounts, a cgroup and buffers.
const MAX_CONTAINERS: usize = 512;
/// Volumes of one container.
const MAX_VOLUMES: usize = 512;

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
    let rootfs = parts.rootfs.insert(Rootfs::mount(agent, id, wanted).await?).path();
    let cgroup = parts.cgroup.insert(agent.pod_cgroup.create(id)?).clone();
    let binds = binds(agent, &request.volumes)?;
    let pid_namespace = pid_namespace(agent, request).await?;
    let hostname = agent.lock().pod.as_ref().map(|pod| pod.hostname.clone()).unwrap_or_default();
    let root = Root::open(&rootfs)?;
    let (mut spec, resources) = complete(
        spec,
        &Database::read(&root),
        &Surroundings {
            rootfs: &rootfs,
            read_only: wanted.read_only,
            cgroup: cgroup.path(),
            pid: pid_namespace,
            shm: &agent.config.base.join("shm"),
            binds: &binds,
            hostname: &hostname,
            tty: request.tty,
            user: &request.user,
            cwd: &request.cwd,
        },
    )?;
    cgroup.apply(&resources)?;
    let rules = resources.devices().clone().unwrap_or_default();
    device_filter::attach(&rules, &cgroup.dir())?;
    let process = spec
        .process_mut()
        .take()
        .ok_or_else(|| Error::invalid("oci_spec.process", "is missing"))?;
    make_cwd(&root, process.cwd(), &binds)?;
    make_targets(&root, &binds)?;
    spec.set_process(Some(process.clone()));
    let seccomp = spec.linux().as_ref().and_then(|linux| linux.seccomp().clone());

    let number = agent.lock().number();
    let bundle = parts.bundle.insert(Bundle::new(&agent.config.base, number, &spec)?);
    let console = if request.tty { Some(ConsoleSocket::new(bundle.dir())?) } else { None };
    let (given, ends) = if request.tty {
        (Streams::null(), None)
    } else {
        let user = process.user();
        let (given, ends) = streams::pipes(request.stdin, user.uid(), user.gid())?;
        (given, Some(ends))
    };
    let expecting = agent.expect_child();
    let path = console.as_ref().map(|console| console.path().to_owned());
    let made = bundle.create(given, path, |pid| agent.know_helper(pid)).await?;
    let mut init = Process::new(made.pid, Life::Created);
    match (ends, &console) {
        (Some(ends), _) => ends.connect(&mut init, request.stdin_once)?,
        (None, Some(console)) => {
            let size = (request.tty_width, request.tty_height);
            streams::connect_terminal(console.receive()?, request.stdin, size, &mut init)?;
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
    };
    agent.lock().containers.insert(id.clone(), container);
    agent.adopt(made.pid, Owner::Process { container: id.clone(), exec: String::new() });
    drop(expecting);
    Ok(reply)
}

fn binds(agent: &Agent, volumes: &[v1::VolumeMount]) -> Result<Vec<Bind>> {
    if volumes.len() > MAX_VOLUMES {
        return Err(Error::Exhausted { what: "volumes of a container", limit: MAX_VOLUMES as u64 });
    }
    let mut state = agent.lock();
    volumes
        .iter()
        .map(|volume| {
            Ok(Bind {
                source: state.volumes.source(&volume.volume_id, &volume.sub_path)?,
                destination: PathBuf::from(&volume.destination),
                read_only: volume.read_only,
            })
        })
        .collect()
}

async fn pid_namespace(
    agent: &Arc<Agent>,
    request: &v1::CreateContainerRequest,
) -> Result<PidNamespace> {
    let of = |pid: i32| PidNamespace::Join(PathBuf::from(format!("/proc/{pid}/ns/pid")));
    match v1::PidMode::try_from(request.pid_mode) {
        Ok(v1::PidMode::Container) => Ok(PidNamespace::Own),
        Ok(v1::PidMode::Node) => Ok(PidNamespace::Guest),
        Ok(v1::PidMode::Pod) => Ok(of(pod_pid_1(agent).await?)),
        Ok(v1::PidMode::Target) => {
            let state = agent.lock();
            let target = &state.container(&request.pid_target)?.init;
            if target.is_ended() {
                return Err(Error::Precondition(format!(
                    "container {:?}, whose processes were to be shared, has ended",
                    request.pid_target
                )));
            }
            Ok(of(target.pid))
        }
        Err(_) => Err(Error::invalid("pid_mode", format!("{} is unknown", request.pid_mode))),
    }
}

/// PID 1 of the pod's shared PID namespace, made at first use.
async fn pod_pid_1(agent: &Arc<Agent>) -> Result<i32> {
    let _making = agent.pod_pid_making.lock().await;
    if let Some(pid) = agent.lock().pod_pid {
        return Ok(pid);
    }
    let expecting = agent.expect_child();
    let pid = pod_pid::make(|pid| agent.know_helper(pid)).await?;
    agent.lock().pod_pid = Some(pid);
    agent.adopt(pid, Owner::PodPid);
    drop(expecting);
    Ok(pid)
}

/// A working directory that the image does not hold is made, in the volume if it lies in one.
fn make_cwd(root: &Root, cwd: &Path, binds: &[Bind]) -> Result<()> {
    let mount = binds
        .iter()
        .filter_map(|bind| Some((bind, cwd.strip_prefix(&bind.destination).ok()?)))
        .max_by_key(|(bind, _)| bind.destination.components().count());
    match mount {
        Some((bind, below)) if bind.source.is_dir() => Root::open(&bind.source)?.make_dirs(below),
        _ => root.make_dirs(cwd),
    }
}

/// What volumes are mounted on, unless it lies in another volume: then libcontainer makes it.
fn make_targets(root: &Root, binds: &[Bind]) -> Result<()> {
    for bind in binds {
        let nested = binds.iter().any(|other| {
            other.destination != bind.destination
                && bind.destination.starts_with(&other.destination)
        });
        if !nested && !bind.destination.starts_with("/dev") {
            root.make_target(&bind.destination, bind.source.is_dir())?;
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
        if let Some(rootfs) = &mut self.rootfs {
            match rootfs.unmount(agent).await {
                Ok(()) => self.rootfs = None,
                Err(error) => result = Err(error),
            }
        }
        result
    }
}
