//! StartContainer: the prepared process runs.

use std::sync::Arc;
use std::time::SystemTime;

use agent_api::v1;

use super::handle::Handle;
use crate::error::Error;
use crate::model::{ContainerState, ExitView};
use crate::policy::{CODE_START_ERROR, Change, ContainerPhase};

pub(super) async fn start_container(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    handle.ready_pod()?;
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
    let _starting = handle.begin_start(id);
    let request = v1::StartContainerRequest { container_id: id.to_owned() };
    let call = handle
        .guest
        .call("start the container", |mut c| async move { c.start_container(request).await });
    let result = tokio::select! {
        result = call => result,
        () = handle.closing.cancelled() => Err(Error::precondition("the pod was stopped")),
    };
    let at = SystemTime::now();
    match result {
        Ok(_) => handle.commit(vec![Change::ContainerStarted { id: id.to_owned(), at }]).await,
        // Whether it runs is not known: the guest's events and the next recovery will tell.
        Err(error @ (Error::Unavailable { .. } | Error::Deadline { .. })) => Err(error),
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
