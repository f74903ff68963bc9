//! FreezeContainer: the cgroup v2 freezer (cgroup-v2.rst, "cgroup.freeze").

use std::sync::Arc;
use std::time::Duration;

use super::process::Status;
use crate::agent::Agent;
use crate::blocking::with_timeout;
use crate::error::{Error, Result};

/// A process in an uninterruptible system call is frozen only when the call ends.
const FREEZE_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(5);

/// Waits until all processes are frozen or thawed. A container that cannot be frozen in time is thawed.
pub async fn freeze(agent: &Arc<Agent>, id: &str, frozen: bool) -> Result<()> {
    let _guard = agent.lock_container(id).await;
    let starts = Arc::clone(&agent.lock().container(id)?.starts);
    let _no_starts = if frozen {
        let operation = format!("pause container {id}: wait for starting execs");
        Some(with_timeout(&operation, FREEZE_TIMEOUT, starts.write()).await?)
    } else {
        None
    };
    let not_running = || Error::Precondition(format!("container {id:?} is not running"));
    let cgroup = {
        let state = agent.lock();
        let container = state.container(id)?;
        let running = container.init.status == Status::Running;
        let cgroup = container.parts.cgroup.clone().filter(|_| running).ok_or_else(not_running)?;
        // Under the lock: SIGKILL, which thaws, comes before the check or after the freeze.
        cgroup.set_frozen(frozen)?;
        cgroup
    };
    let is_running = || agent.lock().container(id).is_ok_and(|c| c.init.status == Status::Running);
    let wait = async {
        while cgroup.is_frozen() != frozen {
            if !is_running() {
                return false;
            }
            tokio::time::sleep(POLL_INTERVAL).await;
        }
        true
    };
    match tokio::time::timeout(FREEZE_TIMEOUT, wait).await {
        Ok(true) => Ok(()),
        Ok(false) => {
            cgroup.set_frozen(false)?;
            Err(not_running())
        }
        Err(_) => {
            if frozen {
                cgroup.set_frozen(false)?;
            }
            let operation = format!("{} container {id}", if frozen { "freeze" } else { "thaw" });
            Err(Error::Deadline { operation, after: FREEZE_TIMEOUT })
        }
    }
}
