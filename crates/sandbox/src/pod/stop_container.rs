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

/// Asks once. The guest waits until a program that was just started has set up the signal, which the
/// kernel would drop before.
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
        let asked = async {
            ask(handle, &container).await;
            ended().await
        };
        if let Ok(ended) = tokio::time::timeout(grace, asked).await {
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
