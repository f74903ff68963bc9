//! The public API of the crate: one method per operation.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use nix::fcntl::Flock;
use oci_spec::runtime::{LinuxResources, Process};
use tokio::sync::{broadcast, oneshot};
use tokio_util::sync::CancellationToken;

use crate::config::{Config, EmptyDirLocation};
use crate::error::Error;
use crate::failpoint::Failpoints;
use crate::forward::{self, ByteStream};
use crate::host::{blocking, cgroup};
use crate::launcher::{Launch, LauncherProcess};
use crate::model::{
    ContainerId, ContainerSpec, ContainerView, Event, ExecOutput, ExecSpec, ExitView, Filter,
    PodId, PodResources, PodSizing, PodSpec, PodView, TracePhase,
};
use crate::node::Node;
use crate::observe::{Observer, Unobserved};
use crate::open::{self, Opened};
use crate::pod::{self, Handle, InitialAction, Request};
use crate::policy::{ContainerPhase, EmptyDirs, Phase, Pod};
use crate::ports::Network;
use crate::reservation::Reservation;
use crate::session::{self, AttachSession, ExecSession};
use crate::stats::{ContainerStatsView, PodStatsView};

/// Longest wait of [`Sandboxes::shutdown`] for the owner tasks.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(5);
/// Longest host name of a guest: HOST_NAME_MAX (hostname(7)).
const MAX_HOSTNAME: usize = 64;
/// Longest container id, bytes: volume and file names contain it.
const MAX_ID: usize = 64;

/// All pods and containers of a node. Cheap to clone.
#[derive(Clone)]
pub struct Sandboxes {
    node: Arc<Node>,
    _lock: Arc<Flock<File>>,
}

fn new_id() -> String {
    let random = || uuid::Uuid::new_v4().simple().to_string();
    random() + &random()
}

/// Cancels a creation when its caller goes away, and releases the name at once: a kubelet whose
/// call has timed out retries with the same name while the first attempt is being undone.
struct CancelOnDrop<'a> {
    node: &'a Node,
    id: &'a ContainerId,
    cancel: &'a CancellationToken,
    armed: bool,
}

impl CancelOnDrop<'_> {
    fn disarm(mut self) {
        self.armed = false;
    }
}

impl Drop for CancelOnDrop<'_> {
    fn drop(&mut self) {
        if self.armed {
            self.cancel.cancel();
            self.node.registry.cancel_container(self.id);
        }
    }
}

impl Sandboxes {
    /// Reads the journal, starts one owner task per pod, and returns; recovery of running VMs and
    /// of incomplete work continues in those tasks.
    pub async fn open(config: Config, network: Arc<dyn Network>) -> Result<Self, Error> {
        let launcher = LauncherProcess::start(config.launcher.clone())?;
        Self::open_with(config, network, Arc::new(launcher)).await
    }

    /// [`Self::open`] with another launcher, for tests and embedders.
    pub async fn open_with(
        config: Config,
        network: Arc<dyn Network>,
        launcher: Arc<dyn Launch>,
    ) -> Result<Self, Error> {
        Self::open_observed(config, network, launcher, Arc::new(Unobserved)).await
    }

    /// [`Self::open_with`], with an observer of measurements.
    pub async fn open_observed(
        config: Config,
        network: Arc<dyn Network>,
        launcher: Arc<dyn Launch>,
        observer: Arc<dyn Observer>,
    ) -> Result<Self, Error> {
        Self::open_at(config, network, launcher, observer, Failpoints::default()).await
    }

    pub(crate) async fn open_at(
        config: Config,
        network: Arc<dyn Network>,
        launcher: Arc<dyn Launch>,
        observer: Arc<dyn Observer>,
        failpoints: Failpoints,
    ) -> Result<Self, Error> {
        let opened = open::open(config, network, launcher, observer, failpoints).await?;
        let Opened { node, lock } = opened;
        Ok(Self { node, _lock: Arc::new(lock) })
    }

    #[cfg(any(test, feature = "synthetic-pods"))]
    pub(crate) fn node(&self) -> &Arc<Node> {
        &self.node
    }

    /// Starts a pod. If the caller goes away before it is ready, the start is undone.
    pub async fn run_pod(&self, spec: PodSpec) -> Result<PodId, Error> {
        self.run_pod_with_id(new_id(), spec).await
    }

    /// As above with an id from the caller: letters and digits, unique on this host.
    pub async fn run_pod_with_id(&self, id: PodId, spec: PodSpec) -> Result<PodId, Error> {
        check_pod(&spec)?;
        let config = &self.node.config;
        check_id(&id, config.id_length)?;
        if self.node.registry.find_pod(&id).is_ok() {
            return Err(Error::Exists { what: "pod", name: id.clone(), holder: id });
        }
        let uids = config.uid_base..config.uid_base.saturating_add(config.uid_range);
        let uid = self.node.registry.reserve_pod(&id, &spec.meta, config.max_pods, uids)?;
        let netns = match spec.host {
            Some(host) if host.network => PathBuf::new(),
            _ => self.node.network.netns_path(&id),
        };
        let in_guest = config.empty_dir == EmptyDirLocation::Guest;
        let empty_dirs = EmptyDirs { in_guest, shared: Default::default() };
        let pod = Pod {
            netns,
            id: id.clone(),
            spec: Arc::new(spec),
            created_at: SystemTime::now(),
            phase: Phase::Starting,
            reason: String::new(),
            uid,
            ledger: Vec::new(),
            attachment: Arc::default(),
            kernel_release: String::new(),
            trace: Vec::new(),
            empty_dirs,
            containers: Default::default(),
            unreadable: false,
        };
        let cancel = CancellationToken::new();
        let guard = cancel.clone().drop_guard();
        let (reply, answer) = oneshot::channel();
        let (handle, owner) =
            pod::new(self.node.clone(), pod, InitialAction::Start { reply, cancel });
        self.node.registry.set_handle(&id, handle);
        tokio::spawn(owner);
        let result = answer.await.map_err(|_| Error::unavailable("the daemon is shutting down"))?;
        if result.is_ok() {
            guard.disarm();
        }
        result
    }

    /// Defaults and cgroup limits that apply to a pod below `cgroup_parent`.
    pub async fn pod_sizing(&self, cgroup_parent: &str) -> PodSizing {
        let (node, parent) = (self.node.clone(), cgroup_parent.to_owned());
        let Config { default_vcpus, default_memory_mib, .. } = self.node.config;
        blocking(move || {
            let is_unlimited = |file| cgroup::is_unlimited(&node.cgroup_root, &parent, file);
            PodSizing {
                vcpus: default_vcpus,
                memory_mib: default_memory_mib,
                cpu_unlimited: is_unlimited("cpu.max"),
                memory_unlimited: is_unlimited("memory.max"),
            }
        })
        .await
    }

    /// Runs `work`, which accesses host files named in a request, on the pod's own threads: a file
    /// system may never answer. Fails with [`Error::Deadline`] on timeout.
    pub async fn run_on_host_files<T: Send + 'static>(
        &self,
        pod: &str,
        what: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        self.node.registry.find_pod(pod)?.lookups.run_with_limit(what, work).await
    }

    /// Stops all containers and the VM, frees the network. Idempotent.
    pub async fn stop_pod(&self, id: &str) -> Result<(), Error> {
        let handle = self.node.registry.find_pod(id)?;
        match handle.request(Request::Stop).await {
            // It was removed meanwhile.
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// Stops the pod if it runs and removes it with its containers. An unknown id is no error.
    pub async fn remove_pod(&self, id: &str) -> Result<(), Error> {
        let handle = match self.node.registry.find_pod(id) {
            Ok(handle) => handle,
            Err(Error::NotFound { .. }) => return Ok(()),
            Err(e) => return Err(e),
        };
        match handle.request(Request::Remove).await {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// By id or unambiguous id prefix.
    pub fn pod(&self, id: &str) -> Result<PodView, Error> {
        let pod = self.node.registry.find_pod(id)?.pod();
        if pod.is_listed() {
            Ok(pod.view())
        } else {
            Err(Error::NotFound { what: "pod", id: id.to_owned() })
        }
    }

    pub fn pods(&self, filter: &Filter) -> Vec<PodView> {
        let pods = self.node.registry.handles().into_iter().map(|h| h.pod());
        pods.filter(|pod| {
            pod.is_listed()
                && has_prefix(&filter.id, &pod.id)
                && has_prefix(&filter.pod, &pod.id)
                && filter.labels.iter().all(|(k, v)| pod.spec.meta.labels.get(k) == Some(v))
        })
        .map(|pod| pod.view())
        .collect()
    }

    pub async fn create_container(
        &self,
        pod: &str,
        spec: ContainerSpec,
    ) -> Result<ContainerId, Error> {
        self.create_container_with_id(pod, new_id(), spec).await
    }

    /// As above with an id from the caller: letters and digits, unique on this host.
    pub async fn create_container_with_id(
        &self,
        pod: &str,
        id: ContainerId,
        spec: ContainerSpec,
    ) -> Result<ContainerId, Error> {
        check_id(&id, MAX_ID)?;
        if self.node.registry.find_container(&id).is_ok() {
            return Err(Error::Exists { what: "container", name: id.clone(), holder: id });
        }
        let handle = self.node.registry.find_pod(pod)?;
        let pod = handle.ready_pod()?;
        let max = self.node.config.max_containers;
        self.node.registry.reserve_container(&pod.id, &id, &spec.meta, max)?;
        let cancel = CancellationToken::new();
        let reserved = Reservation::new(self.node.clone(), id.clone(), cancel.clone());
        let container = Box::new(pod::new_container(&pod, id.clone(), spec));
        let cancel_on_drop =
            CancelOnDrop { node: &self.node, id: &id, cancel: &cancel, armed: true };
        let create = |reply| Request::CreateContainer { container, reserved, reply };
        let created = handle.request(create).await;
        // On an error, the pod's owner has released the name or still needs it.
        cancel_on_drop.disarm();
        created.map(|()| id)
    }

    pub async fn start_container(&self, id: &str) -> Result<(), Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        handle.request(|reply| Request::StartContainer { id, reply }).await
    }

    /// Sends the container's stop signal, and SIGKILL after `grace`. Idempotent.
    pub async fn stop_container(&self, id: &str, grace: Duration) -> Result<(), Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        pod::stop_container(&handle, &id, grace).await
    }

    /// Kills the container if it runs, and removes it. An unknown id is no error.
    pub async fn remove_container(&self, id: &str) -> Result<(), Error> {
        let (id, handle) = match self.node.registry.find_container(id) {
            Ok(found) => found,
            Err(Error::NotFound { .. }) => return Ok(()),
            Err(e) => return Err(e),
        };
        match handle.request(|reply| Request::RemoveContainer { id, reply }).await {
            Err(Error::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    pub fn container(&self, id: &str) -> Result<ContainerView, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        let pod = handle.pod();
        let container = pod.containers.get(&id).filter(|c| c.phase == ContainerPhase::Present);
        container.map(|c| c.view(&pod.id)).ok_or_else(|| Error::NotFound { what: "container", id })
    }

    pub fn containers(&self, filter: &Filter) -> Vec<ContainerView> {
        let mut found = Vec::new();
        for pod in self.node.registry.handles().into_iter().map(|h| h.pod()) {
            if !pod.is_listed() || !has_prefix(&filter.pod, &pod.id) {
                continue;
            }
            let containers = pod.containers.values().filter(|c| {
                c.phase == ContainerPhase::Present
                    && has_prefix(&filter.id, &c.id)
                    && filter.labels.iter().all(|(k, v)| c.spec.meta.labels.get(k) == Some(v))
            });
            found.extend(containers.map(|c| c.view(&pod.id)));
        }
        found
    }

    /// Resizes a running pod; beyond the VM's maximum: [`Error::OutOfRange`].
    pub async fn update_pod(&self, id: &str, change: PodResources) -> Result<(), Error> {
        let handle = self.node.registry.find_pod(id)?;
        handle.request(|reply| Request::UpdatePod { change, reply }).await
    }

    pub async fn update_container(&self, id: &str, resources: LinuxResources) -> Result<(), Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        let resources = Box::new(resources);
        handle.request(|reply| Request::UpdateContainer { id, resources, reply }).await
    }

    /// Freezes all processes of a running container. SIGKILL thaws them. [`Error::Unsupported`] if the
    /// guest's agent is of an earlier release.
    pub async fn pause_container(&self, id: &str) -> Result<(), Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::freeze(&handle, &id, true).await
    }

    /// Ends [`Self::pause_container`]. A container that is not paused is no error.
    pub async fn resume_container(&self, id: &str) -> Result<(), Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::freeze(&handle, &id, false).await
    }

    pub async fn exec(&self, id: &str, spec: ExecSpec) -> Result<ExecSession, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::exec(&handle, &id, spec).await
    }

    /// Runs a command and returns its output, at most `output_limit` bytes of each stream; further
    /// output is discarded. After `timeout` the command is killed: [`Error::ExecTimeout`].
    pub async fn exec_sync(
        &self,
        id: &str,
        spec: ExecSpec,
        timeout: Option<Duration>,
        output_limit: usize,
    ) -> Result<ExecOutput, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::exec_sync(&handle, &id, spec, timeout, output_limit).await
    }

    /// Attaches to the container's init process, from now on; `stdin` takes over its standard input
    /// from the client that has it.
    pub async fn attach(&self, id: &str, stdin: bool) -> Result<AttachSession, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::attach(&handle, &id, stdin).await
    }

    /// Starts a process given as an OCI `process` object; missing fields are taken from the
    /// container's own.
    pub async fn exec_process(
        &self,
        id: &str,
        process: &Process,
        stdin: bool,
    ) -> Result<ExecSession, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::exec_process(&handle, &id, process, stdin).await
    }

    /// The streams of the container's init process from their start, for a single reader
    /// ([`Config::caller_reads_output`]): the container blocks on a slow reader.
    pub async fn streams(&self, id: &str) -> Result<AttachSession, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::streams(&handle, &id).await
    }

    /// Waits for the container's exit; returns at once if it has exited.
    pub async fn wait_container(&self, id: &str) -> Result<ExitView, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::wait(&handle, &id).await
    }

    /// Sends a signal (number) to the container's init process, or to all of its processes.
    pub async fn signal_container(&self, id: &str, signal: u32, all: bool) -> Result<(), Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        session::signal(&handle, &id, "", signal, all).await
    }

    /// Connects to a TCP port on the pod's loopback interface; [`Error::NotListening`] if the
    /// connection is refused.
    pub async fn port_forward(&self, pod: &str, port: u16) -> Result<ByteStream, Error> {
        let handle = self.node.registry.find_pod(pod)?;
        forward::port_forward(&handle, port).await
    }

    /// Subscribes to lifecycle events. A slow receiver loses the oldest ones and gets
    /// [`broadcast::error::RecvError::Lagged`].
    pub fn events(&self) -> broadcast::Receiver<Event> {
        self.node.events.subscribe()
    }

    /// Reopens the log at its path, after a rotation.
    pub async fn reopen_log(&self, id: &str) -> Result<(), Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        let container = handle.container(&id)?;
        let log = handle.log(&id).filter(|_| container.is_running());
        let not_running = || Error::precondition(format!("container {id} is not running"));
        log.ok_or_else(not_running)?.reopen().await
    }

    /// From the cache; a pod without a measurement is measured now, with a short deadline.
    pub async fn pod_stats(&self, id: &str) -> Result<PodStatsView, Error> {
        let stats = self.node.registry.find_pod(id)?.stats_or_measure().await?;
        Ok(Arc::unwrap_or_clone(stats))
    }

    /// Cached measurements of all ready pods, by id: does not call guests. Pods without a
    /// measurement are missing.
    pub fn all_stats(&self) -> BTreeMap<PodId, Arc<PodStatsView>> {
        let handles = self.node.registry.handles().into_iter();
        let ready = handles.filter(|handle| handle.pod().phase == Phase::Ready);
        ready.filter_map(|handle| Some((handle.id.clone(), handle.stats()?))).collect()
    }

    /// As [`Self::all_stats`], but the pods are not measured again for it.
    pub fn last_stats(&self) -> BTreeMap<PodId, Arc<PodStatsView>> {
        let handles = self.node.registry.handles().into_iter();
        let ready = handles.filter(|handle| handle.pod().phase == Phase::Ready);
        ready.filter_map(|handle| Some((handle.id.clone(), handle.last_stats()?))).collect()
    }

    pub async fn container_stats(&self, id: &str) -> Result<ContainerStatsView, Error> {
        let (id, handle) = self.node.registry.find_container(id)?;
        handle.container_stats(&id).await
    }

    /// Phases of the pod's start, with durations.
    pub fn trace(&self, pod: &str) -> Result<Vec<TracePhase>, Error> {
        Ok(self.node.registry.find_pod(pod)?.pod().trace.clone())
    }

    /// The guest's console output from position `from`, and the position to continue from.
    pub fn console(&self, pod: &str, from: u64) -> Result<(Vec<u8>, u64), Error> {
        let handle: Arc<Handle> = self.node.registry.find_pod(pod)?;
        handle.machine.vmm()?;
        let path = &handle.paths.console;
        File::open(path)
            .and_then(|file| vmm_api::console_ring::read(&file, from))
            .map_err(|e| Error::io(format!("read console {}", path.display()), e))
    }

    /// Stops the owner tasks; pods keep running and are recovered by the next [`Self::open`].
    pub async fn shutdown(&self) {
        self.node.shutdown.cancel();
        let ended = async {
            for handle in self.node.registry.handles() {
                handle.owner_ended().await;
            }
        };
        let _ = tokio::time::timeout(SHUTDOWN_LIMIT, ended).await;
    }
}

fn has_prefix(wanted: &Option<String>, id: &str) -> bool {
    wanted.as_ref().is_none_or(|w| id.starts_with(w.as_str()))
}

/// Ids are used in paths and in names to which a dot and a number are appended.
fn check_id(id: &str, longest: usize) -> Result<(), Error> {
    let plain = id.chars().all(|c| c.is_ascii_alphanumeric());
    if id.is_empty() || id.len() > longest || !plain {
        return Err(Error::invalid(format!(
            "invalid id {id:?}: expected 1 to {longest} letters and digits"
        )));
    }
    Ok(())
}

fn check_pod(spec: &PodSpec) -> Result<(), Error> {
    if spec.meta.name.is_empty() {
        return Err(Error::invalid("a pod needs a name"));
    }
    if spec.hostname.len() > MAX_HOSTNAME {
        let (got, name) = (spec.hostname.len(), &spec.hostname);
        return Err(Error::invalid(format!(
            "host name {name:?} has {got} bytes, the limit is {MAX_HOSTNAME}"
        )));
    }
    if spec.vcpus == Some(0) || spec.memory_mib.is_some_and(|m| m < 64) {
        return Err(Error::invalid("a pod needs at least 1 vCPU and 64 MiB of memory"));
    }
    Ok(())
}
