//! The pod of a shim, and its tasks. containerd's ids are mapped to the sandbox's by
//! [`crate::paths::key`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use containerd_shim_protos::api::Status;
use containerd_shim_protos::events::task::{
    TaskDelete, TaskExecAdded, TaskExecStarted, TaskExit, TaskOOM, TaskPaused, TaskResumed,
    TaskStart,
};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::{Code, Result};
use sandbox::Sandboxes;
use sandbox::model::{EventKind, PodState};
use tokio::sync::OnceCell;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::create::TaskEntry;
use crate::errors::{from_sandbox, invalid, not_found, precondition, status, unimplemented};
use crate::events::{Publisher, timestamp};
use crate::paths::{PodPaths, key};
use crate::process::{Exit, Process};
use crate::rootfs;
use crate::sandbox_state::SandboxState;
use crate::settings::Settings;
use crate::spec::ContainerType;
use crate::stdio::{Stdio, StdioPaths};

/// Maximum execs of a task, including stopped ones.
const MAX_EXECS: usize = 512;
const SIGKILL: u32 = 9;
/// Time that Kill waits for a Start in progress.
const START_LOCK_TIMEOUT: Duration = Duration::from_secs(2);

/// The pod. Its methods implement the task API.
pub(crate) struct Pod {
    pub(crate) namespace: String,
    pub(crate) paths: PodPaths,
    pub(crate) settings: Settings,
    pub(crate) publisher: Publisher,
    pub(crate) sandboxes: OnceCell<Sandboxes>,
    pub(crate) sandbox: SandboxState,
    tasks: Mutex<BTreeMap<String, TaskEntry>>,
    /// Shutdown was accepted: no further task is created. Set with [`Self::tasks`] locked.
    pub(crate) shutting_down: AtomicBool,
    /// Cancelled when the shim is to exit.
    pub(crate) shutdown: CancellationToken,
}

pub(crate) struct Task {
    pub(crate) id: String,
    pub(crate) container_type: ContainerType,
    pub(crate) bundle: PathBuf,
    pub(crate) init: Process,
    pub(crate) execs: Mutex<BTreeMap<String, Arc<Exec>>>,
    /// Signal that stopped the sandbox.
    pub(crate) killed_by: Mutex<Option<u32>>,
}

pub(crate) struct Exec {
    pub(crate) process: Process,
    spec: oci_spec::runtime::Process,
}

/// A task's init process or one of its execs.
pub(crate) enum ProcessRef {
    Init(Arc<Task>),
    Exec(Arc<Task>, Arc<Exec>),
}

impl ProcessRef {
    pub(crate) fn process(&self) -> &Process {
        match self {
            Self::Init(task) => &task.init,
            Self::Exec(_, exec) => &exec.process,
        }
    }

    /// As with runc, execs of a paused container are paused.
    pub(crate) fn status(&self) -> Status {
        match self.process().status() {
            Status::STOPPED => Status::STOPPED,
            _ if self.task().init.is_paused() => Status::PAUSED,
            status => status,
        }
    }

    pub(crate) fn task(&self) -> &Arc<Task> {
        let (Self::Init(task) | Self::Exec(task, _)) = self;
        task
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Task {
    fn execs(&self) -> MutexGuard<'_, BTreeMap<String, Arc<Exec>>> {
        lock(&self.execs)
    }

    pub(crate) fn is_sandbox(&self) -> bool {
        self.container_type == ContainerType::PodSandbox
    }

    pub(crate) fn rootfs(&self) -> PathBuf {
        rootfs::rootfs_path(&self.bundle)
    }
}

impl Pod {
    pub(crate) fn new(
        namespace: String,
        paths: PodPaths,
        settings: Settings,
        publisher: Publisher,
    ) -> Arc<Self> {
        Arc::new(Self {
            namespace,
            paths,
            settings,
            publisher,
            sandboxes: OnceCell::new(),
            sandbox: SandboxState::default(),
            tasks: Mutex::default(),
            shutting_down: AtomicBool::new(false),
            shutdown: CancellationToken::new(),
        })
    }

    pub(crate) fn tasks(&self) -> MutexGuard<'_, BTreeMap<String, TaskEntry>> {
        lock(&self.tasks)
    }

    pub(crate) fn task(&self, id: &str) -> Result<Arc<Task>> {
        match self.tasks().get(id) {
            Some(TaskEntry::Created(task)) => Ok(task.clone()),
            _ => Err(not_found("task", id)),
        }
    }

    pub(crate) fn find(&self, id: &str, exec: &str) -> Result<ProcessRef> {
        let task = self.task(id)?;
        if exec.is_empty() {
            return Ok(ProcessRef::Init(task));
        }
        let exec = task.execs().get(exec).cloned().ok_or_else(|| not_found("process", exec))?;
        Ok(ProcessRef::Exec(task, exec))
    }

    pub(crate) fn has_tasks(&self) -> bool {
        !self.tasks().is_empty()
    }

    /// The sandbox's id of a container.
    pub(crate) fn key(&self, id: &str) -> String {
        key(&self.namespace, id)
    }

    pub(crate) fn sandboxes(&self) -> Result<&Sandboxes> {
        self.sandboxes.get().ok_or_else(|| precondition("the pod has no sandbox"))
    }

    /// The VMM's pid, reported for all processes: pids of the guest mean nothing on the host.
    pub(crate) fn vmm_pid(&self) -> u32 {
        let pod = self.sandboxes.get().and_then(|s| s.pod(&self.paths.key).ok());
        pod.and_then(|pod| pod.vmm_pid).unwrap_or_else(std::process::id)
    }

    /// Publishes a task's exit.
    pub(crate) fn watch_exit(self: &Arc<Self>, task: Arc<Task>) {
        let pod = self.clone();
        tokio::spawn(async move {
            let (exit, oom) = match &task.container_type {
                ContainerType::PodSandbox => (pod.wait_sandbox_exit(&task).await, false),
                ContainerType::PodContainer { .. } | ContainerType::SingleContainer => {
                    pod.wait_container_exit(&task).await
                }
            };
            // TaskExit comes after TaskStart.
            let _guard = task.init.state_lock.lock().await;
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

    async fn wait_container_exit(&self, task: &Task) -> (Exit, bool) {
        let unseen = || (Exit { status: 255, at: SystemTime::now() }, false);
        let Ok(sandboxes) = self.sandboxes() else { return unseen() };
        match sandboxes.wait_container(&self.key(&task.id)).await {
            Ok(view) => (Exit::of(&view), view.oom_killed),
            Err(error) => {
                tracing::warn!(task = task.id, %error, "exit status of a container is unknown");
                unseen()
            }
        }
    }

    /// Returns when the VM has ended, on request or not.
    pub(crate) async fn wait_until_not_ready(&self) {
        if let Ok(sandboxes) = self.sandboxes() {
            let mut events = sandboxes.events();
            let is_ready =
                || sandboxes.pod(&self.paths.key).is_ok_and(|pod| pod.state == PodState::Ready);
            while is_ready() {
                match events.recv().await {
                    Ok(event) if event.container.is_none() && event.kind != EventKind::Created => {}
                    Err(RecvError::Closed) => break,
                    _ => {}
                }
            }
        }
    }

    async fn wait_sandbox_exit(&self, task: &Task) -> Exit {
        self.wait_until_not_ready().await;
        let signal = *lock(&task.killed_by);
        Exit { status: signal.map_or(255, |signal| 128 + signal), at: SystemTime::now() }
    }

    pub(crate) async fn start(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<u32> {
        let (this, id, exec_id) = (self.clone(), id.to_owned(), exec_id.to_owned());
        // Runs to completion even if the caller cancels: the state must match the guest's.
        let started = tokio::spawn(async move {
            match this.find(&id, &exec_id)? {
                ProcessRef::Init(task) => this.start_task(&task).await,
                ProcessRef::Exec(task, exec) => this.start_exec(&task, &exec_id, exec).await,
            }
        });
        started.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))
    }

    async fn start_task(&self, task: &Task) -> Result<u32> {
        let _guard = task.init.state_lock.lock().await;
        if task.init.is_started() || task.init.exit().is_some() {
            return Err(precondition(format!("task {} is not in the state created", task.id)));
        }
        match task.container_type {
            // The sandbox has no process.
            ContainerType::PodSandbox => {}
            ContainerType::PodContainer { .. } | ContainerType::SingleContainer => {
                let inner = self.key(&task.id);
                self.sandboxes()?.start_container(&inner).await.map_err(from_sandbox)?;
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
        stdio_paths: StdioPaths,
        spec: &[u8],
    ) -> Result<()> {
        let task = self.task(id)?;
        if task.container_type == ContainerType::PodSandbox {
            return Err(status(
                Code::UNIMPLEMENTED,
                "exec in a pod sandbox is not supported: it has no processes",
            ));
        }
        if task.init.is_paused() {
            return Err(precondition(format!("task {id} is paused")));
        }
        crate::args::validate_id("exec id", exec_id).map_err(|e| invalid(format!("{e:#}")))?;
        let mut spec: oci_spec::runtime::Process = serde_json::from_slice(spec)
            .map_err(|e| invalid(format!("specification of the process: {e}")))?;
        spec.set_terminal(Some(stdio_paths.terminal));
        let stdio = Stdio::open(&stdio_paths).await.map_err(|e| invalid(format!("{e:#}")))?;
        let exec = Arc::new(Exec { process: Process::new(stdio_paths, Some(stdio)), spec });
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
        let _guard = exec.process.state_lock.lock().await;
        let process = &exec.process;
        if process.is_started() || process.exit().is_some() {
            return Err(precondition(format!("process {exec_id} is not in the state created")));
        }
        if !task.execs().contains_key(exec_id) {
            return Err(not_found("process", exec_id));
        }
        if task.init.is_paused() {
            return Err(precondition(format!("task {} is paused", task.id)));
        }
        let has_stdin = !process.stdio_paths.stdin.is_empty();
        let inner = self.key(&task.id);
        let begun = self.sandboxes()?.exec_process(&inner, &exec.spec, has_stdin).await;
        let session = match begun {
            Ok(session) => session,
            Err(error) => {
                process.set_exit(Exit { status: 255, at: SystemTime::now() });
                return Err(from_sandbox(error));
            }
        };
        process.set_control(session.process.control());
        if let Some(stdio) = process.take_stdio() {
            process.copy_streams(stdio, (session.stdin, session.stdout, session.stderr));
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
                    tracing::warn!(exec = id, %error, "exit status of a process is unknown");
                    Exit { status: 255, at: SystemTime::now() }
                }
            };
            let _guard = watched.process.state_lock.lock().await;
            if watched.process.set_exit(exit) {
                pod.publish_exit(&task, &id, watched.process.pid(), exit);
            }
            drop(_guard);
            // Dropping the handle earlier would discard output that has not arrived yet.
            watched.process.wait_streams().await;
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
            ProcessRef::Init(task) if task.container_type == ContainerType::PodSandbox => {
                lock(&task.killed_by).get_or_insert(signal);
                let (pod, key) = (self.clone(), self.paths.key.clone());
                // Kill returns at once; TaskExit follows when the VM has stopped.
                tokio::spawn(async move {
                    let Ok(sandboxes) = pod.sandboxes() else { return };
                    if let Err(error) = sandboxes.stop_pod(&key).await {
                        tracing::error!(%error, "stopping the pod failed");
                    }
                });
                Ok(())
            }
            _ => {
                if process.control().is_none() {
                    // A Start may be in progress.
                    let _ =
                        tokio::time::timeout(START_LOCK_TIMEOUT, process.state_lock.lock()).await;
                }
                let Some(control) = process.control() else {
                    return Err(precondition(format!("process {exec_id} of {id} is not started")));
                };
                match control.signal(signal, all).await {
                    Ok(()) => {
                        // The agent has thawed it.
                        if signal == SIGKILL && exec_id.is_empty() {
                            process.set_paused(false);
                        }
                        Ok(())
                    }
                    Err(_) if process.exit().is_some() => Err(finished()),
                    Err(error) => Err(from_sandbox(error)),
                }
            }
        }
    }

    /// Pause and Resume: freezes or thaws the container's processes in the guest.
    pub(crate) async fn set_paused(self: &Arc<Self>, id: &str, paused: bool) -> Result<()> {
        let (this, task) = (self.clone(), self.task(id)?);
        // Runs to completion even if the caller cancels: the state must match the guest's.
        let done = tokio::spawn(async move { this.freeze(&task, paused).await });
        done.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))
    }

    async fn freeze(&self, task: &Task, paused: bool) -> Result<()> {
        if task.is_sandbox() {
            return Err(unimplemented("pausing a pod sandbox: it has no processes"));
        }
        let _guard = task.init.state_lock.lock().await;
        let (required, name) =
            if paused { (Status::RUNNING, "running") } else { (Status::PAUSED, "paused") };
        if task.init.status() != required {
            return Err(precondition(format!("task {} is not {name}", task.id)));
        }
        let (sandboxes, key) = (self.sandboxes()?, self.key(&task.id));
        let container_id = task.id.clone();
        if paused {
            sandboxes.pause_container(&key).await.map_err(from_sandbox)?;
            task.init.set_paused(true);
            let event = TaskPaused { container_id, ..Default::default() };
            self.publisher.publish(topics::TASK_PAUSED_EVENT_TOPIC, &event);
        } else {
            sandboxes.resume_container(&key).await.map_err(from_sandbox)?;
            task.init.set_paused(false);
            let event = TaskResumed { container_id, ..Default::default() };
            self.publisher.publish(topics::TASK_RESUMED_EVENT_TOPIC, &event);
        }
        Ok(())
    }

    /// Returns the pid and the exit of the deleted process.
    pub(crate) async fn delete(self: &Arc<Self>, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        let (this, id, exec_id) = (self.clone(), id.to_owned(), exec_id.to_owned());
        let deleted = tokio::spawn(async move { this.remove(&id, &exec_id).await });
        deleted.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))
    }

    async fn remove(&self, id: &str, exec_id: &str) -> Result<(u32, Exit)> {
        if exec_id.is_empty() {
            self.cancel_create(id).await;
        }
        let found = self.find(id, exec_id)?;
        let process = found.process();
        // Waits for a Start in progress.
        let _guard = process.state_lock.lock().await;
        let (pid, task) = (process.pid(), found.task());
        let exit = match (process.exit(), process.is_started()) {
            (Some(exit), _) => exit,
            (None, true) => return Err(precondition(format!("process of {id} is still running"))),
            // Created, but never started.
            (None, false) => {
                let exit = Exit { status: 128 + SIGKILL, at: SystemTime::now() };
                if process.set_exit(exit) && exec_id.is_empty() {
                    self.publish_exit(task, "", pid, exit);
                }
                exit
            }
        };
        process.close_streams().await;
        if !exec_id.is_empty() {
            task.execs().remove(exec_id);
            return Ok((pid, exit));
        }
        self.remove_task_resources(task).await;
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

    /// Removes a task's resources in the guest and on the host. Continues after failures: the rest is
    /// removed with the pod.
    pub(crate) async fn remove_task_resources(&self, task: &Task) {
        let mut ending = JoinSet::new();
        for exec in std::mem::take(&mut *task.execs()).into_values() {
            ending.spawn(async move { exec.process.close_streams().await });
        }
        ending.join_all().await;
        if let Some(sandboxes) = self.sandboxes.get() {
            if task.container_type != ContainerType::PodSandbox
                && let Err(error) = sandboxes.remove_container(&self.key(&task.id)).await
            {
                tracing::warn!(task = task.id, %error, "removing a container failed; it is removed with its pod");
            }
            if !matches!(task.container_type, ContainerType::PodContainer { .. })
                && let Err(error) = sandboxes.remove_pod(&self.paths.key).await
            {
                tracing::error!(%error, "removing the pod failed");
            }
        }
        let target = task.rootfs();
        let unmounted = tokio::task::spawn_blocking(move || rootfs::unmount(&target)).await;
        if let Ok(Err(error)) = unmounted {
            tracing::warn!(
                task = task.id,
                error = format!("{error:#}"),
                "unmounting the root file system failed"
            );
        }
    }

    /// Shutdown: ignored while there are tasks, or a sandbox that ShutdownSandbox removes.
    pub(crate) fn request_shutdown(self: &Arc<Self>) {
        {
            let tasks = self.tasks();
            if !tasks.is_empty() || self.sandbox.exists() {
                return;
            }
            self.shutting_down.store(true, Ordering::Relaxed);
        }
        if let Err(error) = std::fs::write(self.paths.shutdown_marker(), "") {
            tracing::warn!(%error, "writing the shutdown marker for `delete` failed");
        }
        let pod = self.clone();
        tokio::spawn(async move {
            // Lets the response be sent first.
            tokio::time::sleep(Duration::from_millis(20)).await;
            pod.shutdown.cancel();
        });
    }

    /// Removes the pod and its files.
    pub(crate) async fn destroy(&self) {
        if let Some(sandboxes) = self.sandboxes.get() {
            if let Err(error) = sandboxes.remove_pod(&self.paths.key).await {
                tracing::error!(%error, "removing the pod failed");
                return;
            }
            sandboxes.shutdown().await;
        }
        if let Err(error) = self.paths.remove_all() {
            tracing::error!(error = format!("{error:#}"), "removing the pod's files failed");
        }
    }
}

/// Signal 0 stands for the default, SIGKILL.
pub(crate) fn signal_or_sigkill(signal: u32) -> u32 {
    if signal == 0 { SIGKILL } else { signal }
}
