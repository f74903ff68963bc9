//! UpdateContainer: sets new cgroup limits of a running container.

use std::sync::Arc;

use oci_spec::runtime::LinuxResources;

use crate::agent::Agent;
use crate::blocking::MOUNT_TIMEOUT;
use crate::error::{Error, Result};

pub async fn update(agent: &Arc<Agent>, id: &str, json: &[u8]) -> Result<()> {
    let resources: LinuxResources = serde_json::from_slice(json)
        .map_err(|error| Error::invalid("linux_resources", error.to_string()))?;
    let _guard = agent.lock_container(id).await;
    let cgroup = {
        let state = agent.lock();
        let container = state.container(id)?;
        if container.init.is_stopped() {
            return Err(Error::Precondition(format!("container {id:?} has ended")));
        }
        container.parts.cgroup.clone()
    };
    let pool = agent.pools.for_container(id);
    let (agent, id) = (Arc::clone(agent), id.to_owned());
    // May block: huge pages are allocated, and memory above a lower limit is reclaimed, which may
    // write to a file system.
    let work = move || {
        if agent.config.require_vm().is_ok() {
            agent.huge_pages.reserve(&id, &resources, |id| agent.has_exited(id))?;
        }
        cgroup.map_or(Ok(()), |cgroup| cgroup.apply(&resources))
    };
    pool.run("set the limits", MOUNT_TIMEOUT, work).await
}
