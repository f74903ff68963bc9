//! RunPod: from a reserved name to a guest that is ready.
//!
//! Every effect is in the ledger before its step. A failed or cancelled start is undone by the
//! owner from the ledger, as after a crash of the daemon.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio_util::sync::CancellationToken;

use super::configure_guest::configure;
use super::handle::{Handle, Paths};
use super::log_tail::log_tail;
use super::save_template::save_template;
use super::trace::Trace;
use super::vm_program::{self, Prepared, Templates};
use super::{exit_cause, host_pod, oom_score};
use crate::error::Error;
use crate::host::process::{Process, start_time};
use crate::host::{blocking, cgroup};
use crate::machine::Machine;
use crate::model::CpuLimits;
use crate::observe::{Measured, Outcome, StartedFrom};
use crate::policy::{Change, Effect, Pod};
use crate::ports::Attachment;
use crate::template::{Key, Making, Template};
use crate::vmm;

/// Time for a killed VMM to exit.
const KILL_LIMIT: Duration = Duration::from_secs(10);

pub(super) async fn run_pod(
    handle: &Arc<Handle>,
    cancel: &CancellationToken,
) -> Result<Arc<Process>, Error> {
    let node = &handle.node;
    let observer = node.observer.clone();
    let trace = Trace::begin(observer);
    let pod = handle.pod();

    let leaf = cgroup::leaf(&node.cgroup_root, &pod.spec.cgroup_parent, &pod.id)?;
    let parents = cgroup::missing_parents(&node.cgroup_root, &leaf);
    let mut effects = vec![Effect::StateDir { path: handle.paths.state_dir.clone() }];
    let own_network = !pod.spec.host.is_some_and(|host| host.network);
    if own_network {
        effects.push(Effect::Network);
    }
    effects.push(Effect::Cgroup { leaf: leaf.clone(), parents });
    if pod.spec.host.is_none() {
        effects.push(Effect::ScratchDisk { path: handle.paths.scratch_disk.clone() });
    }
    trace.phase("journal", handle.commit(vec![Change::Planned(effects)])).await?;

    // Cancelled by the caller, or if the concurrent half of the start fails.
    let start_cancelled = cancel.child_token();
    let attach = trace.phase("network", async {
        if !own_network {
            return Ok(Attachment::default());
        }
        let attached = async {
            let attached = node.network.attach(&pod.id, &pod.spec, &start_cancelled).await;
            attached.map_err(|e| match e.is_cancelled() {
                true => cancelled(),
                false => network_failed("attach", e),
            })
        };
        let attached = node.failpoints.wrap("host: attach to the network", attached).await;
        if attached.is_err() {
            start_cancelled.cancel();
        }
        attached
    });
    let (attachment, process) = match handle.machine {
        // The VM boots meanwhile; its network interfaces are plugged after both.
        Machine::Vm(_) => {
            let unattached = Attachment::default();
            let boot = async {
                let boot = boot(handle, &pod, &unattached, &leaf, &trace, &start_cancelled);
                let booted = boot.await;
                if booted.is_err() {
                    start_cancelled.cancel();
                }
                booted
            };
            match tokio::join!(attach, boot) {
                (Ok(attachment), Ok(process)) => (attachment, process),
                _ if cancel.is_cancelled() => return Err(cancelled()),
                // The failure of one half cancels the other.
                (Err(error), Ok(_) | Err(Error::Cancelled { .. }))
                | (Ok(_) | Err(Error::Cancelled { .. }), Err(error)) => return Err(error),
                (Err(network), Err(error)) => {
                    tracing::warn!(pod = pod.id, error = %network, "network attachment failed too");
                    return Err(error);
                }
            }
        }
        // The agent is started in the network namespace.
        Machine::Host(_) => {
            let attached = attach.await;
            let attachment = attached
                .map_err(|error| if cancel.is_cancelled() { cancelled() } else { error })?;
            let booted = boot(handle, &pod, &attachment, &leaf, &trace, &start_cancelled);
            let process = booted.await?;
            (attachment, process)
        }
    };
    let attachment = Arc::new(attachment);

    let configured = async {
        if pod.spec.host.is_none() {
            trace.phase("plug", hotplug_nics(handle, &pod, &attachment)).await?;
        }
        trace.phase("configure", configure(handle, &pod, &attachment)).await
    };
    let configured = async {
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(cancelled()),
            () = process.ended() => Err(exited_during_start(handle).await),
            result = configured => result,
        }
    };
    let kernel_release = configured.await?;
    if pod.spec.host.is_none() {
        // After the boot, which takes seconds under a tight limit.
        limit_cpu(&leaf, &node.cgroup_root, pod.spec.cpu).await;
    }
    let elapsed = trace.began.elapsed();
    let change = Change::Ready { attachment, kernel_release, trace: trace.into_phases() };
    handle.commit(vec![change]).await?;
    tracing::info!(pod = pod.id, ?elapsed, "pod is ready");
    Ok(process)
}

fn cancelled() -> Error {
    Error::Cancelled { what: "start of the pod" }
}

/// Starts the VMM (or a host pod's agent) when a start permit is free, and waits for its agent.
/// Returns `Cancelled` if the token is cancelled.
async fn boot(
    handle: &Arc<Handle>,
    pod: &Pod,
    attachment: &Attachment,
    leaf: &Path,
    trace: &Trace,
    start_cancelled: &CancellationToken,
) -> Result<Arc<Process>, Error> {
    let node = &handle.node;
    let admitted = trace.phase("admission", async {
        tokio::select! {
            permit = node.starts.acquire() => permit.map_err(|_| cancelled()),
            () = start_cancelled.cancelled() => Err(cancelled()),
        }
    });
    let _permit = admitted.await?;
    if start_cancelled.is_cancelled() {
        return Err(cancelled());
    }
    let start = Start { handle, pod, attachment, leaf, trace, cancelled: start_cancelled };
    match start.run(Templates::Use).await {
        Ok(process) => Ok(process),
        Err(BootError { error, restored: Some(restored), .. }) => {
            // A template is an optimization: without it the pod boots.
            tracing::warn!(pod = pod.id, %error, "pod cannot start from its template; it boots");
            node.templates.discard(&restored.key, &restored.template);
            restored.undo(handle).await?;
            start.run(Templates::Ignore).await.map_err(|failed| failed.error)
        }
        Err(failed) => Err(failed.error),
    }
}

struct BootError {
    error: Error,
    /// The agent did not answer in time.
    timed_out: bool,
    /// The start from this template has failed.
    restored: Option<Restored>,
}

impl From<Error> for BootError {
    fn from(error: Error) -> Self {
        Self { error, timed_out: false, restored: None }
    }
}

/// A VM that was started from a template.
struct Restored {
    key: Key,
    template: Arc<Template>,
    process: Arc<Process>,
    /// None: it had exited before it was in the journal.
    started: Option<u64>,
}

impl Restored {
    /// Ends the VM, so that another one can be started for the pod.
    async fn undo(self, handle: &Handle) -> Result<(), Error> {
        let Self { process, started: Some(started), .. } = self else { return Ok(()) };
        let killed = process.kill_and_wait(KILL_LIMIT).await;
        killed.map_err(|e| Error::io("kill the VMM that cannot use its template", e))?;
        let vmm = Effect::Vmm { pid: process.pid, started };
        handle.commit(vec![Change::Undone(vmm)]).await
    }
}

/// An admitted start.
struct Start<'a> {
    handle: &'a Arc<Handle>,
    pod: &'a Pod,
    attachment: &'a Attachment,
    leaf: &'a Path,
    trace: &'a Trace,
    cancelled: &'a CancellationToken,
}

impl Start<'_> {
    /// Starts the VMM and waits for its agent.
    async fn run(&self, templates: Templates) -> Result<Arc<Process>, BootError> {
        let began = Instant::now();
        let mut from = StartedFrom::Kernel;
        let booted = self.boot(templates, &mut from).await;
        let outcome = match &booted {
            Err(BootError { timed_out: true, .. }) => Outcome::TimedOut,
            Err(BootError { error: Error::Cancelled { .. }, .. }) => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
            Ok(_) => Outcome::Ok,
        };
        if self.pod.spec.host.is_none() {
            let took = began.elapsed();
            self.handle.node.observer.measured(Measured::Boot { from, outcome, took });
        }
        let (process, key) = booted?;
        if let Some(key) = key
            && let Some(making) = self.handle.node.templates.begin(&key)
        {
            self.save_template(making, &process).await?;
        }
        Ok(process)
    }

    /// Returns the VMM and, if its VM can be saved as a template, the template's key.
    async fn boot(
        &self,
        templates: Templates,
        from: &mut StartedFrom,
    ) -> Result<(Arc<Process>, Option<Key>), BootError> {
        let Self { handle, pod, attachment, leaf, trace, .. } = *self;
        let launched = launch(handle, pod, attachment, leaf, templates);
        let launched = trace.phase("launch", launched).await?;
        let Launched { process, started, key, template } = launched;
        if let Some(started) = started {
            let change = Change::VmmStarted { pid: process.pid, started };
            trace.phase("journal", handle.commit(vec![change])).await?;
        }
        let boot_limit = handle.node.config.boot_deadline();
        let Some(template) = template else {
            trace.phase("boot", self.until_up(&process, boot_limit)).await?;
            return Ok((process, key));
        };
        *from = StartedFrom::Template;
        // A boot follows if the guest does not continue. That it listens does not show that it runs.
        let restored = async {
            self.until_up(&process, boot_limit / 4).await?;
            handle.guest.hello(handle.node.config.guest_call_deadline()).await?;
            Ok(())
        };
        let up: Result<(), BootError> = trace.phase("restore", restored).await;
        match (up, key) {
            (Ok(()), _) => Ok((process, None)),
            (Err(failed), Some(key)) if !matches!(failed.error, Error::Cancelled { .. }) => {
                let restored = Some(Restored { key, template, process, started });
                Err(BootError { restored, ..failed })
            }
            (Err(failed), _) => Err(failed),
        }
    }

    async fn until_up(&self, process: &Process, limit: Duration) -> Result<(), BootError> {
        let handle = self.handle;
        tokio::select! {
            () = handle.guest.wait_until_up() => Ok(()),
            () = process.ended() => Err(exited_during_start(handle).await.into()),
            () = self.cancelled.cancelled() => Err(cancelled().into()),
            () = tokio::time::sleep(limit) => {
                let error = boot_timeout(&handle.paths, limit);
                Err(BootError { error, timed_out: true, restored: None })
            }
        }
    }

    /// Saves the VM as a template. That it cannot be saved is no failure of the pod; that it does
    /// not answer afterwards is.
    async fn save_template(&self, making: Making, process: &Process) -> Result<(), BootError> {
        let (handle, began) = (self.handle, Instant::now());
        let saved = self.trace.phase("template", save_template(handle, making)).await;
        let outcome = if saved.is_ok() { Outcome::Ok } else { Outcome::Failed };
        let took = began.elapsed();
        handle.node.observer.measured(Measured::TemplateSave { outcome, took });
        if let Err(error) = saved {
            let error = format!("{error:#}");
            tracing::warn!(pod = self.pod.id, error, "VM cannot be saved as a template");
        }
        self.until_up(process, handle.node.config.guest_call_deadline()).await
    }
}

/// Plugs the pod's network interfaces; the agent finds them by MAC address when it configures the
/// pod.
async fn hotplug_nics(handle: &Handle, pod: &Pod, attachment: &Attachment) -> Result<(), Error> {
    let node = &handle.node;
    let opened = async {
        let taps = node.network.open_taps(&pod.id, attachment).await;
        taps.map_err(|e| network_failed("open the taps", e))
    };
    let taps = node.failpoints.wrap("host: open the taps", opened).await?;
    if taps.len() != attachment.interfaces.len() {
        let (got, want) = (taps.len(), attachment.interfaces.len());
        return Err(Error::Internal(anyhow::anyhow!("{got} taps for {want} interfaces")));
    }
    let vmm = handle.machine.vmm()?;
    for (tap, interface) in taps.into_iter().zip(&attachment.interfaces) {
        vmm.add_net(&interface.name, interface.mac, interface.mtu, tap).await?;
    }
    Ok(())
}

/// Sets the VM's CPU limits on the host. On an error the limits inside the guest still apply.
pub(super) async fn limit_cpu(leaf: &Path, root: &Path, limits: CpuLimits) {
    let (directory, root) = (leaf.to_owned(), root.to_owned());
    let limited = blocking(move || cgroup::limit_cpu(&root, &directory, limits)).await;
    if let Err(error) = limited {
        tracing::warn!(cgroup = %leaf.display(), %error, "CPU limits of a pod are not set");
    }
}

pub(super) fn network_failed(what: &str, error: crate::ports::PortError) -> Error {
    let error: anyhow::Error = error.into();
    Error::Internal(error.context(format!("network: {what}")))
}

async fn exited_during_start(handle: &Handle) -> Error {
    let reason = exit_cause::find(handle).await.reason;
    Error::unavailable(format!(
        "the pod ended while it started: {reason}{}",
        log_tail(&handle.paths)
    ))
}

fn boot_timeout(paths: &Paths, limit: Duration) -> Error {
    let console = File::open(&paths.console)
        .and_then(|file| vmm_api::console_ring::read(&file, 0))
        .map(|(bytes, _)| vmm::clean(&String::from_utf8_lossy(&bytes), 1024))
        .unwrap_or_default();
    Error::unavailable(format!(
        "the guest's agent did not answer within {limit:?}; its console ends with: {console:?}{}",
        log_tail(paths)
    ))
}

struct Launched {
    process: Arc<Process>,
    /// Start time of the process (proc(5), `starttime`); None: it has exited already.
    started: Option<u64>,
    /// See [`Prepared`].
    key: Option<Key>,
    template: Option<Arc<Template>>,
}

/// Creates the files and sockets, and starts the VMM.
async fn launch(
    handle: &Arc<Handle>,
    pod: &Pod,
    attachment: &Attachment,
    leaf: &Path,
    templates: Templates,
) -> Result<Launched, Error> {
    let node = &handle.node;
    let Prepared { program, key, template } = {
        let (handle, pod) = (handle.clone(), pod.clone());
        let (attachment, leaf) = (attachment.clone(), leaf.to_owned());
        blocking(move || {
            let program = match handle.machine.host() {
                Some(own) => host_pod::program(&handle, own, &attachment, &leaf)
                    .map(|program| Prepared { program, key: None, template: None }),
                None => vm_program::program(&handle, &pod, &leaf, templates),
            };
            cgroup::count_memory(&handle.node.cgroup_root, &leaf);
            program
        })
        .await?
    };
    let launched = node.launcher.launch(program);
    let launched = node.failpoints.wrap("host: launch", launched).await?;
    let failed = |e| Error::io("watch the VMM", e);
    let process = Process::new(launched.pid, launched.pidfd).map_err(failed)?;
    // Fails if the process has exited and was reaped.
    let started = start_time(launched.pid).ok();
    if let Some(started) = started {
        oom_score::apply_to_new(handle, process.pid, started).await;
    }
    Ok(Launched { process: Arc::new(process), started, key, template })
}
