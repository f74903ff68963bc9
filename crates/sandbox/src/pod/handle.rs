//! Handle of a pod: its published state, and requests to its owner task.

use std::collections::hash_map::Entry;
use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use agent_api::v1::Exit;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::file_server::FileServer;
use super::message::{Msg, Request};
use crate::error::Error;
use crate::guest::{AgentAddress, Guest};
use crate::host::pool::BlockingPool;
use crate::logs::LogHandle;
use crate::machine::Machine;
use crate::model::{ContainerId, PodId};
use crate::node::Node;
use crate::policy::{Change, Container, Phase, Pod};
use crate::stats::PodStatsView;
use crate::vmm::Vmm;

/// Paths of a pod's files.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) directory: PathBuf,
    pub(crate) state_dir: PathBuf,
    pub(crate) control: PathBuf,
    pub(crate) vsock: PathBuf,
    pub(crate) console: PathBuf,
    pub(crate) status: PathBuf,
    pub(crate) log: PathBuf,
    /// Control socket of the file server.
    pub(crate) shares: PathBuf,
    /// Scratch disk of the pod.
    pub(crate) scratch_disk: PathBuf,
}

impl Paths {
    pub(crate) fn new(node: &Node, pod: &str) -> Self {
        let (directory, state_dir) = (node.journal.directory(pod), node.state_dir(pod));
        Self {
            control: state_dir.join("control.sock"),
            vsock: state_dir.join("vsock.sock"),
            shares: state_dir.join("shares.sock"),
            console: directory.join("console.ring"),
            status: directory.join("vmm-status.json"),
            log: directory.join("vmm.log"),
            scratch_disk: directory.join("scratch.img"),
            directory,
            state_dir,
        }
    }

    /// A container's scratch disk, in a pod started by an earlier release.
    pub(crate) fn scratch(&self, container: &str) -> PathBuf {
        self.directory.join(format!("scratch-{container}.img"))
    }

    /// Directory of a container's writable layer, in a host pod.
    pub(crate) fn layer(&self, container: &str) -> PathBuf {
        self.directory.join(format!("layer-{container}"))
    }

    /// The log's sidecar.
    pub(crate) fn sidecar(&self, container: &str) -> PathBuf {
        self.directory.join(format!("log-{container}.state"))
    }
}

/// Exit of an exec'd process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExecExit {
    pub(crate) code: i32,
    pub(crate) oom_killed: bool,
    pub(crate) at: SystemTime,
}

/// State in memory that is valid while the VM runs.
#[derive(Default)]
struct RuntimeState {
    logs: HashMap<ContainerId, LogHandle>,
    /// By exec id.
    execs: HashMap<String, oneshot::Sender<ExecExit>>,
    stats: Option<Arc<PodStatsView>>,
    /// Containers that are being started; the channel closes when the result is known.
    starting: HashMap<ContainerId, watch::Receiver<()>>,
    /// Tasks that update a container's synced volumes.
    syncs: HashMap<ContainerId, JoinSet<()>>,
    /// Host files for written-back volumes, by the volume's index.
    written_back: HashMap<(ContainerId, usize), Arc<File>>,
}

pub(crate) struct Handle {
    pub(crate) id: PodId,
    pub(crate) node: Arc<Node>,
    pub(crate) paths: Paths,
    pub(crate) guest: Guest,
    pub(crate) machine: Machine,
    /// Cancelled when the pod stops: work on its containers is aborted.
    pub(crate) stopping: CancellationToken,
    /// Read-locked by jobs on containers; the removal of the pod's files takes the write lock.
    pub(crate) jobs_lock: Arc<tokio::sync::RwLock<()>>,
    /// Serials of the disks that this daemon knows to be visible in the guest. Held during plugging and
    /// unplugging, so that a disk is not unplugged while another container starts to use it.
    pub(super) known_disks: tokio::sync::Mutex<BTreeSet<String>>,
    /// Held while the VM is resized.
    pub(super) resize_lock: tokio::sync::Mutex<()>,
    /// Held while the pod's cgroup is moved to other CPUs.
    pub(super) cpuset_lock: tokio::sync::Mutex<()>,
    /// Held while the OOM scores of the pod's processes are set.
    pub(super) oom_score_lock: tokio::sync::Mutex<()>,
    /// The file server, started when it is first needed. Held during the start.
    pub(super) shares: tokio::sync::Mutex<Option<Arc<FileServer>>>,
    /// Held while shares are added or removed: containers may use the same share.
    pub(super) shares_lock: tokio::sync::Mutex<()>,
    /// Names of the emptyDirs that this daemon knows to be ready in the guest. Held while one is created.
    pub(super) empty_dirs: tokio::sync::Mutex<BTreeSet<String>>,
    /// The first measurement of a pod without statistics.
    pub(super) first_stats: tokio::sync::OnceCell<()>,
    /// Notified when statistics are read.
    pub(super) stats_read: tokio::sync::Notify,
    /// Containers of the previous daemon, to be recovered; excludes those that are being created
    /// meanwhile.
    pub(super) recovered: BTreeSet<ContainerId>,
    /// For calls on paths that a user chose: volumes, devices.
    pub(crate) lookups: BlockingPool,
    /// For container logs, separate from the volumes.
    pub(crate) log_writes: BlockingPool,
    requests: mpsc::Sender<Msg>,
    state: watch::Receiver<Arc<Pod>>,
    runtime: Mutex<RuntimeState>,
}

/// Threads per pod for its volumes, and for its logs.
const LOOKUPS: usize = 16;
const LOG_WRITES: usize = 4;

/// See [`Handle::mark_starting`].
pub(super) struct Starting {
    handle: Arc<Handle>,
    container: ContainerId,
    _decided: watch::Sender<()>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.handle.runtime().starting.remove(&self.container);
    }
}

impl Handle {
    pub(super) fn new(
        node: Arc<Node>,
        id: PodId,
        requests: mpsc::Sender<Msg>,
        state: watch::Receiver<Arc<Pod>>,
    ) -> Self {
        let paths = Paths::new(&node, &id);
        let recovered = state.borrow().containers.keys().cloned().collect();
        let host = state.borrow().spec.host;
        let (machine, address) = match host {
            Some(namespaces) => {
                (Machine::Host(namespaces), AgentAddress::Directory(paths.state_dir.clone()))
            }
            None => {
                let limit = node.config.vmm_call_deadline();
                let vmm = Vmm::new(paths.control.clone(), limit, node.failpoints.clone());
                (Machine::Vm(vmm), AgentAddress::Vsock(paths.vsock.clone()))
            }
        };
        Self {
            guest: Guest::new(
                address,
                node.config.guest_call_deadline(),
                node.observer.clone(),
                node.failpoints.clone(),
            ),
            machine,
            stopping: node.shutdown.child_token(),
            jobs_lock: Arc::default(),
            known_disks: tokio::sync::Mutex::default(),
            resize_lock: tokio::sync::Mutex::default(),
            cpuset_lock: tokio::sync::Mutex::default(),
            oom_score_lock: tokio::sync::Mutex::default(),
            shares: tokio::sync::Mutex::default(),
            shares_lock: tokio::sync::Mutex::default(),
            runtime: Mutex::default(),
            empty_dirs: tokio::sync::Mutex::default(),
            first_stats: tokio::sync::OnceCell::new(),
            stats_read: tokio::sync::Notify::new(),
            recovered,
            lookups: BlockingPool::new("pod-lookup", LOOKUPS, node.config.vmm_call_deadline()),
            log_writes: BlockingPool::new("pod-log", LOG_WRITES, node.config.vmm_call_deadline()),
            id,
            node,
            paths,
            requests,
            state,
        }
    }

    /// The pod as last published.
    pub(crate) fn pod(&self) -> Arc<Pod> {
        self.state.borrow().clone()
    }

    pub(crate) fn container(&self, id: &str) -> Result<Container, Error> {
        let pod = self.pod();
        let found = pod.containers.get(id).cloned();
        found.ok_or_else(|| Error::NotFound { what: "container", id: id.to_owned() })
    }

    /// The pod, if it is ready.
    pub(crate) fn ready_pod(&self) -> Result<Arc<Pod>, Error> {
        let pod = self.pod();
        if pod.phase == Phase::Ready {
            return Ok(pod);
        }
        let why = if pod.reason.is_empty() { "it was stopped" } else { &pod.reason };
        Err(Error::precondition(format!("pod {} is not ready: {why}", self.id)))
    }

    /// Waits until `done` returns true or the pod is gone. Fails if the daemon shuts down first.
    pub(crate) async fn wait_for(&self, mut done: impl FnMut(&Pod) -> bool) -> Result<(), Error> {
        match self.state.clone().wait_for(|pod| done(pod)).await {
            Err(_) if self.node.shutdown.is_cancelled() => {
                Err(Error::unavailable("the daemon is shutting down"))
            }
            _ => Ok(()),
        }
    }

    /// Sends a request to the owner and waits for the reply.
    pub(crate) async fn request<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.requests
            .send(Msg::Request(request(reply)))
            .await
            .map_err(|_| self.no_reply_error())?;
        answer.await.map_err(|_| self.no_reply_error())?
    }

    /// Error for a missing reply: the pod is gone, or the daemon shuts down.
    fn no_reply_error(&self) -> Error {
        if self.node.shutdown.is_cancelled() {
            return Error::unavailable("the daemon is shutting down");
        }
        match self.node.registry.find_pod(&self.id) {
            Ok(_) => Error::unavailable("the pod's owner task failed: see the daemon's log"),
            Err(_) => Error::NotFound { what: "pod", id: self.id.clone() },
        }
    }

    /// Applies, journals and publishes changes atomically.
    pub(crate) async fn commit(&self, changes: Vec<Change>) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::unavailable(format!("pod {} is gone", self.id));
        self.requests.send(Msg::Commit { changes, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Resolves when the owner task has ended.
    pub(crate) async fn owner_ended(&self) {
        self.requests.closed().await;
    }

    pub(super) async fn send(&self, msg: Msg) {
        let _ = self.requests.send(msg).await;
    }

    fn runtime(&self) -> MutexGuard<'_, RuntimeState> {
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn log(&self, container: &str) -> Option<LogHandle> {
        self.runtime().logs.get(container).cloned()
    }

    pub(super) fn set_log(&self, container: &str, log: LogHandle) {
        self.runtime().logs.insert(container.to_owned(), log);
    }

    /// Marks a container as being started until the guard is dropped. None: it is already being
    /// started.
    pub(super) fn mark_starting(self: &Arc<Self>, container: &str) -> Option<Starting> {
        let (decided, receiver) = watch::channel(());
        match self.runtime().starting.entry(container.to_owned()) {
            Entry::Occupied(_) => return None,
            Entry::Vacant(free) => free.insert(receiver),
        };
        Some(Starting { handle: self.clone(), container: container.to_owned(), _decided: decided })
    }

    /// Waits until a container's start has a result.
    pub(super) async fn wait_for_start(&self, container: &str) {
        let starting = self.runtime().starting.get(container).cloned();
        if let Some(mut starting) = starting {
            let _ = starting.changed().await;
        }
    }

    pub(super) fn set_syncs(&self, container: &str, tasks: JoinSet<()>) {
        self.runtime().syncs.insert(container.to_owned(), tasks);
    }

    pub(super) fn set_written_back(&self, container: &str, volume: usize, file: Arc<File>) {
        self.runtime().written_back.insert((container.to_owned(), volume), file);
    }

    pub(super) fn written_back(&self, container: &str, volume: usize) -> Option<Arc<File>> {
        self.runtime().written_back.get(&(container.to_owned(), volume)).cloned()
    }

    /// Stops the container's tasks.
    pub(super) fn drop_container_tasks(&self, container: &str) {
        let mut state = self.runtime();
        state.logs.remove(container);
        state.syncs.remove(container);
        state.written_back.retain(|(id, _), _| id != container);
    }

    /// Stops writing logs; the guest buffers further output.
    pub(super) fn stop_logs(&self) {
        let logs = std::mem::take(&mut self.runtime().logs);
        drop(logs);
    }

    pub(super) fn logs(&self) -> Vec<LogHandle> {
        self.runtime().logs.values().cloned().collect()
    }

    /// Registers for the exit of an exec. Must be called before the exec.
    pub(crate) fn register_exec(&self, exec: &str) -> oneshot::Receiver<ExecExit> {
        let (sender, receiver) = oneshot::channel();
        self.runtime().execs.insert(exec.to_owned(), sender);
        receiver
    }

    pub(crate) fn unregister_exec(&self, exec: &str) {
        self.runtime().execs.remove(exec);
    }

    pub(super) fn exec_ended(&self, exit: &Exit, at: SystemTime) {
        if let Some(sender) = self.runtime().execs.remove(&exit.exec_id) {
            let _ = sender.send(ExecExit { code: exit.code, oom_killed: exit.oom_killed, at });
        }
    }

    pub(crate) fn is_exec_registered(&self, exec: &str) -> bool {
        self.runtime().execs.contains_key(exec)
    }

    /// The VM is gone: drops all waiters and log tasks.
    pub(super) fn clear_runtime_state(&self) {
        let state = std::mem::take(&mut *self.runtime());
        drop(state);
    }

    /// The last measurement, and requests a new one. Does not call the guest.
    pub(crate) fn stats(&self) -> Option<Arc<PodStatsView>> {
        self.stats_read.notify_one();
        self.last_stats()
    }

    pub(crate) fn last_stats(&self) -> Option<Arc<PodStatsView>> {
        self.runtime().stats.clone()
    }

    pub(crate) fn set_stats(&self, stats: Arc<PodStatsView>) {
        self.runtime().stats = Some(stats);
    }
}
