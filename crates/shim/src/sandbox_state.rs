//! The sandbox that containerd creates by the Sandbox service (`sandboxer = "shim"`). Without that service
//! (`podsandbox`) the task of the pause container is the sandbox, and this state stays Absent.
//! ```text
//! Absent -> Created -> Starting -> Ready -> Stopped -> ShutDown
//!                \--------\-------------------^
//! ```
//! The VM starts with Starting. Stopped: on request, failed to start, or the VM died.

use std::path::Path;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use containerd_shim_protos::protobuf::well_known_types::any::Any;
use containerd_shim_protos::ttrpc::{Code, Result};
use sandbox::model::PodSpec;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use crate::errors::{from_sandbox, invalid, not_found, precondition, status, unknown};
use crate::paths::key;
use crate::pod::Pod;
use crate::process::Exit;
use crate::{pod_config, spec};

/// Exit status of a VM that died or did not start; containerd uses it for an unknown status.
const EXIT_STATUS_UNKNOWN: u32 = 255;

#[derive(Debug, Default)]
enum Phase {
    #[default]
    Absent,
    Created(Box<PodSpec>),
    Starting(CancellationToken),
    Ready,
    Stopped,
    ShutDown,
}

impl Phase {
    fn name(&self) -> &'static str {
        match self {
            Self::Absent => "not created",
            Self::Created(_) => "created",
            Self::Starting(_) => "starting",
            Self::Ready => "running",
            Self::Stopped => "stopped",
            Self::ShutDown => "shutting down",
        }
    }
}

struct State {
    phase: Phase,
    created_at: SystemTime,
    stop_requested: bool,
}

pub(crate) struct SandboxState {
    state: Mutex<State>,
    exit: watch::Sender<Option<Exit>>,
}

impl Default for SandboxState {
    fn default() -> Self {
        let state =
            State { phase: Phase::Absent, created_at: SystemTime::now(), stop_requested: false };
        Self { state: Mutex::new(state), exit: watch::Sender::new(None) }
    }
}

/// What Stop has to do.
enum Stop {
    Nothing,
    /// Only wait: the start was cancelled.
    Wait,
    EndVm,
}

/// Answer of SandboxStatus.
pub(crate) struct SandboxView {
    pub(crate) ready: bool,
    /// The VMM's; 0 if the sandbox is not ready.
    pub(crate) pid: u32,
    pub(crate) created_at: SystemTime,
    pub(crate) exit: Option<Exit>,
}

impl SandboxState {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the sandbox exists, running or not.
    pub(crate) fn exists(&self) -> bool {
        !matches!(self.lock().phase, Phase::Absent | Phase::ShutDown)
    }

    fn create(&self, pod: PodSpec) -> Result<()> {
        let mut state = self.lock();
        match state.phase {
            Phase::Absent => {}
            Phase::ShutDown => return Err(precondition("the shim is shutting down")),
            _ => return Err(status(Code::ALREADY_EXISTS, "the sandbox already exists")),
        }
        state.phase = Phase::Created(Box::new(pod));
        state.created_at = SystemTime::now();
        Ok(())
    }

    fn begin_start(&self, id: &str, cancel: CancellationToken) -> Result<PodSpec> {
        let mut state = self.lock();
        match std::mem::take(&mut state.phase) {
            Phase::Created(pod) => {
                state.phase = Phase::Starting(cancel);
                Ok(*pod)
            }
            other => {
                let error = match &other {
                    Phase::Absent => not_found("sandbox", id),
                    phase => precondition(format!("sandbox {id} is {}", phase.name())),
                };
                state.phase = other;
                Err(error)
            }
        }
    }

    /// Fails if Stop has cancelled the start.
    fn set_ready(&self) -> Result<()> {
        let mut state = self.lock();
        match &state.phase {
            Phase::Starting(cancel) if !cancel.is_cancelled() => {
                state.phase = Phase::Ready;
                Ok(())
            }
            _ => Err(status(Code::CANCELLED, "starting the sandbox was cancelled")),
        }
    }

    fn set_stopped(&self) {
        let mut state = self.lock();
        if !matches!(state.phase, Phase::ShutDown) {
            state.phase = Phase::Stopped;
        }
        let exit = if state.stop_requested { 0 } else { EXIT_STATUS_UNKNOWN };
        drop(state);
        self.exit.send_if_modified(|sent| {
            let is_new = sent.is_none();
            sent.get_or_insert(Exit { status: exit, at: SystemTime::now() });
            is_new
        });
    }

    fn begin_stop(&self, id: &str) -> Result<Stop> {
        let mut state = self.lock();
        let stop = match &state.phase {
            Phase::Absent => return Err(not_found("sandbox", id)),
            Phase::ShutDown => return Ok(Stop::Nothing),
            Phase::Created(_) => Stop::Nothing,
            Phase::Starting(cancel) => {
                cancel.cancel();
                Stop::Wait
            }
            // The network of a VM that died is still connected.
            Phase::Ready | Phase::Stopped => Stop::EndVm,
        };
        state.stop_requested = true;
        drop(state);
        if matches!(stop, Stop::Nothing) {
            self.set_stopped();
        }
        Ok(stop)
    }

    fn set_shut_down(&self) {
        self.lock().phase = Phase::ShutDown;
    }

    async fn wait(&self) -> Exit {
        let unknown = || Exit { status: EXIT_STATUS_UNKNOWN, at: SystemTime::now() };
        match self.exit.subscribe().wait_for(Option::is_some).await {
            Ok(exit) => exit.unwrap_or_else(unknown),
            // Not reached: `self` owns the sender.
            Err(_) => unknown(),
        }
    }
}

impl Pod {
    /// Whether this shim is the one of the sandbox.
    fn check_sandbox_id(&self, id: &str) -> Result<()> {
        match key(&self.namespace, id) == self.paths.key {
            true => Ok(()),
            false => Err(not_found("sandbox", id)),
        }
    }

    fn check_sandbox(&self, id: &str) -> Result<()> {
        self.check_sandbox_id(id)?;
        match self.sandbox.lock().phase {
            Phase::Absent => Err(not_found("sandbox", id)),
            _ => Ok(()),
        }
    }

    /// Without options the specification in the bundle counts, if there is one (`ctr sandboxes run`).
    pub(crate) async fn create_sandbox(
        &self,
        id: &str,
        bundle: &Path,
        options: Option<&Any>,
        netns: &str,
    ) -> Result<()> {
        if self.check_sandbox_id(id).is_err() {
            return Err(invalid(format!("sandbox {id} does not belong to this shim")));
        }
        if self.shutting_down.load(Ordering::Relaxed) {
            return Err(status(Code::UNAVAILABLE, "the shim is shutting down"));
        }
        if self.tasks().contains_key(id) {
            return Err(status(Code::ALREADY_EXISTS, format!("sandbox {id} is a task")));
        }
        let (namespace, settings) = (&self.namespace, &self.settings);
        let pod = match options {
            Some(options) => pod_config::pod(namespace, id, options, netns, settings)
                .map_err(|e| invalid(format!("{e:#}")))?,
            None => {
                let spec = spec::read_if_present(bundle).map_err(unknown)?.unwrap_or_default();
                let mut pod = spec::pod(namespace, id, &spec, settings);
                if !netns.is_empty() {
                    pod.meta.annotations = pod_config::netns_annotation(netns);
                }
                pod
            }
        };
        self.sandbox.create(pod)
    }

    /// Starts the VM; returns its VMM's pid and the time of CreateSandbox. A start whose request is
    /// cancelled is undone.
    pub(crate) async fn start_sandbox(self: &Arc<Self>, id: &str) -> Result<(u32, SystemTime)> {
        self.check_sandbox_id(id)?;
        let cancel = CancellationToken::new();
        let spec = self.sandbox.begin_start(id, cancel.clone())?;
        let guard = cancel.clone().drop_guard();
        let pod = self.clone();
        let started = tokio::spawn(async move { pod.start_sandbox_vm(spec, &cancel).await });
        started.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))?;
        guard.disarm();
        Ok((self.vmm_pid(), self.sandbox.lock().created_at))
    }

    async fn start_sandbox_vm(
        self: &Arc<Self>,
        spec: PodSpec,
        cancel: &CancellationToken,
    ) -> Result<()> {
        let started = self.run_vm(spec, cancel).await;
        if let Err(error) = started.and_then(|()| self.sandbox.set_ready()) {
            if let Some(sandboxes) = self.sandboxes.get()
                && let Err(error) = sandboxes.remove_pod(&self.paths.key).await
            {
                tracing::error!(%error, "removing a sandbox that did not start failed");
            }
            self.sandbox.set_stopped();
            return Err(error);
        }
        let pod = self.clone();
        tokio::spawn(async move {
            pod.wait_until_not_ready().await;
            pod.sandbox.set_stopped();
        });
        Ok(())
    }

    /// Returns when the VM and its network are gone; again for a stopped sandbox. The time-out of the
    /// request is not needed: the guest's own limits end a shutdown.
    pub(crate) async fn stop_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        self.check_sandbox_id(id)?;
        match self.sandbox.begin_stop(id)? {
            Stop::Nothing => return Ok(()),
            Stop::Wait => {}
            Stop::EndVm => {
                let pod = self.clone();
                // Runs to completion even if the caller cancels.
                let stopped = tokio::spawn(async move {
                    let Some(sandboxes) = pod.sandboxes.get() else { return Ok(()) };
                    match sandboxes.stop_pod(&pod.paths.key).await {
                        // It did not start.
                        Err(sandbox::Error::NotFound { .. }) => Ok(()),
                        stopped => stopped.map_err(from_sandbox),
                    }
                });
                stopped.await.unwrap_or_else(|e| Err(status(Code::INTERNAL, e.to_string())))?;
            }
        }
        self.sandbox.wait().await;
        Ok(())
    }

    pub(crate) async fn wait_sandbox(&self, id: &str) -> Result<Exit> {
        self.check_sandbox(id)?;
        Ok(self.sandbox.wait().await)
    }

    pub(crate) fn sandbox_status(&self, id: &str) -> Result<SandboxView> {
        self.check_sandbox(id)?;
        let state = self.sandbox.lock();
        let (ready, created_at) = (matches!(state.phase, Phase::Ready), state.created_at);
        drop(state);
        let pid = if ready { self.vmm_pid() } else { 0 };
        Ok(SandboxView { ready, pid, created_at, exit: *self.sandbox.exit.borrow() })
    }

    pub(crate) fn ping_sandbox(&self, id: &str) -> Result<()> {
        self.check_sandbox(id)?;
        match &self.sandbox.lock().phase {
            phase @ (Phase::Stopped | Phase::ShutDown) => {
                Err(precondition(format!("sandbox {id} is {}", phase.name())))
            }
            _ => Ok(()),
        }
    }

    /// Platform is also answered before CreateSandbox.
    pub(crate) fn check_platform_of(&self, id: &str) -> Result<()> {
        self.check_sandbox_id(id)
    }

    pub(crate) fn check_sandbox_is_ready(&self, id: &str) -> Result<()> {
        self.check_sandbox(id)?;
        match &self.sandbox.lock().phase {
            Phase::Ready => Ok(()),
            phase => Err(precondition(format!("sandbox {id} is {}", phase.name()))),
        }
    }

    /// Ends the shim with all that it has. containerd calls it after a failed CreateSandbox, too.
    pub(crate) async fn shutdown_sandbox(self: &Arc<Self>, id: &str) -> Result<()> {
        self.check_sandbox_id(id)?;
        if self.sandbox.exists() {
            if let Err(error) = self.stop_sandbox(id).await {
                // The pod is removed before the shim exits.
                tracing::error!(%error, "stopping the sandbox failed");
            }
            self.remove_all_tasks().await;
        } else if self.has_tasks() {
            return Err(precondition(format!("sandbox {id} is a task")));
        }
        self.sandbox.set_shut_down();
        self.request_shutdown();
        Ok(())
    }

    /// containerd deletes the tasks before; others are removed without events.
    async fn remove_all_tasks(&self) {
        let ids: Vec<String> = self.tasks().keys().cloned().collect();
        for id in ids {
            self.cancel_create(&id).await;
            if let Ok(task) = self.task(&id) {
                self.remove_task_resources(&task).await;
                self.tasks().remove(&id);
            }
        }
    }
}
