//! StartContainer, StopContainer, RemoveContainer, ListContainers, ContainerStatus,
//! ReopenContainerLog.

use std::time::Duration;

use sandbox::model::{ContainerView, Filter};
use tonic::Status;

use super::Runtime;
use crate::convert::{known, status};
use crate::errors::{refusal_status, sandbox_status};
use crate::v1;

impl Runtime {
    pub(super) async fn start_container(
        &self,
        request: v1::StartContainerRequest,
    ) -> Result<v1::StartContainerResponse, Status> {
        self.sandboxes.start_container(&request.container_id).await.map_err(sandbox_status)?;
        Ok(v1::StartContainerResponse {})
    }

    /// `timeout` is the grace in seconds; none or less means: kill at once.
    pub(super) async fn stop_container(
        &self,
        request: v1::StopContainerRequest,
    ) -> Result<v1::StopContainerResponse, Status> {
        let grace = Duration::from_secs(u64::try_from(request.timeout).unwrap_or(0));
        match self.sandboxes.stop_container(&request.container_id, grace).await {
            Ok(()) | Err(sandbox::Error::NotFound { .. }) => Ok(v1::StopContainerResponse {}),
            Err(error) => Err(sandbox_status(error)),
        }
    }

    pub(super) async fn remove_container(
        &self,
        request: v1::RemoveContainerRequest,
    ) -> Result<v1::RemoveContainerResponse, Status> {
        match self.sandboxes.remove_container(&request.container_id).await {
            Ok(()) | Err(sandbox::Error::NotFound { .. }) => Ok(v1::RemoveContainerResponse {}),
            Err(error) => Err(sandbox_status(error)),
        }
    }

    pub(super) async fn list_containers(
        &self,
        request: v1::ListContainersRequest,
    ) -> Result<v1::ListContainersResponse, Status> {
        Ok(v1::ListContainersResponse { containers: self.container_items(request.filter)? })
    }

    pub(super) fn container_items(
        &self,
        filter: Option<v1::ContainerFilter>,
    ) -> Result<Vec<v1::Container>, Status> {
        let filter = filter.unwrap_or_default();
        let state = filter
            .state
            .map(|value| known::<v1::ContainerState>("filter.state", value.state))
            .transpose()
            .map_err(refusal_status)?;
        let views = self.container_views(filter.id, &filter.pod_sandbox_id, filter.label_selector);
        Ok(views
            .iter()
            .map(status::container_item)
            .filter(|item| state.is_none_or(|state| item.state() == state))
            .collect())
    }

    /// Containers by id, pod and labels; what is empty does not count. A pod that does not exist
    /// has none.
    pub(super) fn container_views(
        &self,
        id: String,
        pod: &str,
        labels: std::collections::BTreeMap<String, String>,
    ) -> Vec<ContainerView> {
        let pod = match pod {
            "" => None,
            given => match self.sandboxes.pod(given) {
                Ok(view) => Some(view.id),
                Err(_) => return vec![],
            },
        };
        let id = Some(id).filter(|id| !id.is_empty());
        self.sandboxes.containers(&Filter { id, pod, labels })
    }

    pub(super) async fn container_status(
        &self,
        request: v1::ContainerStatusRequest,
    ) -> Result<v1::ContainerStatusResponse, Status> {
        let view = self.sandboxes.container(&request.container_id).map_err(sandbox_status)?;
        let info = if request.verbose {
            let vmm_pid = self.sandboxes.pod(&view.pod).ok().and_then(|pod| pod.vmm_pid);
            status::container_info(&view, vmm_pid)
        } else {
            Default::default()
        };
        Ok(v1::ContainerStatusResponse { status: Some(self.status_of(&view)), info })
    }

    pub(super) fn status_of(&self, view: &ContainerView) -> v1::ContainerStatus {
        // The digest in a registry says more than our own id; without it the id has to do.
        let image_ref = self
            .images
            .image(&view.spec.image_id)
            .and_then(|image| image.repo_digests.first().cloned())
            .unwrap_or_else(|| view.spec.image_id.clone());
        status::container_status(view, image_ref)
    }

    /// Of all containers of a pod.
    pub(super) fn statuses_of(&self, pod: &str) -> Vec<v1::ContainerStatus> {
        let views = self.container_views(String::new(), pod, Default::default());
        views.iter().map(|view| self.status_of(view)).collect()
    }

    pub(super) async fn reopen_container_log(
        &self,
        request: v1::ReopenContainerLogRequest,
    ) -> Result<v1::ReopenContainerLogResponse, Status> {
        self.sandboxes.reopen_log(&request.container_id).await.map_err(sandbox_status)?;
        Ok(v1::ReopenContainerLogResponse {})
    }
}
