//! After a restart of the daemon: is the VM of the journal still there, and what has happened in
//! it since?

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use agent_api::v1;

use tokio_util::sync::CancellationToken;

use super::create_container::resume_log;
use super::events::{ended, show_end};
use super::handle::Handle;
use super::{cpuset, death, host_pod, oom_score, sync};
use crate::error::Error;
use crate::host::process::Process;
use crate::model::ExitView;
use crate::policy::{Change, Container, ContainerPhase};

/// A process that cannot be looked for is looked for again after this time, then after twice that,
/// and so on.
const FIND_FIRST: Duration = Duration::from_millis(if cfg!(test) { 5 } else { 100 });
const FIND_MOST: Duration = Duration::from_secs(5);
/// The same of a guest that cannot be re-attached to: it may speak no protocol of ours for ever.
const REATTACH_FIRST: Duration = Duration::from_millis(250);
const REATTACH_MOST: Duration = Duration::from_secs(30);
const SIGKILL: u32 = 9;

/// The VMM of the journal, if it still runs; if not, the pod is told so. None as well when `cancel`
/// comes first: then nothing is known of it.
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
        found = find_again(&handle.id, find) => found,
        () = cancel.cancelled() => return None,
    };
    if let Some(process) = found {
        return Some(Arc::new(process));
    }
    host_pod::end_rest(handle, &handle.pod()).await;
    let death = death::cause(handle).await;
    death.measure(handle);
    let change = death.change(SystemTime::now());
    let _ = handle.commit(vec![change]).await;
    None
}

/// An error (no free descriptor, no memory) says nothing of the process: it is looked for until it is
/// found, or known to be gone.
async fn find_again<T>(
    pod: &str,
    mut find: impl FnMut() -> std::io::Result<Option<T>>,
) -> Option<T> {
    let mut pauses = Pauses::new(FIND_FIRST, FIND_MOST);
    loop {
        match find() {
            Ok(found) => return found,
            Err(error) => {
                tracing::error!(pod, %error, "cannot look for the pod's VMM, will try again");
            }
        }
        tokio::time::sleep(pauses.next()).await;
    }
}

/// Each twice as long as the one before, up to the longest.
struct Pauses {
    next: Duration,
    longest: Duration,
}

impl Pauses {
    fn new(first: Duration, longest: Duration) -> Self {
        Self { next: first, longest }
    }

    fn next(&mut self) -> Duration {
        let following = (self.next * 2).min(self.longest);
        std::mem::replace(&mut self.next, following)
    }
}

/// Brings journal and guest together. Returns when that is done; a guest that does not answer is
/// the pings' business.
pub(super) async fn reattach(handle: &Arc<Handle>) {
    let mut pauses = Pauses::new(REATTACH_FIRST, REATTACH_MOST);
    loop {
        match try_reattach(handle).await {
            Ok(()) => {
                tracing::info!(pod = handle.id, "re-attached to a running VM");
                return;
            }
            Err(error) => {
                tracing::warn!(pod = handle.id, %error, "cannot re-attach yet");
                tokio::time::sleep(pauses.next()).await;
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
    // Those that are half made or half removed are finished by the pod's owner.
    let present =
        |c: &&Container| handle.recovered.contains(&c.id) && c.phase == ContainerPhase::Present;
    for container in pod.containers.values().filter(present) {
        let process =
            processes.iter().find(|p| p.container_id == container.id && p.exec_id.is_empty());
        take_up(handle, container, process).await;
    }
    // A daemon that was killed may have journaled an update and not carried it out.
    cpuset::pin_again(handle).await;
    oom_score::apply(handle).await;
    end_orphaned_execs(handle, &processes).await;
    Ok(())
}

/// Waits for nothing but the journal: trouble of one container is not that of the others.
async fn take_up(handle: &Arc<Handle>, container: &Container, process: Option<&v1::Process>) {
    if handle.log(&container.id).is_none() && !handle.node.config.caller_reads_output {
        resume_log(handle, container);
    }
    if container.exit.is_some() {
        // Of one that is shown, what comes late still gets into the log.
        if !container.drained {
            show(handle, container);
        }
        return;
    }
    sync::start_again(handle, container);
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
    // What cannot be written down now is known all the same, and is written later.
    if !changes.is_empty()
        && let Err(error) = handle.commit(changes).await
    {
        tracing::warn!(container = container.id, %error, "what has happened is not journaled yet");
    }
    if has_ended {
        show(handle, container);
    }
}

fn show(handle: &Arc<Handle>, container: &Container) {
    let (handle, id) = (handle.clone(), container.id.clone());
    tokio::spawn(async move { show_end(&handle, id).await });
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_guest_that_cannot_be_reattached_to_is_asked_less_and_less_often() {
        let mut pauses = Pauses::new(REATTACH_FIRST, REATTACH_MOST);
        let told: Vec<_> = (0..9).map(|_| pauses.next().as_millis()).collect();
        assert_eq!(told, [250, 500, 1000, 2000, 4000, 8000, 16_000, 30_000, 30_000]);
    }

    #[tokio::test]
    async fn an_error_of_the_search_for_a_vm_is_no_answer() {
        let full = || Err(std::io::Error::from_raw_os_error(libc::EMFILE));
        for end in [Some(7), None] {
            let mut answers = vec![Ok(end), full(), full(), full()];
            assert_eq!(find_again("p", || answers.pop().unwrap()).await, end);
            assert!(answers.is_empty(), "it has given up early");
        }
    }
}
