//! FreezeContainer: the cgroup v2 freezer (cgroup-v2.rst, "cgroup.freeze").

use std::sync::Arc;
use std::time::Duration;

use super::process::Status;
use crate::agent::Agent;
use crate::error::{Error, Result};

/// A process in an uninterruptible system call is frozen only when the call ends.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until all processes are frozen or thawed. A container that cannot be frozen in time is thawed.
pub async fn freeze(agent: &Arc<Agent>, id: &str, frozen: bool) -> Result<()> {
    let _guard = agent.lock_container(id).await;
    let cgroup = {
        let state = agent.lock();
        let container = state.container(id)?;
        let cgroup = container.parts.cgroup.clone();
        cgroup.filter(|_| container.init.status == Status::Running)
    };
    let Some(cgroup) = cgroup else {
        return Err(Error::Precondition(format!("container {id:?} is not running")));
    };
    cgroup.set_frozen(frozen)?;
    let wait = async {
        while cgroup.is_frozen() != frozen {
            tokio::time::sleep(POLL_INTERVAL).await;
        }
    };
    if tokio::time::timeout(FREEZE_TIMEOUT, wait).await.is_err() {
        if frozen {
            cgroup.set_frozen(false)?;
        }
        let operation = format!("{} container {id}", if frozen { "freeze" } else { "thaw" });
        return Err(Error::Deadline { operation, after: FREEZE_TIMEOUT });
    }
    Ok(())
}
