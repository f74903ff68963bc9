//! UpdateContainer: new limits for a running container.

use std::sync::Arc;

use oci_spec::runtime::LinuxResources;

use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::lanes::MOUNT;

pub async fn update(agent: &Arc<Agent>, id: &str, json: &[u8]) -> Result<()> {
    let resources: LinuxResources = serde_json::from_slice(json)
        .map_err(|error| Error::invalid("linux_resources", error.to_string()))?;
    let _turn = agent.verb(id).await;
    let cgroup = {
        let state = agent.lock();
        let container = state.container(id)?;
        if container.init.is_ended() {
            return Err(Error::Precondition(format!("container {id:?} has ended")));
        }
        container.parts.cgroup.clone()
    };
    let lane = agent.lanes.of_container(id);
    let (agent, id) = (Arc::clone(agent), id.to_owned());
    // Huge pages are made room for, and what is above a lower limit is reclaimed, which may mean
    // that it is written to a file system first.
    let work = move || {
        if agent.config.has_devices().is_ok() {
            agent.huge_pages.reserve(&id, &resources, |id| agent.has_ended(id))?;
        }
        cgroup.map_or(Ok(()), |cgroup| cgroup.apply(&resources))
    };
    lane.run("set the limits", MOUNT, work).await
}
