//! After a restart of the daemon: is the VM of the journal still there, and what has happened in
//! it since?

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_api::v1;

use super::cpuset;
use super::create_container::{forget, start_log, undo};
use super::events::{ended, show_when_drained};
use super::handle::Handle;
use super::host_pod;
use super::remove_container::free_in_guest;
use super::sync;
use crate::error::Error;
use crate::host::process::Process;
use crate::model::ExitView;
use crate::policy::{Change, Container, ContainerPhase};

const PAUSE: Duration = Duration::from_millis(500);
const SIGKILL: u32 = 9;

/// The VMM of the journal, if it still runs; if not, the pod is told so.
pub(super) async fn find_vm(handle: &Arc<Handle>) -> Option<Arc<Process>> {
    let found = match handle.pod().vmm() {
        Some((pid, started)) => Process::find(pid, started),
        None => Ok(None),
    };
    match found {
        Ok(Some(process)) => Some(Arc::new(process)),
        Ok(None) => {
            host_pod::end_rest(handle, &handle.pod()).await;
            let reason = handle.last_words();
            let at = SystemTime::now();
            let _ = handle.commit(vec![Change::VmDied { reason, at }]).await;
            None
        }
        Err(error) => {
            tracing::error!(pod = handle.id, %error, "cannot look for the pod's VMM");
            None
        }
    }
}

/// Brings journal and guest together. Returns when that is done; a guest that does not answer is
/// the pings' business.
pub(super) async fn reattach(handle: &Arc<Handle>) {
    loop {
        match try_reattach(handle).await {
            Ok(()) => {
                tracing::info!(pod = handle.id, "re-attached to a running VM");
                return;
            }
            Err(error) => {
                tracing::warn!(pod = handle.id, %error, "cannot re-attach yet");
                tokio::time::sleep(PAUSE).await;
            }
        }
    }
}

async fn try_reattach(handle: &Arc<Handle>) -> Result<(), Error> {
    handle.guest.hello(handle.node.config.guest_call_deadline()).await?;
    let listed = handle.guest.call("list processes", |mut c| async move {
        c.list_processes(v1::ListProcessesRequest {}).await
    });
    let processes = listed.await?.processes;
    let pod = handle.pod();
    let found = pod.containers.values().filter(|c| handle.recovered.contains(&c.id));
    for container in found {
        match container.phase {
            ContainerPhase::Creating => undo(handle, &container.id).await,
            ContainerPhase::Removing => {
                free_in_guest(handle, &container.id).await?;
                forget(handle, &container.id).await?;
            }
            ContainerPhase::Present => {
                let process = processes
                    .iter()
                    .find(|p| p.container_id == container.id && p.exec_id.is_empty());
                take_up(handle, container, process).await?;
            }
        }
    }
    // A daemon that was killed may have journaled an update and not carried it out.
    cpuset::pin_again(handle).await;
    end_orphaned_execs(handle, &processes).await;
    Ok(())
}

async fn take_up(
    handle: &Arc<Handle>,
    container: &Container,
    process: Option<&v1::Process>,
) -> Result<(), Error> {
    if handle.log(&container.id).is_none() {
        start_log(handle, container).await?;
    }
    if container.exit.is_none() {
        sync::start_again(handle, container);
    } else {
        show_when_drained(handle, container.id.clone()).await;
        return Ok(());
    }
    let id = container.id.clone();
    let changes = match process.map(|p| (p.state(), p)) {
        Some((v1::ProcessState::Created, _)) => vec![],
        Some((v1::ProcessState::Running, _)) => {
            vec![Change::ContainerStarted { id, at: SystemTime::now() }]
        }
        // Its exit comes again with the events, unless it was acknowledged: take it from here.
        Some((v1::ProcessState::Ended, process)) => {
            process.exit.as_ref().map(ended).into_iter().collect()
        }
        None => vec![lost(id)],
    };
    let has_ended = changes.iter().any(|c| matches!(c, Change::ContainerEnded { .. }));
    if !changes.is_empty() {
        handle.commit(changes).await?;
    }
    if has_ended {
        show_when_drained(handle, container.id.clone()).await;
    }
    Ok(())
}

/// The guest has never heard of a container that the journal holds.
fn lost(id: String) -> Change {
    let exit = ExitView {
        code: 255,
        oom_killed: false,
        at: SystemTime::now(),
        reason: "Unknown".into(),
        message: "the guest does not know the container".into(),
    };
    Change::ContainerEnded { id, exit }
}

/// Commands whose callers went with the former daemon: nobody reads their output any more.
async fn end_orphaned_execs(handle: &Handle, processes: &[v1::Process]) {
    let orphans = processes.iter().filter(|p| {
        !p.exec_id.is_empty()
            && p.state() != v1::ProcessState::Ended
            && !handle.knows_exec(&p.exec_id)
    });
    for orphan in orphans {
        let request = v1::SignalProcessRequest {
            container_id: orphan.container_id.clone(),
            exec_id: orphan.exec_id.clone(),
            signal: SIGKILL,
            all: false,
            await_handler: false,
        };
        let killed = handle.guest.call("end an orphaned command", |mut c| async move {
            c.signal_process(request).await
        });
        if let Err(error) = killed.await {
            tracing::warn!(pod = handle.id, %error, "orphaned command stays");
        }
    }
}
