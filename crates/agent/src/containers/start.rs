//! StartContainer: the waiting init process becomes the container's program.

use std::sync::Arc;

use super::process::{Life, unix_time_ns};
use super::signal;
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::lanes::LOOK_UP;

pub async fn start(agent: &Arc<Agent>, id: &str) -> Result<()> {
    let _turn = agent.verb(id).await;
    let (pipe, bundle) = {
        let mut state = agent.lock();
        let container = state.container_mut(id)?;
        match container.init.life {
            Life::Created => {}
            Life::Running => {
                return Err(Error::Precondition(format!("container {id:?} runs already")));
            }
            Life::Ended(_) => {
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
        // The peer is a process of the container: it may not be there to accept.
        let lane = agent.lanes.of_container(id);
        let started =
            lane.run("tell the init process to start", LOOK_UP, move || bundle.start()).await;
        if let Err(error) = started {
            kill(agent, id);
            return Err(error);
        }
    }
    let started = unix_time_ns();
    if let Err(error) = pipe.wait().await {
        // A program that could not be run has told so, and is ending. Any other must not run after
        // this answer; its exit is told as ever.
        if !matches!(error, Error::Command { .. }) {
            kill(agent, id);
        }
        return Err(error);
    }
    let mut state = agent.lock();
    let container = state.container_mut(id)?;
    container.init.started_unix_ns = started;
    // A short program may have ended by now.
    if container.init.life == Life::Created {
        container.init.life = Life::Running;
    }
    Ok(())
}

fn kill(agent: &Agent, id: &str) {
    if agent.has_ended(id) {
        return;
    }
    if let Err(error) = signal::signal(agent, id, "", signal::SIGKILL, false) {
        tracing::error!(container = id, error = %error.chain(), "cannot kill what did not start");
    }
}
