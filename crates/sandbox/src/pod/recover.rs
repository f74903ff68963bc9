//! Recovery after a restart of the daemon: checks whether the VM of the journal still runs, and
//! what happened in it meanwhile.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_api::v1;

use tokio_util::sync::CancellationToken;

use super::create_container::resume_log;
use super::events::{ended, publish_exit};
use super::handle::Handle;
use super::{cpuset, exit_cause, host_pod, oom_score, sync};
use crate::error::Error;
use crate::host::process::Process;
use crate::model::ExitView;
use crate::policy::{Change, Container, ContainerPhase};

/// Delay before a failed search for a process is retried; doubles each time.
const FIND_RETRY_MIN: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 100 });
const FIND_RETRY_MAX: Duration = Duration::from_secs(5);
/// The same for a guest that cannot be re-attached to: it may never support a compatible protocol.
const REATTACH_RETRY_MIN: Duration = Duration::from_millis(250);
const REATTACH_RETRY_MAX: Duration = Duration::from_secs(30);
const SIGKILL: u32 = 9;

/// The VMM of the journal, if it still runs; otherwise its exit is committed. Also None if `cancel`
/// is cancelled first: then its state is unknown.
pub(super) async fn find_vm(
    handle: &Arc<Handle>,
    cancel: &CancellationToken,
) -> Option<Arc<Process>> {
    let vmm = handle.pod().vmm();
    let find = || match vmm {
        Some((pid, started)) => Process::find(pid, started),
        None => Ok(None),
    };
    let found = tokio::select! {
        found = retry_find(&handle.id, find) => found,
        () = cancel.cancelled() => return None,
    };
    if let Some(process) = found {
        return Some(Arc::new(process));
    }
    host_pod::kill_remaining(handle, &handle.pod()).await;
    let cause = exit_cause::find(handle).await;
    cause.measure(handle);
    let change = cause.change(SystemTime::now());
    let _ = handle.commit(vec![change]).await;
    None
}

/// An error (no free descriptor, no memory) says nothing about the process: retries until it is
/// found or known to be gone.
async fn retry_find<T>(
    pod: &str,
    mut find: impl FnMut() -> std::io::Result<Option<T>>,
) -> Option<T> {
    let mut backoff = Backoff::new(FIND_RETRY_MIN, FIND_RETRY_MAX);
    loop {
        match find() {
            Ok(found) => return found,
            Err(error) => {
                tracing::error!(pod, %error, "cannot search for the pod's VMM, will retry");
            }
        }
        tokio::time::sleep(backoff.next()).await;
    }
}

/// Exponential backoff with a limit.
struct Backoff {
    next: Duration,
    longest: Duration,
}

impl Backoff {
    fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, longest }
    }

    fn next(&mut self) -> Duration {
        let following = (self.next * 2).min(self.longest);
        std::mem::replace(&mut self.next, following)
    }
}

/// Reconciles the journal with the guest; retries until that succeeds. Pings detect a guest that
/// does not answer.
pub(super) async fn reattach(handle: &Arc<Handle>) {
    let mut backoff = Backoff::new(REATTACH_RETRY_MIN, REATTACH_RETRY_MAX);
    loop {
        match try_reattach(handle).await {
            Ok(()) => {
                tracing::info!(pod = handle.id, "re-attached to a running VM");
                return;
            }
            Err(error) => {
                tracing::warn!(pod = handle.id, %error, "cannot re-attach yet");
                tokio::time::sleep(backoff.next()).await;
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
    // The pod's owner completes partial creations and removals.
    let present =
        |c: &&Container| handle.recovered.contains(&c.id) && c.phase == ContainerPhase::Present;
    for container in pod.containers.values().filter(present) {
        let process =
            processes.iter().find(|p| p.container_id == container.id && p.exec_id.is_empty());
        recover_container(handle, container, process).await;
    }
    // A killed daemon may have journaled an update without applying it.
    cpuset::pin_or_log(handle).await;
    oom_score::apply(handle).await;
    end_orphaned_execs(handle, &processes).await;
    Ok(())
}

/// Waits for the journal only: one container must not delay the others.
async fn recover_container(
    handle: &Arc<Handle>,
    container: &Container,
    process: Option<&v1::Process>,
) {
    if handle.log(&container.id).is_none() && !handle.node.config.caller_reads_output {
        resume_log(handle, container);
    }
    if container.exit.is_some() {
        // Late output of an exited container is still logged.
        if !container.drained {
            spawn_publish_exit(handle, container);
        }
        return;
    }
    sync::resume(handle, container);
    let id = container.id.clone();
    let changes = match process.map(|p| (p.state(), p)) {
        Some((v1::ProcessState::Created, _)) => vec![],
        Some((v1::ProcessState::Running, _)) => {
            vec![Change::ContainerStarted { id, at: SystemTime::now() }]
        }
        // The guest repeats the exit event unless it was acknowledged: use this one.
        Some((v1::ProcessState::Ended, process)) => {
            process.exit.as_ref().map(ended).into_iter().collect()
        }
        None => vec![unknown_to_guest(id)],
    };
    let has_ended = changes.iter().any(|c| matches!(c, Change::ContainerEnded { .. }));
    // A failed write is kept in memory and retried.
    if !changes.is_empty()
        && let Err(error) = handle.commit(changes).await
    {
        tracing::warn!(container = container.id, %error, "container state is not journaled yet");
    }
    if has_ended {
        spawn_publish_exit(handle, container);
    }
}

fn spawn_publish_exit(handle: &Arc<Handle>, container: &Container) {
    let (handle, id) = (handle.clone(), container.id.clone());
    tokio::spawn(async move { publish_exit(&handle, id).await });
}

/// Exit for a container that the guest does not know.
fn unknown_to_guest(id: String) -> Change {
    let exit = ExitView {
        code: 255,
        oom_killed: false,
        at: SystemTime::now(),
        reason: "Unknown".into(),
        message: "the guest does not know the container".into(),
    };
    Change::ContainerEnded { id, exit }
}

/// Kills commands of the previous daemon: nobody reads their output.
async fn end_orphaned_execs(handle: &Handle, processes: &[v1::Process]) {
    let orphans = processes.iter().filter(|p| {
        !p.exec_id.is_empty()
            && p.state() != v1::ProcessState::Ended
            && !handle.is_exec_registered(&p.exec_id)
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
            tracing::warn!(pod = handle.id, %error, "cannot kill an orphaned command");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reattachment_is_retried_with_exponential_backoff() {
        let mut backoff = Backoff::new(REATTACH_RETRY_MIN, REATTACH_RETRY_MAX);
        let pauses: Vec<_> = (0..9).map(|_| backoff.next().as_millis()).collect();
        assert_eq!(pauses, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
    }

    #[tokio::test]
    async fn a_failed_search_for_a_vm_is_retried() {
        let full = || Err(std::io::Error::from_raw_os_error(libc::EMFILE));
        for end in [Some(7), None] {
            let mut answers = vec![Ok(end), full(), full(), full()];
            assert_eq!(retry_find("p", || answers.pop().unwrap()).await, end);
            assert!(answers.is_empty(), "it stopped too early");
        }
    }
}
