//! What a pod looks like from outside of its owner task.

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

use super::disks::Plugged;
use super::empty_dirs::EmptyDirsMade;
use super::owner::{Msg, Request};
use super::shares::Server;
use crate::error::Error;
use crate::guest::{Door, Guest};
use crate::host::pool::Pool;
use crate::logs::LogHandle;
use crate::machine::Machine;
use crate::model::{ContainerId, PodId};
use crate::node::Node;
use crate::policy::{Change, Container, Phase, Pod};
use crate::stats::PodStatsView;
use crate::vmm::Vmm;

/// Files of a pod.
#[derive(Debug, Clone)]
pub(crate) struct Paths {
    pub(crate) folder: PathBuf,
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
        let (folder, state_dir) = (node.journal.folder(pod), node.state_dir(pod));
        Self {
            control: state_dir.join("control.sock"),
            vsock: state_dir.join("vsock.sock"),
            shares: state_dir.join("shares.sock"),
            console: folder.join("console.ring"),
            status: folder.join("vmm-status.json"),
            log: folder.join("vmm.log"),
            scratch_disk: folder.join("scratch.img"),
            folder,
            state_dir,
        }
    }

    /// A container's own disk, of a pod that a former release has started.
    pub(crate) fn scratch(&self, container: &str) -> PathBuf {
        self.folder.join(format!("scratch-{container}.img"))
    }

    /// The same, of a pod without a VM: a folder.
    pub(crate) fn layer(&self, container: &str) -> PathBuf {
        self.folder.join(format!("layer-{container}"))
    }

    /// Beside the log: how far it goes.
    pub(crate) fn sidecar(&self, container: &str) -> PathBuf {
        self.folder.join(format!("log-{container}.state"))
    }
}

/// The end of an exec'd process.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExecEnd {
    pub(crate) code: i32,
    pub(crate) oom_killed: bool,
    pub(crate) at: SystemTime,
}

/// What lives as long as the VM does, and only in memory.
#[derive(Default)]
struct Live {
    logs: HashMap<ContainerId, LogHandle>,
    /// By exec id.
    execs: HashMap<String, oneshot::Sender<ExecEnd>>,
    stats: Option<Arc<PodStatsView>>,
    /// Containers whose start is not decided yet; the channel closes when it is.
    starting: HashMap<ContainerId, watch::Receiver<()>>,
    /// Keep a container's volumes in step.
    syncs: HashMap<ContainerId, JoinSet<()>>,
    /// Host sides of files that are written back, by the volume's number.
    written_back: HashMap<(ContainerId, usize), Arc<File>>,
}

pub(crate) struct Handle {
    pub(crate) id: PodId,
    pub(crate) node: Arc<Node>,
    pub(crate) paths: Paths,
    pub(crate) guest: Guest,
    pub(crate) machine: Machine,
    /// Set when the pod stops: work on its containers gives up.
    pub(crate) closing: CancellationToken,
    /// Held for reading by work on containers; who removes the pod's files takes it for writing.
    pub(crate) gate: Arc<tokio::sync::RwLock<()>>,
    /// Plugging and pulling disks is one thing at a time, so that a disk is not pulled for one
    /// container just when another has found it there.
    pub(super) plugs: tokio::sync::Mutex<Plugged>,
    /// Held while the VM is resized.
    pub(super) resizing: tokio::sync::Mutex<()>,
    /// Held while the pod's cgroup is moved to other CPUs.
    pub(super) pinning: tokio::sync::Mutex<()>,
    /// Held while the OOM scores of the pod's processes are set.
    pub(super) scoring: tokio::sync::Mutex<()>,
    /// The file server, once it is needed. Held while it starts.
    pub(super) shares: tokio::sync::Mutex<Option<Arc<Server>>>,
    /// Held while shares are added or removed: several containers may have the same one.
    pub(super) sharing: tokio::sync::Mutex<()>,
    /// Held while an emptyDir is made in the guest.
    pub(super) empty_dirs: tokio::sync::Mutex<EmptyDirsMade>,
    /// Measures once what nobody has measured yet.
    pub(super) first_stats: tokio::sync::OnceCell<()>,
    /// Somebody has read the statistics.
    pub(super) stats_read: tokio::sync::Notify,
    /// Containers that a former daemon has left: recovery looks at these, and not at those that
    /// are being made meanwhile.
    pub(super) recovered: BTreeSet<ContainerId>,
    /// For looks at paths that a user chose: volumes, devices.
    pub(crate) lookups: Pool,
    /// For the logs of containers, apart from the volumes.
    pub(crate) log_writes: Pool,
    requests: mpsc::Sender<Msg>,
    state: watch::Receiver<Arc<Pod>>,
    live: Mutex<Live>,
}

/// Threads of a pod for looks at its volumes, and for its logs.
const LOOKUPS: usize = 16;
const LOG_WRITES: usize = 4;

/// See [`Handle::begin_start`].
pub(super) struct Starting {
    handle: Arc<Handle>,
    container: ContainerId,
    _decided: watch::Sender<()>,
}

impl Drop for Starting {
    fn drop(&mut self) {
        self.handle.live().starting.remove(&self.container);
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
        let (machine, door) = match host {
            Some(namespaces) => (Machine::Host(namespaces), Door::Folder(paths.state_dir.clone())),
            None => {
                let limit = node.config.vmm_call_deadline();
                let vmm = Vmm::new(paths.control.clone(), limit, node.failpoints.clone());
                (Machine::Vm(vmm), Door::Vsock(paths.vsock.clone()))
            }
        };
        Self {
            guest: Guest::new(
                door,
                node.config.guest_call_deadline(),
                node.observer.clone(),
                node.failpoints.clone(),
            ),
            machine,
            closing: node.shutdown.child_token(),
            gate: Arc::default(),
            plugs: tokio::sync::Mutex::default(),
            resizing: tokio::sync::Mutex::default(),
            pinning: tokio::sync::Mutex::default(),
            scoring: tokio::sync::Mutex::default(),
            shares: tokio::sync::Mutex::default(),
            sharing: tokio::sync::Mutex::default(),
            live: Mutex::default(),
            empty_dirs: tokio::sync::Mutex::default(),
            first_stats: tokio::sync::OnceCell::new(),
            stats_read: tokio::sync::Notify::new(),
            recovered,
            lookups: Pool::new("pod-lookup", LOOKUPS, node.config.vmm_call_deadline()),
            log_writes: Pool::new("pod-log", LOG_WRITES, node.config.vmm_call_deadline()),
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

    /// The pod, if a guest runs in it.
    pub(crate) fn ready_pod(&self) -> Result<Arc<Pod>, Error> {
        let pod = self.pod();
        if pod.phase == Phase::Ready {
            return Ok(pod);
        }
        let why = if pod.reason.is_empty() { "it was stopped" } else { &pod.reason };
        Err(Error::precondition(format!("pod {} is not ready: {why}", self.id)))
    }

    /// Waits until `done` says so about the pod, or it is gone. An error if the daemon ends first.
    pub(crate) async fn wait_for(&self, mut done: impl FnMut(&Pod) -> bool) -> Result<(), Error> {
        match self.state.clone().wait_for(|pod| done(pod)).await {
            Err(_) if self.node.shutdown.is_cancelled() => {
                Err(Error::unavailable("the daemon is ending"))
            }
            _ => Ok(()),
        }
    }

    /// Asks the owner for something and waits for the answer.
    pub(crate) async fn ask<T>(
        &self,
        request: impl FnOnce(oneshot::Sender<Result<T, Error>>) -> Request,
    ) -> Result<T, Error> {
        let (reply, answer) = oneshot::channel();
        self.requests.send(Msg::Request(request(reply))).await.map_err(|_| self.unanswered())?;
        answer.await.map_err(|_| self.unanswered())?
    }

    /// Why nobody answers: the pod is gone, or the daemon ends under the request.
    fn unanswered(&self) -> Error {
        if self.node.shutdown.is_cancelled() {
            return Error::unavailable("the daemon is ending");
        }
        match self.node.registry.find_pod(&self.id) {
            Ok(_) => Error::unavailable("the daemon has failed at it: see its log"),
            Err(_) => Error::NotFound { what: "pod", id: self.id.clone() },
        }
    }

    /// Has changes journaled and published; all of them or none.
    pub(crate) async fn commit(&self, changes: Vec<Change>) -> Result<(), Error> {
        let (reply, answer) = oneshot::channel();
        let gone = || Error::unavailable(format!("pod {} is gone", self.id));
        self.requests.send(Msg::Commit { changes, reply }).await.map_err(|_| gone())?;
        answer.await.map_err(|_| gone())?
    }

    /// Resolves when the owner task is no more.
    pub(crate) async fn owner_ended(&self) {
        self.requests.closed().await;
    }

    pub(super) async fn tell(&self, msg: Msg) {
        let _ = self.requests.send(msg).await;
    }

    fn live(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn log(&self, container: &str) -> Option<LogHandle> {
        self.live().logs.get(container).cloned()
    }

    pub(super) fn set_log(&self, container: &str, log: LogHandle) {
        self.live().logs.insert(container.to_owned(), log);
    }

    /// Says that a container's start is going on, until the guard is dropped. None: another one is.
    pub(super) fn begin_start(self: &Arc<Self>, container: &str) -> Option<Starting> {
        let (decided, receiver) = watch::channel(());
        match self.live().starting.entry(container.to_owned()) {
            Entry::Occupied(_) => return None,
            Entry::Vacant(free) => free.insert(receiver),
        };
        Some(Starting { handle: self.clone(), container: container.to_owned(), _decided: decided })
    }

    /// Waits while a container's start goes on.
    pub(super) async fn start_decided(&self, container: &str) {
        let starting = self.live().starting.get(container).cloned();
        if let Some(mut starting) = starting {
            let _ = starting.changed().await;
        }
    }

    pub(super) fn set_syncs(&self, container: &str, tasks: JoinSet<()>) {
        self.live().syncs.insert(container.to_owned(), tasks);
    }

    pub(super) fn set_written_back(&self, container: &str, volume: usize, file: Arc<File>) {
        self.live().written_back.insert((container.to_owned(), volume), file);
    }

    pub(super) fn written_back(&self, container: &str, volume: usize) -> Option<Arc<File>> {
        self.live().written_back.get(&(container.to_owned(), volume)).cloned()
    }

    /// Ends the container's tasks.
    pub(super) fn drop_live(&self, container: &str) {
        let mut live = self.live();
        live.logs.remove(container);
        live.syncs.remove(container);
        live.written_back.retain(|(id, _), _| id != container);
    }

    /// Nothing is written to a log any more; what comes is left to the guest.
    pub(super) fn end_logs(&self) {
        let logs = std::mem::take(&mut self.live().logs);
        drop(logs);
    }

    pub(super) fn logs(&self) -> Vec<LogHandle> {
        self.live().logs.values().cloned().collect()
    }

    /// Says where the end of an exec is to be reported. Must come before the exec itself.
    pub(crate) fn expect_exec(&self, exec: &str) -> oneshot::Receiver<ExecEnd> {
        let (sender, receiver) = oneshot::channel();
        self.live().execs.insert(exec.to_owned(), sender);
        receiver
    }

    pub(crate) fn forget_exec(&self, exec: &str) {
        self.live().execs.remove(exec);
    }

    pub(super) fn exec_ended(&self, exit: &Exit, at: SystemTime) {
        if let Some(sender) = self.live().execs.remove(&exit.exec_id) {
            let _ = sender.send(ExecEnd { code: exit.code, oom_killed: exit.oom_killed, at });
        }
    }

    pub(crate) fn knows_exec(&self, exec: &str) -> bool {
        self.live().execs.contains_key(exec)
    }

    /// The VM is gone: nobody waits any longer, no log task goes on.
    pub(super) fn clear_live(&self) {
        let live = std::mem::take(&mut *self.live());
        drop(live);
    }

    /// As last measured; asks nobody. It is measured again soon.
    pub(crate) fn stats(&self) -> Option<Arc<PodStatsView>> {
        self.stats_read.notify_one();
        self.last_stats()
    }

    pub(crate) fn last_stats(&self) -> Option<Arc<PodStatsView>> {
        self.live().stats.clone()
    }

    pub(crate) fn set_stats(&self, stats: Arc<PodStatsView>) {
        self.live().stats = Some(stats);
    }
}
