//! StopContainer: asked politely, then killed. Runs with its caller and changes nothing itself: the
//! end of the process is reported by the guest like any other.

use std::time::Duration;

use agent_api::v1;

use super::handle::Handle;
use crate::error::Error;
use crate::policy::{Container, Pod};

const SIGKILL: u32 = 9;
/// A killed container is gone within this time, or the guest is sick.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// The kernel drops a signal to PID 1 that it has no handler for, and a program installs its
/// handlers a moment after it was started: one that is stopped this early is asked twice.
const YOUNG: Duration = Duration::from_secs(5);
const ASK_AGAIN: Duration = Duration::from_secs(2);

fn is_young(container: &Container) -> bool {
    let age = container.started_at.and_then(|at| at.elapsed().ok());
    age.is_some_and(|age| age < YOUNG)
}

async fn ask(handle: &Handle, container: &Container) {
    let id = &container.id;
    if let Err(error) = signal(handle, id, container.spec.stop_signal, false).await {
        tracing::debug!(container = id, %error, "stop signal");
    }
}

fn has_ended(pod: &Pod, id: &str) -> bool {
    use crate::model::ContainerState::{Created, Exited};
    pod.containers.get(id).is_none_or(|c| matches!(c.state(), Exited | Created))
}

pub(crate) async fn stop_container(
    handle: &Handle,
    id: &str,
    grace: Duration,
) -> Result<(), Error> {
    let container = handle.container(id)?;
    if has_ended(&handle.pod(), id) {
        return Ok(());
    }
    let ended = || handle.wait_for(|pod| has_ended(pod, id));
    if !grace.is_zero() {
        ask(handle, &container).await;
        let asked_again = grace.min(ASK_AGAIN);
        if let Ok(ended) = tokio::time::timeout(asked_again, ended()).await {
            return ended;
        }
        if is_young(&container) {
            ask(handle, &container).await;
        }
        if let Ok(ended) = tokio::time::timeout(grace - asked_again, ended()).await {
            return ended;
        }
    }
    let killed = kill(handle, id).await;
    match tokio::time::timeout(KILL_LIMIT, ended()).await {
        Ok(ended) => ended,
        Err(_) => killed.and(Err(Error::Deadline {
            what: format!("end of container {id} after SIGKILL"),
            limit: KILL_LIMIT,
        })),
    }
}

pub(super) async fn kill(handle: &Handle, id: &str) -> Result<(), Error> {
    signal(handle, id, SIGKILL, true).await
}

async fn signal(handle: &Handle, id: &str, signal: u32, all: bool) -> Result<(), Error> {
    let request = v1::SignalProcessRequest {
        container_id: id.to_owned(),
        exec_id: String::new(),
        signal,
        all,
    };
    handle
        .guest
        .call("signal the container", |mut c| async move { c.signal_process(request).await })
        .await
        .map(drop)
}
