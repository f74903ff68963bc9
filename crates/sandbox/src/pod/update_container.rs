//! UpdateContainer: sets new limits of a container's cgroup in the guest.

use std::sync::Arc;

use agent_api::v1;
use oci_spec::runtime::LinuxResources;

use super::cpuset;
use super::handle::Handle;
use super::update_pod::grow_for_container;
use crate::error::Error;
use crate::policy::Change;

pub(super) async fn update_container(
    handle: &Arc<Handle>,
    id: &str,
    resources: LinuxResources,
) -> Result<(), Error> {
    handle.ready_pod()?;
    let container = handle.container(id)?;
    if container.exit.is_some() {
        return Err(Error::precondition(format!("container {id} has exited")));
    }
    let merged = merge(&container.resources, &resources);
    let resources_after = merged.unwrap_or_else(|| resources.clone());
    grow_for_container(handle, id, &container.resources, &resources_after).await?;
    cpuset::pin(handle, Some((id, &resources_after))).await?;
    let guest_limits = cpuset::for_guest(handle, &resources);
    let json = serde_json::to_vec(&guest_limits).map_err(|e| Error::Internal(e.into()))?;
    let request = v1::UpdateContainerRequest { container_id: id.to_owned(), linux_resources: json };
    let updated = handle
        .guest
        .call("update the container", |mut c| async move { c.update_container(request).await });
    if let Err(error) = updated.await {
        cpuset::pin_or_log(handle).await;
        return Err(error);
    }
    let resources = Box::new(resources_after);
    handle.commit(vec![Change::ContainerResources { id: id.to_owned(), resources }]).await
}

/// The old limits, overridden by those that the update sets.
fn merge(old: &LinuxResources, new: &LinuxResources) -> Option<LinuxResources> {
    let mut base = serde_json::to_value(old).ok()?;
    overlay(&mut base, serde_json::to_value(new).ok()?);
    serde_json::from_value(base).ok()
}

fn overlay(base: &mut serde_json::Value, new: serde_json::Value) {
    use serde_json::Value;
    match (base, new) {
        (Value::Object(base), Value::Object(new)) => {
            for (key, value) in new {
                overlay(base.entry(key).or_insert(Value::Null), value);
            }
        }
        (_, Value::Null) => {}
        (base, new) => *base = new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_keeps_limits_that_it_does_not_set() {
        let old: LinuxResources =
            serde_json::from_str(r#"{"memory":{"limit":100},"cpu":{"shares":2,"quota":5}}"#)
                .unwrap();
        let new = serde_json::from_str(r#"{"cpu":{"quota":7}}"#).unwrap();
        let merged = merge(&old, &new).unwrap();
        assert_eq!(merged.memory().unwrap().limit(), Some(100));
        assert_eq!(merged.cpu().as_ref().unwrap().quota(), Some(7));
        assert_eq!(merged.cpu().as_ref().unwrap().shares(), Some(2));
    }
}
