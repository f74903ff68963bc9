//! StartContainer: starts the created process.

use std::sync::Arc;
use std::time::SystemTime;

use agent_api::v1;

use super::handle::Handle;
use super::stop_container::kill;
use crate::error::Error;
use crate::model::{ContainerState, ExitView};
use crate::policy::{CODE_START_ERROR, Change, ContainerPhase};

pub(super) async fn start_container(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    handle.ready_pod()?;
    // Before the state check, so that only one of two concurrent starts passes it.
    let Some(_starting) = handle.mark_starting(id) else {
        return Err(Error::precondition(format!("container {id} is being started")));
    };
    let container = handle.container(id)?;
    let state = container.state();
    if container.phase != ContainerPhase::Present || state != ContainerState::Created {
        return Err(Error::precondition(format!(
            "container {id} cannot be started: it is {}",
            if container.phase == ContainerPhase::Present {
                format!("{state:?}").to_lowercase()
            } else {
                "being created or removed".into()
            }
        )));
    }
    let request = v1::StartContainerRequest { container_id: id.to_owned() };
    let call = handle
        .guest
        .call("start the container", |mut c| async move { c.start_container(request).await });
    let result = tokio::select! {
        result = call => result,
        // The stop, or after a shutdown of the daemon the recovery, handles a process that has
        // started.
        () = handle.stopping.cancelled() => return Err(Error::precondition("the pod was stopped")),
    };
    let at = SystemTime::now();
    match result {
        Ok(_) => {
            let started = Change::ContainerStarted { id: id.to_owned(), at };
            match handle.commit(vec![started]).await {
                Err(error) if handle.container(id).is_ok_and(|c| c.started_at.is_some()) => {
                    tracing::warn!(container = id, %error, "container start is not journaled yet");
                    Ok(())
                }
                other => other,
            }
        }
        // Unknown whether it runs. The caller gets an error and starts another container: this one
        // must not run as well. Its exit is reported like any other.
        Err(error @ (Error::Unavailable { .. } | Error::Deadline { .. })) => {
            if let Err(error) = kill(handle, id).await {
                tracing::warn!(container = id, %error, "cannot kill after a failed start");
            }
            Err(error)
        }
        Err(error) => {
            let exit = ExitView {
                code: CODE_START_ERROR,
                oom_killed: false,
                at,
                reason: "StartError".into(),
                message: error.to_string(),
            };
            let ended = Change::ContainerEnded { id: id.to_owned(), exit };
            let drained = Change::LogsDrained { id: id.to_owned() };
            if let Err(error) = handle.commit(vec![ended, drained]).await {
                tracing::warn!(container = id, %error, "failed start is not journaled");
            }
            Err(error)
        }
    }
}
