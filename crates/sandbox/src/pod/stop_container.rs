//! StopContainer: stop signal, then SIGKILL. Runs in the caller's task and changes no state: the
//! guest reports the exit.

use std::time::Duration;

use agent_api::v1;

use super::handle::Handle;
use crate::error::Error;
use crate::policy::{Container, Pod};

const SIGKILL: u32 = 9;
/// Longest wait for the exit of a killed container.
const KILL_LIMIT: Duration = Duration::from_secs(20);

/// Sends the signal once. The guest first waits until a program that has just started has installed
/// a handler: the kernel drops the signal for PID 1 without one.
async fn send_stop_signal(handle: &Handle, container: &Container) {
    let id = &container.id;
    if let Err(error) = signal(handle, id, container.spec.stop_signal, false).await {
        tracing::debug!(container = id, %error, "cannot send stop signal");
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
        let stopped = async {
            send_stop_signal(handle, &container).await;
            ended().await
        };
        if let Ok(ended) = tokio::time::timeout(grace, stopped).await {
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
        await_handler: !all,
    };
    handle
        .guest
        .call("signal the container", |mut c| async move { c.signal_process(request).await })
        .await
        .map(drop)
}
