//! Create. A task is known to containerd only when its response is sent: if the request fails or is
//! cancelled before (timeout, containerd is stopped), or Delete comes first, everything that was created
//! is removed again.
//! ```text
//! Creating -> Created
//!    \------> removed: failed, request cancelled, or Delete
//! ```

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use anyhow::Context;
use containerd_shim_protos::events::task::{TaskCreate, TaskIO};
use containerd_shim_protos::protobuf::MessageField;
use containerd_shim_protos::topics;
use containerd_shim_protos::ttrpc::{self, Code, Result};
use containerd_shim_protos::types::mount::Mount;
use oci_spec::runtime::Spec;
use sandbox::Sandboxes;
use sandbox::model::PodSpec;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use crate::errors::{from_sandbox, invalid, status, unknown};
use crate::network::ExistingNetns;
use crate::paths::key;
use crate::pod::{Pod, Task};
use crate::process::Process;
use crate::rootfs::{self, SnapshotMount};
use crate::spec::{self, ContainerType};
use crate::stdio::{Stdio, StdioPaths};

/// Maximum tasks of a pod, including stopped ones.
const MAX_TASKS: usize = 256;
/// Time for the sandbox to undo a cancelled creation of a container.
const UNDO_TIMEOUT: Duration = Duration::from_secs(30);
const UNDO_POLL_INTERVAL: Duration = Duration::from_millis(50);

/// Parameters of Create.
pub(crate) struct CreateOptions {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) rootfs: Vec<Mount>,
    pub(crate) stdio_paths: StdioPaths,
}

pub(crate) enum TaskEntry {
    Creating(Creating),
    Created(Arc<Task>),
}

/// A Create in progress.
#[derive(Clone, Default)]
pub(crate) struct Creating {
    /// Cancels it.
    cancel: CancellationToken,
    /// Cancelled when the entry is replaced or removed.
    finished: CancellationToken,
}

/// Reserves an id while its task is being created.
struct TaskReservation {
    pod: Arc<Pod>,
    id: String,
    creating: Creating,
}

impl Drop for TaskReservation {
    fn drop(&mut self) {
        let mut tasks = self.pod.tasks();
        if matches!(tasks.get(&self.id), Some(TaskEntry::Creating(_))) {
            tasks.remove(&self.id);
        }
        drop(tasks);
        self.creating.finished.cancel();
    }
}

/// A created task that containerd does not know of yet. Dropping it removes its resources.
struct PendingTask {
    task: Option<Arc<Task>>,
    reservation: Option<TaskReservation>,
}

impl PendingTask {
    /// Makes the task known, unless it was cancelled.
    fn commit(mut self) -> Result<Arc<Task>> {
        let (Some(task), Some(reservation)) = (self.task.clone(), &self.reservation) else {
            return Err(cancelled());
        };
        let mut tasks = reservation.pod.tasks();
        if reservation.creating.cancel.is_cancelled() {
            return Err(cancelled());
        }
        tasks.insert(task.id.clone(), TaskEntry::Created(task.clone()));
        drop(tasks);
        self.task = None;
        Ok(task)
    }
}

impl Drop for PendingTask {
    fn drop(&mut self) {
        let (Some(task), Some(reservation)) = (self.task.take(), self.reservation.take()) else {
            return;
        };
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        runtime.spawn(async move {
            reservation.pod.remove_task_resources(&task).await;
            drop(reservation);
        });
    }
}

fn cancelled() -> ttrpc::Error {
    status(Code::CANCELLED, "creating the task was cancelled")
}

async fn unless_cancelled<T>(
    cancel: &CancellationToken,
    work: impl Future<Output = Result<T>>,
) -> Result<T> {
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(cancelled()),
        result = work => result,
    }
}

impl Pod {
    pub(crate) async fn create(self: &Arc<Self>, options: CreateOptions) -> Result<u32> {
        let id = options.id.clone();
        crate::args::validate_id("id", &id).map_err(|e| invalid(format!("{e:#}")))?;
        let creating = Creating::default();
        {
            let mut tasks = self.tasks();
            if self.shutting_down.load(Ordering::Relaxed) {
                let message = format!("task {id} is not created: the shim of its pod is ending");
                return Err(status(Code::UNAVAILABLE, message));
            }
            if tasks.contains_key(&id) {
                return Err(status(Code::ALREADY_EXISTS, format!("task {id} already exists")));
            }
            if tasks.len() >= MAX_TASKS {
                let message = format!("the pod has {MAX_TASKS} tasks, which is the maximum");
                return Err(status(Code::RESOURCE_EXHAUSTED, message));
            }
            tasks.insert(id.clone(), TaskEntry::Creating(creating.clone()));
        }
        let reservation = TaskReservation { pod: self.clone(), id, creating: creating.clone() };
        // If the request is cancelled, this future is dropped.
        let guard = creating.cancel.clone().drop_guard();
        let (result, created) = oneshot::channel();
        let this = self.clone();
        tokio::spawn(async move {
            let created = this.create_task(&options, &creating.cancel).await;
            let pending = created
                .map(|task| PendingTask { task: Some(task), reservation: Some(reservation) });
            // Without a receiver it is dropped, which removes the task.
            drop(result.send(pending));
        });
        let pending = created.await;
        let pending = pending.map_err(|_| status(Code::INTERNAL, "Create panicked"))??;
        let task = pending.commit()?;
        guard.disarm();
        let pid = task.init.pid();
        let stdio_paths = &task.init.stdio_paths;
        let io = TaskIO {
            stdin: stdio_paths.stdin.clone(),
            stdout: stdio_paths.stdout.clone(),
            stderr: stdio_paths.stderr.clone(),
            terminal: stdio_paths.terminal,
            ..Default::default()
        };
        let event = TaskCreate {
            container_id: task.id.clone(),
            bundle: task.bundle.display().to_string(),
            io: MessageField::some(io),
            pid,
            ..Default::default()
        };
        self.publisher.publish(topics::TASK_CREATE_EVENT_TOPIC, &event);
        self.watch_exit(task);
        Ok(pid)
    }

    /// Cancels a Create in progress and waits until its resources are removed.
    pub(crate) async fn cancel_create(&self, id: &str) {
        let creating = match self.tasks().get(id) {
            Some(TaskEntry::Creating(creating)) => creating.clone(),
            _ => return,
        };
        creating.cancel.cancel();
        creating.finished.cancelled().await;
    }

    async fn create_task(
        self: &Arc<Self>,
        options: &CreateOptions,
        cancel: &CancellationToken,
    ) -> Result<Arc<Task>> {
        let CreateOptions { id, bundle, stdio_paths, rootfs } = options;
        let spec = spec::read(bundle).map_err(unknown)?;
        let container_type = spec::container_type(&spec).map_err(|e| invalid(format!("{e:#}")))?;
        if let ContainerType::PodContainer { pod } = &container_type
            && key(&self.namespace, pod) != self.paths.key
        {
            return Err(invalid(format!(
                "container {id} belongs to pod {pod}, not to this shim's"
            )));
        }
        if !matches!(container_type, ContainerType::PodContainer { .. })
            && self.key(id) != self.paths.key
        {
            return Err(invalid(format!("task {id} does not belong to this shim's pod")));
        }
        if !matches!(container_type, ContainerType::PodContainer { .. }) && self.sandbox.exists() {
            let message = format!("{id} is a sandbox that was created by CreateSandbox");
            return Err(status(Code::ALREADY_EXISTS, message));
        }
        let stdio = Stdio::open(stdio_paths).await.map_err(|e| invalid(format!("{e:#}")))?;
        let task = Arc::new(Task {
            id: id.clone(),
            container_type,
            bundle: bundle.clone(),
            init: Process::new(stdio_paths.clone(), Some(stdio)),
            execs: Mutex::default(),
            killed_by: Mutex::default(),
        });
        let created = match &task.container_type {
            ContainerType::PodSandbox => self.run_pod(&task, &spec, cancel).await,
            ContainerType::PodContainer { .. } => {
                self.create_container(&task, spec, rootfs, cancel).await
            }
            ContainerType::SingleContainer => match self.run_pod(&task, &spec, cancel).await {
                Ok(()) => self.create_container(&task, spec, rootfs, cancel).await,
                Err(error) => Err(error),
            },
        };
        if let Err(error) = created {
            self.wait_for_undo(&task).await;
            self.remove_task_resources(&task).await;
            return Err(error);
        }
        task.init.set_pid(self.vmm_pid());
        Ok(task)
    }

    /// The sandbox undoes a cancelled creation in the background, and refuses to remove the container
    /// meanwhile.
    async fn wait_for_undo(&self, task: &Task) {
        let Some(sandboxes) = self.sandboxes.get() else { return };
        let (key, begin) = (self.key(&task.id), Instant::now());
        while task.container_type != ContainerType::PodSandbox
            && let Err(sandbox::Error::FailedPrecondition { .. }) =
                sandboxes.remove_container(&key).await
            && begin.elapsed() < UNDO_TIMEOUT
        {
            tokio::time::sleep(UNDO_POLL_INTERVAL).await;
        }
    }

    async fn run_pod(&self, task: &Task, spec: &Spec, cancel: &CancellationToken) -> Result<()> {
        let pod = spec::pod(&self.namespace, &task.id, spec, &self.settings);
        self.run_vm(pod, cancel).await
    }

    /// Starts the pod's VM.
    pub(crate) async fn run_vm(&self, pod: PodSpec, cancel: &CancellationToken) -> Result<()> {
        let sandboxes = self.sandboxes.get_or_try_init(|| async {
            self.paths.create_dirs().map_err(unknown)?;
            let uid = self.paths.allocate_uid().map_err(unknown)?;
            let config = self.settings.sandbox_config(&self.paths, uid);
            Sandboxes::open(config, Arc::new(ExistingNetns)).await.map_err(from_sandbox)
        });
        let sandboxes = sandboxes.await?;
        let run = sandboxes.run_pod_with_id(self.paths.key.clone(), pod);
        unless_cancelled(cancel, async { run.await.map_err(from_sandbox) }).await.map(drop)
    }

    async fn create_container(
        &self,
        task: &Task,
        spec: Spec,
        mounts: &[Mount],
        cancel: &CancellationToken,
    ) -> Result<()> {
        let sandboxes = self.sandboxes()?;
        let rootfs = match mounts {
            // A directory that containerd does not mount (ctr run --rootfs).
            [] => {
                let path = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
                task.bundle.join(path)
            }
            mounts => {
                let mounts: Vec<SnapshotMount> = mounts
                    .iter()
                    .map(|mount| SnapshotMount {
                        kind: mount.type_.clone(),
                        source: mount.source.clone().into(),
                        options: mount.options.clone(),
                    })
                    .collect();
                let target = task.rootfs();
                let mounted = {
                    let target = target.clone();
                    tokio::task::spawn_blocking(move || rootfs::mount_read_only(&mounts, &target))
                };
                let mounted = mounted.await.context("the mount thread panicked");
                mounted.and_then(|mounted| mounted).map_err(unknown)?;
                target
            }
        };
        let stdio_paths = &task.init.stdio_paths;
        let has_stdin = !stdio_paths.stdin.is_empty();
        let container = spec::container(&task.id, spec, &rootfs, stdio_paths.terminal, has_stdin)
            .map_err(|e| invalid(format!("{e:#}")))?;
        let inner = self.key(&task.id);
        let create = sandboxes.create_container_with_id(&self.paths.key, inner.clone(), container);
        unless_cancelled(cancel, async { create.await.map_err(from_sandbox) }).await?;
        let streams = sandboxes.streams(&inner).await.map_err(from_sandbox)?;
        task.init.set_control(streams.process.control());
        if let Some(stdio) = task.init.take_stdio() {
            task.init.copy_streams(stdio, (streams.stdin, streams.stdout, streams.stderr));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::events::Publisher;
    use crate::paths::PodPaths;
    use crate::settings::Settings;

    fn pod(dir: &Path) -> Arc<Pod> {
        let settings =
            Settings { state: dir.join("state"), root: dir.join("root"), ..Settings::default() };
        let paths = PodPaths::new(&settings, "default", "p");
        let address = dir.join("no.sock").display().to_string();
        Pod::new("default".into(), paths, settings, Publisher::start("default".into(), address))
    }

    /// A task after its creation and before the commit. It has no resources.
    fn pending(pod: &Arc<Pod>, dir: &Path) -> (PendingTask, Creating) {
        let task = Arc::new(Task {
            id: "c".into(),
            container_type: ContainerType::PodContainer { pod: "p".into() },
            bundle: dir.join("bundle"),
            init: Process::new(StdioPaths::default(), None),
            execs: Mutex::default(),
            killed_by: Mutex::default(),
        });
        let creating = Creating::default();
        pod.tasks().insert("c".into(), TaskEntry::Creating(creating.clone()));
        let reservation =
            TaskReservation { pod: pod.clone(), id: "c".into(), creating: creating.clone() };
        (PendingTask { task: Some(task), reservation: Some(reservation) }, creating)
    }

    #[tokio::test]
    async fn a_created_task_is_known_after_its_commit_only() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(dir.path());
        let (pending, creating) = pending(&pod, dir.path());
        assert!(pod.task("c").is_err() && pod.has_tasks());
        pending.commit().unwrap();
        assert!(pod.task("c").is_ok() && creating.finished.is_cancelled());
        // Not in progress any more: nothing to wait for.
        pod.cancel_create("c").await;
        assert!(pod.task("c").is_ok());
    }

    #[tokio::test]
    async fn a_task_whose_create_request_was_cancelled_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(dir.path());
        let (pending, creating) = pending(&pod, dir.path());
        let (result, created) = oneshot::channel();
        // The request is gone before the creation completes.
        drop(created);
        drop(result.send(pending));
        let finished = creating.finished.cancelled();
        tokio::time::timeout(Duration::from_secs(10), finished).await.unwrap();
        assert!(!pod.has_tasks());
    }

    #[tokio::test]
    async fn delete_cancels_a_create_in_progress_and_waits_for_its_removal() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(dir.path());
        let (pending, _) = pending(&pod, dir.path());
        let deleting = tokio::spawn({
            let pod = pod.clone();
            async move { pod.delete("c", "").await }
        });
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!deleting.is_finished() && pod.has_tasks());
        assert!(pending.commit().is_err(), "a deleted task was created");
        let deleted = tokio::time::timeout(Duration::from_secs(10), deleting).await.unwrap();
        let error = deleted.unwrap().unwrap_err().to_string();
        assert!(error.contains("not found"), "{error}");
        assert!(!pod.has_tasks());
    }

    fn options(dir: &Path) -> CreateOptions {
        CreateOptions {
            id: "c".into(),
            bundle: dir.join("absent"),
            rootfs: Vec::new(),
            stdio_paths: StdioPaths::default(),
        }
    }

    #[tokio::test]
    async fn after_shutdown_no_task_is_created() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(dir.path());
        let (pending, _) = pending(&pod, dir.path());
        pod.request_shutdown();
        pending.commit().unwrap();
        assert!(!pod.shutting_down.load(Ordering::Relaxed), "it has a task");
        pod.tasks().clear();
        pod.request_shutdown();
        let refused = pod.create(options(dir.path())).await.unwrap_err();
        let ttrpc::Error::RpcStatus(status) = refused else { panic!("{refused}") };
        assert_eq!(status.code, Code::UNAVAILABLE.into(), "{status:?}");
        assert!(!pod.has_tasks());
        tokio::time::timeout(Duration::from_secs(10), pod.shutdown.cancelled()).await.unwrap();
    }

    #[tokio::test]
    async fn a_failed_create_leaves_no_task() {
        let dir = tempfile::tempdir().unwrap();
        let pod = pod(dir.path());
        for _ in 0..2 {
            let error = pod.create(options(dir.path())).await.unwrap_err().to_string();
            assert!(error.contains("config.json"), "{error}");
            assert!(!pod.has_tasks());
        }
    }
}
