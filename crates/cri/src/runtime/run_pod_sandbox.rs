//! RunPodSandbox.

use tonic::Status;

use super::Runtime;
use crate::convert::resources::{Size, with_open_limits};
use crate::convert::{Refusal, pod};
use crate::errors::{refusal_status, sandbox_status};
use crate::v1;

impl Runtime {
    pub(super) async fn run_pod_sandbox(
        &self,
        request: v1::RunPodSandboxRequest,
    ) -> Result<v1::RunPodSandboxResponse, Status> {
        let config = request.config.ok_or_else(|| {
            refusal_status(Refusal::invalid("config.metadata", "the request holds no config"))
        })?;
        let mut spec = pod::to_spec(&config, &request.runtime_handler, &self.host, &self.config)
            .map_err(refusal_status)?;
        let sizing = self.sandboxes.pod_sizing(&spec.cgroup_parent).await;
        let size = Size { vcpus: spec.vcpus, memory_mib: spec.memory_mib };
        let (size, cpu) = with_open_limits(size, spec.cpu, sizing, self.host.cpus);
        (spec.vcpus, spec.memory_mib, spec.cpu) = (size.vcpus, size.memory_mib, cpu);
        let pod_sandbox_id = self.sandboxes.run_pod(spec).await.map_err(sandbox_status)?;
        Ok(v1::RunPodSandboxResponse { pod_sandbox_id })
    }
}
