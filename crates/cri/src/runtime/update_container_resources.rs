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
        let limits = merge(&view.resources, &request).map_err(refusal_status)?;
        self.sandboxes.update_container(&view.id, limits).await.map_err(sandbox_status)?;
        Ok(v1::UpdateContainerResourcesResponse {})
    }
}

/// An OOM score is not a limit of a cgroup: it stays what it was, as with containerd. A kubelet
/// states it anew with every resize, and computes it from the memory that it has just changed.
fn merge(
    current: &LinuxResources,
    request: &v1::UpdateContainerResourcesRequest,
) -> Result<LinuxResources, Refusal> {
    if request.windows.is_some() {
        return Err(Refusal::unsupported("windows", "this is a Linux node"));
    }
    let linux = request
        .linux
        .as_ref()
        .ok_or_else(|| Refusal::invalid("linux", "missing: say which limits to change"))?;
    let update = resources::to_oci(linux).map_err(|refusal| refusal.in_field("linux"))?;
    Ok(resources::overlay(current, &update))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn update(linux: v1::LinuxContainerResources) -> v1::UpdateContainerResourcesRequest {
        v1::UpdateContainerResourcesRequest { linux: Some(linux), ..Default::default() }
    }

    #[test]
    fn an_oom_score_in_an_update_is_ignored() {
        let linux = v1::LinuxContainerResources {
            oom_score_adj: 11,
            memory_limit_in_bytes: 1 << 20,
            ..Default::default()
        };
        let merged = merge(&LinuxResources::default(), &update(linux)).unwrap();
        assert_eq!(merged.memory().unwrap().limit(), Some(1 << 20));
    }

    #[test]
    fn an_update_without_limits_is_refused() {
        let empty = v1::UpdateContainerResourcesRequest::default();
        let outcome = merge(&LinuxResources::default(), &empty);
        assert!(matches!(outcome, Err(Refusal::Invalid { .. })));
    }
}
