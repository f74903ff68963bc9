//! UpdatePodSandboxResources: the size of a pod's VM, and its share of the host's CPUs.

use sandbox::model::{PodResources, PodSizing};
use tonic::Status;

use super::Runtime;
use crate::convert::Refusal;
use crate::convert::resources::{Size, cpu_limits, vm_size, with_open_limits};
use crate::errors::{refusal_status, sandbox_status};
use crate::v1;

impl Runtime {
    pub(super) async fn update_pod_sandbox_resources(
        &self,
        request: v1::UpdatePodSandboxResourcesRequest,
    ) -> Result<v1::UpdatePodSandboxResourcesResponse, Status> {
        let view = self.sandboxes.pod(&request.pod_sandbox_id).map_err(sandbox_status)?;
        let sizing = self.sandboxes.pod_sizing(&view.spec.cgroup_parent).await;
        let change =
            change(&request, sizing, self.host.cpus, &self.config).map_err(refusal_status)?;
        if change != PodResources::default() {
            self.sandboxes.update_pod(&view.id, change).await.map_err(sandbox_status)?;
        }
        Ok(v1::UpdatePodSandboxResourcesResponse {})
    }
}

/// What the request leaves at its zero stays as it is.
fn change(
    request: &v1::UpdatePodSandboxResourcesRequest,
    sizing: PodSizing,
    host_cpus: usize,
    config: &crate::Config,
) -> Result<PodResources, Refusal> {
    let (resources, overhead) = (request.resources.as_ref(), request.overhead.as_ref());
    let size = vm_size(resources, overhead, host_cpus, config)?;
    let (Size { vcpus, memory_mib }, cpu) =
        with_open_limits(size, cpu_limits(resources, overhead), sizing, host_cpus);
    let cpu = Some(cpu).filter(|cpu| *cpu != Default::default());
    Ok(PodResources { vcpus, memory_mib, cpu })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_update_is_converted_like_the_first_size() {
        let limits = v1::LinuxContainerResources {
            cpu_quota: 150_000,
            cpu_period: 100_000,
            memory_limit_in_bytes: 512 << 20,
            ..Default::default()
        };
        let request =
            v1::UpdatePodSandboxResourcesRequest { resources: Some(limits), ..Default::default() };
        let config = crate::Config::default();
        let change = change(&request, PodSizing::default(), 8, &config).unwrap();
        assert_eq!(change.vcpus, Some(2));
        assert_eq!(change.memory_mib, Some(512 + config.guest_overhead_mib));
        assert_eq!(change.cpu.unwrap().quota_us, Some(150_000));
    }

    #[test]
    fn an_empty_update_changes_nothing() {
        let nothing = v1::UpdatePodSandboxResourcesRequest::default();
        let found = change(&nothing, PodSizing::default(), 8, &crate::Config::default()).unwrap();
        assert_eq!(found, PodResources::default());
        let wrong = v1::UpdatePodSandboxResourcesRequest {
            resources: Some(v1::LinuxContainerResources { cpu_quota: -7, ..Default::default() }),
            ..Default::default()
        };
        assert!(change(&wrong, PodSizing::default(), 8, &crate::Config::default()).is_err());
    }
}
