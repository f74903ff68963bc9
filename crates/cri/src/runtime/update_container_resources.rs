//! UpdateContainerResources: limits of a container's cgroup inside the VM.

use oci_spec::runtime::LinuxResources;
use tonic::Status;

use super::Runtime;
use crate::convert::{Refusal, resources};
use crate::errors::{refusal_status, sandbox_status};
use crate::v1;

impl Runtime {
    pub(super) async fn update_container_resources(
        &self,
        request: v1::UpdateContainerResourcesRequest,
    ) -> Result<v1::UpdateContainerResourcesResponse, Status> {
        let view = self.sandboxes.container(&request.container_id).map_err(sandbox_status)?;
        let limits = merge(&view.resources, &view.spec.origin, &request).map_err(refusal_status)?;
        self.sandboxes.update_container(&view.id, limits).await.map_err(sandbox_status)?;
        Ok(v1::UpdateContainerResourcesResponse {})
    }
}

fn merge(
    current: &LinuxResources,
    origin: &serde_json::Value,
    request: &v1::UpdateContainerResourcesRequest,
) -> Result<LinuxResources, Refusal> {
    if request.windows.is_some() {
        return Err(Refusal::unsupported("windows", "this is a Linux node"));
    }
    let linux = request
        .linux
        .as_ref()
        .ok_or_else(|| Refusal::invalid("linux", "missing: say which limits to change"))?;
    let created: v1::ContainerConfig = serde_json::from_value(origin.clone()).unwrap_or_default();
    let oom_score_adj =
        created.linux.and_then(|linux| linux.resources).map_or(0, |limits| limits.oom_score_adj);
    if linux.oom_score_adj != 0 && linux.oom_score_adj != oom_score_adj {
        return Err(Refusal::unsupported(
            "linux.oom_score_adj",
            "cannot be changed once a container is created",
        ));
    }
    let update = resources::to_oci(linux).map_err(|refusal| refusal.inside("linux"))?;
    Ok(resources::overlay(current, &update))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(linux: v1::LinuxContainerResources) -> v1::UpdateContainerResourcesRequest {
        v1::UpdateContainerResourcesRequest { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn an_oom_score_is_refused_unless_it_stays() {
        let origin = serde_json::json!({ "linux": { "resources": { "oom_score_adj": 10 } } });
        let current = LinuxResources::default();
        let with = |oom_score_adj| {
            let linux = v1::LinuxContainerResources { oom_score_adj, ..Default::default() };
            merge(&current, &origin, &update(linux))
        };
        assert!(with(0).is_ok() && with(10).is_ok());
        assert!(with(11).unwrap_err().to_string().starts_with("linux.oom_score_adj"));
    }

    #[test]
    fn an_update_without_limits_is_refused() {
        let empty = v1::UpdateContainerResourcesRequest::default();
        let outcome = merge(&LinuxResources::default(), &serde_json::Value::Null, &empty);
        assert!(matches!(outcome, Err(Refusal::Invalid { .. })));
    }
}
