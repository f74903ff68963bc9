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
use super::trace::Trace;
use super::{exit_cause, host_pod, oom_score, vm_program};
use crate::error::Error;
use crate::host::process::{Process, start_time};
use crate::host::{blocking, cgroup};
use crate::machine::Machine;
use crate::model::CpuLimits;
use crate::observe::{Measured, Outcome};
use crate::policy::{Change, Effect, Pod};
use crate::ports::Attachment;
use crate::vmm;

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
            attached.map_err(|e| network_failed("attach", e))
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
                (Err(error), Ok(_) | Err(Error::Cancelled { .. })) | (Ok(_), Err(error)) => {
                    return Err(error);
                }
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
    let began = Instant::now();
    let booted = boot_admitted(handle, pod, attachment, leaf, trace, start_cancelled).await;
    let outcome = match &booted {
        Err(BootError { timed_out: true, .. }) => Outcome::TimedOut,
        Err(BootError { error: Error::Cancelled { .. }, .. }) => Outcome::Cancelled,
        Err(_) => Outcome::Failed,
        Ok(_) => Outcome::Ok,
    };
    if pod.spec.host.is_none() {
        node.observer.measured(Measured::Boot { outcome, took: began.elapsed() });
    }
    booted.map_err(|failed| failed.error)
}

struct BootError {
    error: Error,
    /// The agent did not answer in time.
    timed_out: bool,
}

impl From<Error> for BootError {
    fn from(error: Error) -> Self {
        Self { error, timed_out: false }
    }
}

async fn boot_admitted(
    handle: &Arc<Handle>,
    pod: &Pod,
    attachment: &Attachment,
    leaf: &Path,
    trace: &Trace,
    start_cancelled: &CancellationToken,
) -> Result<Arc<Process>, BootError> {
    let launched = trace.phase("launch", launch(handle, pod, attachment, leaf)).await?;
    let (process, started) = launched;
    let change = Change::VmmStarted { pid: process.pid, started };
    trace.phase("journal", handle.commit(vec![change])).await?;

    let limit = handle.node.config.boot_deadline();
    let up = trace.phase("boot", async {
        tokio::select! {
            () = handle.guest.wait_until_up() => Ok(()),
            () = process.ended() => Err(exited_during_start(handle).await.into()),
            () = start_cancelled.cancelled() => Err(cancelled().into()),
            () = tokio::time::sleep(limit) => {
                Err(BootError { error: boot_timeout(&handle.paths, limit), timed_out: true })
            }
        }
    });
    up.await?;
    Ok(process)
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

/// Creates the files and sockets, and starts the VMM.
async fn launch(
    handle: &Arc<Handle>,
    pod: &Pod,
    attachment: &Attachment,
    leaf: &Path,
) -> Result<(Arc<Process>, u64), Error> {
    let node = &handle.node;
    let program = {
        let (handle, pod) = (handle.clone(), pod.clone());
        let (attachment, leaf) = (attachment.clone(), leaf.to_owned());
        blocking(move || {
            let program = match handle.machine.host() {
                Some(own) => host_pod::program(&handle, own, &attachment, &leaf),
                None => vm_program::program(&handle, &pod, &leaf),
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
    match start_time(launched.pid) {
        Ok(started) => {
            oom_score::apply_to_new(handle, process.pid, started).await;
            Ok((Arc::new(process), started))
        }
        // It has exited and was reaped.
        Err(_) => Err(exited_during_start(handle).await),
    }
}
