//! StartContainer: the waiting init process becomes the container's program.

use std::sync::Arc;

use super::process::{Life, unix_time_ns};
use crate::agent::Agent;
use crate::error::{Error, Result};

pub async fn start(agent: &Arc<Agent>, id: &str) -> Result<()> {
    let _turn = agent.verb(id).await;
    let pipe = {
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
        if let Some(bundle) = &container.parts.bundle {
            bundle.start()?;
        }
        pipe
    };
    let started = unix_time_ns();
    pipe.wait().await?;
    let mut state = agent.lock();
    let container = state.container_mut(id)?;
    container.init.started_unix_ns = started;
    // A short program may have ended by now.
    if container.init.life == Life::Created {
        container.init.life = Life::Running;
    }
    Ok(())
}
