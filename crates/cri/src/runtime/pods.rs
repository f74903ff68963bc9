//! StopPodSandbox, RemovePodSandbox, PodSandboxStatus, ListPodSandbox.

use sandbox::model::Filter;
use tonic::Status;

use super::Runtime;
use crate::convert::time::nanos;
use crate::convert::{known, status};
use crate::errors::{refusal_status, sandbox_status};
use crate::v1;

impl Runtime {
    /// An unknown id is no error: a kubelet repeats its calls until they succeed.
    pub(super) async fn stop_pod_sandbox(
        &self,
        request: v1::StopPodSandboxRequest,
    ) -> Result<v1::StopPodSandboxResponse, Status> {
        match self.sandboxes.stop_pod(&request.pod_sandbox_id).await {
            Ok(()) | Err(sandbox::Error::NotFound { .. }) => Ok(v1::StopPodSandboxResponse {}),
            Err(error) => Err(sandbox_status(error)),
        }
    }

    pub(super) async fn remove_pod_sandbox(
        &self,
        request: v1::RemovePodSandboxRequest,
    ) -> Result<v1::RemovePodSandboxResponse, Status> {
        match self.sandboxes.remove_pod(&request.pod_sandbox_id).await {
            Ok(()) | Err(sandbox::Error::NotFound { .. }) => Ok(v1::RemovePodSandboxResponse {}),
            Err(error) => Err(sandbox_status(error)),
        }
    }

    pub(super) async fn pod_sandbox_status(
        &self,
        request: v1::PodSandboxStatusRequest,
    ) -> Result<v1::PodSandboxStatusResponse, Status> {
        let view = self.sandboxes.pod(&request.pod_sandbox_id).map_err(sandbox_status)?;
        Ok(v1::PodSandboxStatusResponse {
            status: Some(status::pod_status(&view)),
            info: if request.verbose { status::pod_info(&view) } else { Default::default() },
            // A kubelet that listens to container events takes these, and asks for no others.
            containers_statuses: self.statuses_of(&view.id),
            timestamp: nanos(std::time::SystemTime::now()),
        })
    }

    pub(super) async fn list_pod_sandbox(
        &self,
        request: v1::ListPodSandboxRequest,
    ) -> Result<v1::ListPodSandboxResponse, Status> {
        Ok(v1::ListPodSandboxResponse { items: self.pod_items(request.filter)? })
    }

    pub(super) fn pod_items(
        &self,
        filter: Option<v1::PodSandboxFilter>,
    ) -> Result<Vec<v1::PodSandbox>, Status> {
        let filter = filter.unwrap_or_default();
        let state = filter
            .state
            .map(|value| known::<v1::PodSandboxState>("filter.state", value.state))
            .transpose()
            .map_err(refusal_status)?;
        let views = self.sandboxes.pods(&Filter {
            id: Some(filter.id).filter(|id| !id.is_empty()),
            pod: None,
            labels: filter.label_selector,
        });
        Ok(views
            .iter()
            .map(status::pod_item)
            .filter(|item| state.is_none_or(|state| item.state() == state))
            .collect())
    }
}
