//! RemoveContainer: kills all processes, then removes the container. An unknown id is success.

use std::sync::Arc;
use std::time::Duration;

use super::create::release_huge_pages;
use crate::agent::Agent;
use crate::error::{Error, Result};

/// Time from SIGKILL to the exit of all processes.
const KILL_DEADLINE: Duration = Duration::from_secs(10);

pub async fn remove(agent: &Arc<Agent>, id: &str) -> Result<()> {
    let _guard = agent.lock_container(id).await;
    let mut parts = {
        let mut state = agent.lock();
        let Some(container) = state.containers.get_mut(id) else {
            return state.volumes.remove_container_volumes(id);
        };
        if let Some(cgroup) = &container.parts.cgroup {
            cgroup.kill()?;
        }
        container.start = None;
        std::mem::take(&mut container.parts)
    };
    let ended = wait_for_end(agent, id).await;
    let dismantled = match &ended {
        Ok(()) => parts.dismantle(agent).await,
        Err(_) => Ok(()),
    };
    let removed = {
        let mut state = agent.lock();
        if let Err(error) = ended.and(dismantled) {
            // Kept, so that the caller can retry.
            if let Some(container) = state.containers.get_mut(id) {
                container.parts = parts;
            }
            return Err(error);
        }
        if let Some(container) = state.containers.remove(id) {
            container.init.close();
            container.execs.values().for_each(super::process::Process::close);
        }
        state.volumes.remove_container_volumes(id)
    };
    agent.delete_trash();
    removed.and(release_huge_pages(agent, id).await)
}

async fn wait_for_end(agent: &Agent, id: &str) -> Result<()> {
    let wait = async {
        loop {
            let reaped = agent.reaped.notified();
            let running = agent.lock().containers.get(id).is_some_and(|container| {
                !container.init.is_stopped()
                    || container.execs.values().any(|process| !process.is_stopped())
            });
            if !running {
                return;
            }
            reaped.await;
        }
    };
    tokio::time::timeout(KILL_DEADLINE, wait).await.map_err(|_| Error::Deadline {
        operation: format!("wait for the exit of killed container {id:?}"),
        after: KILL_DEADLINE,
    })
}
