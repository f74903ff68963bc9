//! The pod that a shim holds, and its tasks. What containerd asks for by its own ids is asked of the
//! sandbox by keys ([`crate::place::key`]), which are short and plain.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use anyhow::Context;
use containerd_shim_protos::events::task::{
    TaskCreate, TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskIO, TaskOOM, TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::{Code, Result};
use containerd_shim_protos::types::mount::Mount;
use sandbox::Sandboxes;
use sandbox::model::{EventKind, PodState};
use tokio::sync::OnceCell;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::errors::{invalid, not_found, of_sandbox, other, precondition, status};
use crate::events::{Publisher, timestamp};
use crate::network::Joined;
use crate::place::{Place, key};
use crate::process::{Exit, Process};
use crate::rootfs::{self, Wanted};
use crate::settings::Settings;
use crate::spec::{self, Role};
use crate::stdio::{Names, Stdio};

/// Tasks and execs of a pod that containerd may have at a time, ended ones included.
const MAX_TASKS: usize = 256;
const MAX_EXECS: usize = 512;
const SIGKILL: u32 = 9;
/// Time that Kill waits for a start in progress.
const START_WAIT: Duration = Duration::from_secs(2);

/// The pod. Its methods are the verbs of the task API.
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) place: Place,
    settings: Settings,
    pub(crate) publisher: Publisher,
    sandboxes: OnceCell<Sandboxes>,
    /// None: it is being created.
    tasks: Mutex<BTreeMap<String, Option<Arc<Task>>>>,
    /// The shim is to end.
    pub(crate) ending: CancellationToken,
}

pub(crate) struct Task {
    id: String,
    role: Role,
    pub(crate) bundle: PathBuf,
    pub(crate) init: Process,
    execs: Mutex<BTreeMap<String, Arc<Exec>>>,
    /// A signal that ended the sandbox.
    killed_by: Mutex<Option<u32>>,
}

pub(crate) struct Exec {
    pub(crate) process: Process,
    spec: oci_spec::runtime::Process,
}

/// A task and, if one is named, a process that was added to it.
pub(crate) enum Found {
    Init(Arc<Task>),
    Exec(Arc<Task>, Arc<Exec>),
}

impl Found {
    pub(crate) fn process(&self) -> &Process {
        match self {
            Self::Init(task) => &task.init,
            Self::Exec(_, exec) => &exec.process,
        }
    }

    pub(crate) fn task(&self) -> &Arc<Task> {
        let (Self::Init(task) | Self::Exec(task, _)) = self;
        task
    }
}

/// What Create is given.
pub(crate) struct Creation {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) names: Names,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Exec>>> {
        lock(&self.execs)
    }

    pub(crate) fn is_sandbox(&self) -> bool {
        self.role == Role::Sandbox
    }

    fn rootfs(&self) -> PathBuf {
        rootfs::place(&self.bundle)
    }
}

impl Pod {
    pub(crate) fn new(
        namespace: String,
        place: Place,
        settings: Settings,
        publisher: Publisher,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            place,
            settings,
            publisher,
            sandboxes: OnceCell::new(),
            tasks: Mutex::default(),
            ending: CancellationToken::new(),
        })
    }

    fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, Option<Arc<Task>>>> {
        lock(&self.tasks)
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>> {
        self.tasks().get(id).cloned().flatten().ok_or_else(|| not_found("task", id))
    }

    pub(crate) fn find(&self, id: &str, exec: &str) -> Result<Found> {
        let task = self.task(id)?;
        if exec.is_empty() {
            return Ok(Found::Init(task));
        }
        let exec = task.execs().get(exec).cloned().ok_or_else(|| not_found("process", exec))?;
        Ok(Found::Exec(task, exec))
    }

    pub(crate) fn has_tasks(&self) -> bool {
        !self.tasks().is_empty()
    }

    /// The id of a container in the sandbox.
    pub(crate) fn key(&self, id: &str) -> String {
        key(&self.namespace, id)
    }

    pub(crate) fn sandboxes(&self) -> Result<&Sandboxes> {
        self.sandboxes.get().ok_or_else(|| precondition("the pod has no sandbox"))
    }

    /// Of the VMM; it stands for all processes of the guest, whose own pids mean nothing here.
    pub(crate) fn vmm_pid(&self) -> u32 {
        let pod = self.sandboxes.get().and_then(|s| s.pod(&self.place.key).ok());
        pod.and_then(|pod| pod.vmm_pid).unwrap_or_else(std::process::id)
    }

    pub(crate) async fn create(self: &Arc<Self>, creation: Creation) -> Result<u32> {
        let id = creation.id.clone();
        crate::args::check("id", &id).map_err(|e| invalid(format!("{e:#}")))?;
        {
            let mut tasks = self.tasks();
            if tasks.contains_key(&id) {
                return Err(status(Code::ALREADY_EXISTS, format!("task {id} exists already")));
            }
            if tasks.len() >= MAX_TASKS {
                let message = format!("the pod has {MAX_TASKS} tasks, the most that it can have");
                return Err(status(Code::RESOURCE_EXHAUSTED, message));
            }
            tasks.insert(id.clone(), None);
        }
        // Whatever becomes of the call, what it leaves is a task or nothing.
        let reserved = Reserved { pod: self.clone(), id: id.clone() };
        let this = self.clone();
        let made = tokio::spawn(async move {
            let made = this.make(&creation).await;
            drop(reserved);
            made
        });
        made.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))
    }

    async fn make(self: &Arc<Self>, creation: &Creation) -> Result<u32> {
        let Creation { id, bundle, names, .. } = creation;
        let spec = spec::read(bundle).map_err(other)?;
        let role = spec::role(&spec).map_err(|e| invalid(format!("{e:#}")))?;
        if let Role::Member { pod } = &role
            && key(&self.namespace, pod) != self.place.key
        {
            return Err(invalid(format!("container {id} is of pod {pod}, which has another shim")));
        }
        if !matches!(role, Role::Member { .. }) && self.key(id) != self.place.key {
            return Err(invalid(format!(
                "task {id} is not of a pod, and this shim has another one"
            )));
        }
        let stdio = Stdio::open(names).await.map_err(|e| invalid(format!("{e:#}")))?;
        let task = Arc::new(Task {
            id: id.clone(),
            role,
            bundle: bundle.clone(),
            init: Process::new(names.clone(), Some(stdio)),
            execs: Mutex::default(),
            killed_by: Mutex::default(),
        });
        let made = match &task.role {
            Role::Sandbox => self.run_pod(&task, &spec).await,
            Role::Member { .. } => self.create_container(&task, spec, &creation.rootfs).await,
            Role::Single => match self.run_pod(&task, &spec).await {
                Ok(()) => self.create_container(&task, spec, &creation.rootfs).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = made {
            self.take_down(&task).await;
            return Err(error);
        }
        let pid = self.vmm_pid();
        task.init.set_pid(pid);
        let io = TaskIO {
            stdin: names.stdin.clone(),
            stdout: names.stdout.clone(),
            stderr: names.stderr.clone(),
            terminal: names.terminal,
            ..Default::default()
        };
        let created = TaskCreate {
            container_id: id.clone(),
            bundle: bundle.display().to_string(),
            io: MessageField::some(io),
            pid,
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, &created);
        self.tasks().insert(id.clone(), Some(task.clone()));
        self.watch(task);
        Ok(pid)
    }

    async fn run_pod(&self, task: &Task, spec: &oci_spec::runtime::Spec) -> Result<()> {
        let sandboxes = self.sandboxes.get_or_try_init(|| async {
            self.place.make().map_err(other)?;
            let uid = self.place.take_uid().map_err(other)?;
            let config = self.settings.pods(&self.place, uid);
            Sandboxes::open(config, Arc::new(Joined)).await.map_err(of_sandbox)
        });
        let pod = spec::pod(&self.namespace, &task.id, spec, &self.settings);
        sandboxes.await?.run_pod_with_id(self.place.key.clone(), pod).await.map_err(of_sandbox)?;
        Ok(())
    }

    async fn create_container(
        &self,
        task: &Task,
        spec: oci_spec::runtime::Spec,
        mounts: &[Mount],
    ) -> Result<()> {
        let sandboxes = self.sandboxes()?;
        let rootfs = match mounts {
            // A folder that containerd has not mounted (ctr run --rootfs).
            [] => {
                let path = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
                task.bundle.join(path)
            }
            mounts => {
                let wanted: Vec<Wanted> = mounts
                    .iter()
                    .map(|mount| Wanted {
                        kind: mount.type_.clone(),
                        source: mount.source.clone().into(),
                        options: mount.options.clone(),
                    })
                    .collect();
                let target = task.rootfs();
                let mounted = {
                    let target = target.clone();
                    tokio::task::spawn_blocking(move || rootfs::mount_lower(&wanted, &target))
                };
                let mounted = mounted.await.context("a thread that mounts panicked");
                mounted.and_then(|mounted| mounted).map_err(other)?;
                target
            }
        };
        let names = &task.init.names;
        let has_stdin = !names.stdin.is_empty();
        let container = spec::container(&task.id, spec, &rootfs, names.terminal, has_stdin)
            .map_err(|e| invalid(format!("{e:#}")))?;
        let inner = self.key(&task.id);
        sandboxes
            .create_container_with_id(&self.place.key, inner.clone(), container)
            .await
            .map_err(of_sandbox)?;
        let streams = sandboxes.streams(&inner).await.map_err(of_sandbox)?;
        task.init.set_control(streams.process.control());
        if let Some(stdio) = task.init.take_stdio() {
            task.init.carry(stdio, (streams.stdin, streams.stdout, streams.stderr));
        }
        Ok(())
    }

    /// Tells of a task's end, whatever brings it about.
    fn watch(self: &Arc<Self>, task: Arc<Task>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let (exit, oom) = match &task.role {
                Role::Sandbox => (pod.sandbox_end(&task).await, false),
                Role::Member { .. } | Role::Single => pod.container_end(&task).await,
            };
            // Its start is told before.
            let _turn = task.init.turn.lock().await;
            if oom {
                let event = TaskOOM { container_id: task.id.clone(), ..Default::default() };
                pod.publisher.publish(topics::TASK_OOM_EVENT_TOPIC, &event);
            }
            if task.init.set_exit(exit) {
                pod.publish_exit(&task, "", task.init.pid(), exit);
            }
        });
    }

    fn publish_exit(&self, task: &Task, exec: &str, pid: u32, exit: Exit) {
        let event = TaskExit {
            container_id: task.id.clone(),
            id: if exec.is_empty() { task.id.clone() } else { exec.to_owned() },
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_EXIT_EVENT_TOPIC, &event);
    }

    async fn container_end(&self, task: &Task) -> (Exit, bool) {
        let unseen = || (Exit { status: 255, at: SystemTime::now() }, false);
        let Ok(sandboxes) = self.sandboxes() else { return unseen() };
        match sandboxes.wait_container(&self.key(&task.id)).await {
            Ok(view) => (Exit::of(&view), view.oom_killed),
            Err(error) => {
                tracing::warn!(task = task.id, %error, "end of a container is not known");
                unseen()
            }
        }
    }

    async fn sandbox_end(&self, task: &Task) -> Exit {
        if let Ok(sandboxes) = self.sandboxes() {
            let mut events = sandboxes.events();
            let is_ready =
                || sandboxes.pod(&self.place.key).is_ok_and(|pod| pod.state == PodState::Ready);
            while is_ready() {
                match events.recv().await {
                    Ok(event) if event.container.is_none() && event.kind != EventKind::Created => {}
                    Err(RecvError::Closed) => break,
                    _ => {}
                }
            }
        }
        let signal = *lock(&task.killed_by);
        Exit { status: signal.map_or(255, |signal| 128 + signal), at: SystemTime::now() }
    }

    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let (this, id, exec_id) = (self.clone(), id.to_owned(), exec_id.to_owned());
        // Seen through when the caller gives up: a process that runs is known to do so.
        let started = tokio::spawn(async move {
            match this.find(&id, &exec_id)? {
                Found::Init(task) => this.start_task(&task).await,
                Found::Exec(task, exec) => this.start_exec(&task, &exec_id, exec).await,
            }
        });
        started.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))
    }

    async fn start_task(&self, task: &Task) -> Result<u32> {
        let _turn = task.init.turn.lock().await;
        if task.init.is_started() || task.init.exit().is_some() {
            return Err(precondition(format!("task {} is not in the state created", task.id)));
        }
        match task.role {
            // There is no process of the pod's own.
            Role::Sandbox => {}
            Role::Member { .. } | Role::Single => {
                let inner = self.key(&task.id);
                self.sandboxes()?.start_container(&inner).await.map_err(of_sandbox)?;
            }
        }
        task.init.set_started();
        let pid = task.init.pid();
        let event = TaskStart { container_id: task.id.clone(), pid, ..Default::default() };
        self.publisher.publish(topics::TASK_START_EVENT_TOPIC, &event);
        Ok(pid)
    }

    pub(crate) async fn add_exec(
        &self,
        id: &str,
        exec_id: &str,
        names: Names,
        spec: &[u8],
    ) -> Result<()> {
        let task = self.task(id)?;
        if task.role == Role::Sandbox {
            return Err(status(Code::UNIMPLEMENTED, "a pod's sandbox has no processes of its own"));
        }
        crate::args::check("exec id", exec_id).map_err(|e| invalid(format!("{e:#}")))?;
        let mut spec: oci_spec::runtime::Process = serde_json::from_slice(spec)
            .map_err(|e| invalid(format!("specification of the process: {e}")))?;
        spec.set_terminal(Some(names.terminal));
        let stdio = Stdio::open(&names).await.map_err(|e| invalid(format!("{e:#}")))?;
        let exec = Arc::new(Exec { process: Process::new(names, Some(stdio)), spec });
        {
            let mut execs = task.execs();
            if execs.contains_key(exec_id) || exec_id == id {
                let message = format!("process {exec_id} exists already");
                return Err(status(Code::ALREADY_EXISTS, message));
            }
            if execs.len() >= MAX_EXECS {
                let message = format!("task {id} has {MAX_EXECS} processes, the most it can have");
                return Err(status(Code::RESOURCE_EXHAUSTED, message));
            }
            execs.insert(exec_id.to_owned(), exec);
        }
        let event = TaskExecAdded {
            container_id: id.to_owned(),
            exec_id: exec_id.to_owned(),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_EXEC_ADDED_EVENT_TOPIC, &event);
        Ok(())
    }

    async fn start_exec(
        self: &Arc<Self>,
        task: &Arc<Task>,
        exec_id: &str,
        exec: Arc<Exec>,
    ) -> Result<u32> {
        let _turn = exec.process.turn.lock().await;
        let process = &exec.process;
        if process.is_started() || process.exit().is_some() {
            return Err(precondition(format!("process {exec_id} is not in the state created")));
        }
        if !task.execs().contains_key(exec_id) {
            return Err(not_found("process", exec_id));
        }
        let has_stdin = !process.names.stdin.is_empty();
        let inner = self.key(&task.id);
        let begun = self.sandboxes()?.exec_process(&inner, &exec.spec, has_stdin).await;
        let session = match begun {
            Ok(session) => session,
            Err(error) => {
                process.set_exit(Exit { status: 255, at: SystemTime::now() });
                return Err(of_sandbox(error));
            }
        };
        process.set_control(session.process.control());
        if let Some(stdio) = process.take_stdio() {
            process.carry(stdio, (session.stdin, session.stdout, session.stderr));
        }
        let pid = self.vmm_pid();
        process.set_pid(pid);
        process.set_started();
        let event = TaskExecStarted {
            container_id: task.id.clone(),
            exec_id: exec_id.to_owned(),
            pid,
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_EXEC_STARTED_EVENT_TOPIC, &event);
        let (pod, task, id, watched) =
            (self.clone(), task.clone(), exec_id.to_owned(), exec.clone());
        let mut handle = session.process;
        tokio::spawn(async move {
            let exit = match handle.wait().await {
                Ok(view) => Exit::of(&view),
                Err(error) => {
                    tracing::warn!(exec = id, %error, "end of a process is not known");
                    Exit { status: 255, at: SystemTime::now() }
                }
            };
            let _turn = watched.process.turn.lock().await;
            if watched.process.set_exit(exit) {
                pod.publish_exit(&task, &id, watched.process.pid(), exit);
            }
            drop(_turn);
            // Dropped before, the handle would take the output that is still to come.
            watched.process.streams_ended().await;
            drop(handle);
        });
        Ok(pid)
    }

    pub(crate) async fn kill(
        self: &Arc<Self>,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        let found = self.find(id, exec_id)?;
        let process = found.process();
        let finished = || status(Code::NOT_FOUND, format!("process of {id} has already finished"));
        if process.exit().is_some() {
            return Err(finished());
        }
        match &found {
            Found::Init(task) if task.role == Role::Sandbox => {
                lock(&task.killed_by).get_or_insert(signal);
                let (pod, key) = (self.clone(), self.place.key.clone());
                // Containers are killed and the guest is shut down first; the exit tells when.
                tokio::spawn(async move {
                    let Ok(sandboxes) = pod.sandboxes() else { return };
                    if let Err(error) = sandboxes.stop_pod(&key).await {
                        tracing::error!(%error, "the pod does not stop");
                    }
                });
                Ok(())
            }
            _ => {
                if process.control().is_none() {
                    // It may be being started.
                    let _ = tokio::time::timeout(START_WAIT, process.turn.lock()).await;
                }
                let Some(control) = process.control() else {
                    return Err(precondition(format!("process {exec_id} of {id} is not started")));
                };
                match control.signal(signal, all).await {
                    Ok(()) => Ok(()),
                    Err(_) if process.exit().is_some() => Err(finished()),
                    Err(error) => Err(of_sandbox(error)),
                }
            }
        }
    }

    /// Answers the pid and the end of what was removed.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let (this, id, exec_id) = (self.clone(), id.to_owned(), exec_id.to_owned());
        let deleted = tokio::spawn(async move { this.remove(&id, &exec_id).await });
        deleted.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))
    }

    async fn remove(&self, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let found = self.find(id, exec_id)?;
        let process = found.process();
        // A start in progress ends first.
        let _turn = process.turn.lock().await;
        let (pid, task) = (process.pid(), found.task());
        let exit = match (process.exit(), process.is_started()) {
            (Some(exit), _) => exit,
            (None, true) => return Err(precondition(format!("process of {id} still runs"))),
            // Created, and never started.
            (None, false) => {
                let exit = Exit { status: 128 + SIGKILL, at: SystemTime::now() };
                if process.set_exit(exit) && exec_id.is_empty() {
                    self.publish_exit(task, "", pid, exit);
                }
                exit
            }
        };
        process.end_streams().await;
        if !exec_id.is_empty() {
            task.execs().remove(exec_id);
            return Ok((pid, exit));
        }
        self.take_down(task).await;
        self.tasks().remove(id);
        let event = TaskDelete {
            container_id: id.to_owned(),
            pid,
            exit_status: exit.status,
            exited_at: MessageField::some(timestamp(exit.at)),
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_DELETE_EVENT_TOPIC, &event);
        Ok((pid, exit))
    }

    /// Removes what a task has in the guest and on the host. Goes on past failures: what they leave
    /// goes with the pod.
    async fn take_down(&self, task: &Task) {
        let mut ending = JoinSet::new();
        for exec in std::mem::take(&mut *task.execs()).into_values() {
            ending.spawn(async move { exec.process.end_streams().await });
        }
        ending.join_all().await;
        if let Some(sandboxes) = self.sandboxes.get() {
            if task.role != Role::Sandbox
                && let Err(error) = sandboxes.remove_container(&self.key(&task.id)).await
            {
                tracing::warn!(task = task.id, %error, "a container stays until its pod goes");
            }
            if !matches!(task.role, Role::Member { .. })
                && let Err(error) = sandboxes.remove_pod(&self.place.key).await
            {
                tracing::error!(%error, "the pod is not removed");
            }
        }
        let target = task.rootfs();
        let unmounted = tokio::task::spawn_blocking(move || rootfs::unmount(&target)).await;
        if let Ok(Err(error)) = unmounted {
            tracing::warn!(task = task.id, error = format!("{error:#}"), "root stays mounted");
        }
    }

    /// The shim is not needed any more, unless there are tasks.
    pub(crate) fn shut_down(self: &Arc<Self>) {
        if self.has_tasks() {
            return;
        }
        if let Err(error) = std::fs::write(self.place.ending(), "") {
            tracing::warn!(%error, "cannot tell `delete` that the shim ends by itself");
        }
        let pod = self.clone();
        tokio::spawn(async move {
            // The response is sent first.
            tokio::time::sleep(Duration::from_millis(20)).await;
            pod.ending.cancel();
        });
    }

    /// Takes everything away: no task is left.
    pub(crate) async fn end(&self) {
        if let Some(sandboxes) = self.sandboxes.get() {
            if let Err(error) = sandboxes.remove_pod(&self.place.key).await {
                tracing::error!(%error, "the pod is not removed");
                return;
            }
            sandboxes.shutdown().await;
        }
        if let Err(error) = self.place.clear() {
            tracing::error!(error = format!("{error:#}"), "files of the pod stay");
        }
    }
}

/// A name that is taken while its task is made.
struct Reserved {
    pod: Arc<Pod>,
    id: String,
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut tasks = self.pod.tasks();
        if tasks.get(&self.id).is_some_and(Option::is_none) {
            tasks.remove(&self.id);
        }
    }
}

/// What a container is killed with when nothing else is said.
pub(crate) fn signal_or_kill(signal: u32) -> u32 {
    if signal == 0 { SIGKILL } else { signal }
}
