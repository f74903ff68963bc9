//! StartContainer: lets the waiting init process execute the container's program.

use std::sync::Arc;

use super::process::{Status, unix_time_ns};
use super::signal;
use crate::agent::Agent;
use crate::blocking::LOOKUP_TIMEOUT;
use crate::error::{Error, Result};

pub async fn start(agent: &Arc<Agent>, id: &str) -> Result<()> {
    let _guard = agent.lock_container(id).await;
    let (pipe, bundle) = {
        let mut state = agent.lock();
        let container = state.container_mut(id)?;
        match container.init.status {
            Status::Created => {}
            Status::Running => {
                return Err(Error::Precondition(format!("container {id:?} runs already")));
            }
            Status::Stopped(_) => {
                return Err(Error::Precondition(format!("container {id:?} has ended")));
            }
        }
        let pipe = container
            .start
            .take()
            .ok_or_else(|| Error::Precondition(format!("container {id:?} was started before")))?;
        (pipe, container.parts.bundle.clone())
    };
    if let Some(bundle) = bundle {
        // The peer is a process of the container and may not accept.
        let pool = agent.pools.for_container(id);
        let started = pool
            .run("send the start notification to init", LOOKUP_TIMEOUT, move || bundle.start())
            .await;
        if let Err(error) = started {
            kill(agent, id);
            return Err(error);
        }
    }
    let started = unix_time_ns();
    if let Err(error) = pipe.wait().await {
        // A failed execve has been reported and the process exits. Any other process must not run
        // after this error; its exit is reported as usual.
        if !matches!(error, Error::Command { .. }) {
            kill(agent, id);
        }
        return Err(error);
    }
    let mut state = agent.lock();
    let container = state.container_mut(id)?;
    container.init.started_unix_ns = started;
    // A short program may have exited already.
    if container.init.status == Status::Created {
        container.init.status = Status::Running;
    }
    Ok(())
}

fn kill(agent: &Agent, id: &str) {
    if agent.has_exited(id) {
        return;
    }
    if let Err(error) = signal::signal(agent, id, "", signal::SIGKILL, false) {
        tracing::error!(container = id, error = %error.chain(), "cannot kill a failed init");
    }
}
