//! StreamPodSandboxes, StreamContainers, StreamContainerStats, StreamPodSandboxStats,
//! StreamPodSandboxMetrics: the lists of the calls without `Stream`, in several messages.

use tonic::Status;

use super::Runtime;
use super::paged::{Streamed, paged};
use crate::v1;

impl Runtime {
    pub(super) async fn stream_pod_sandboxes(
        &self,
        request: v1::StreamPodSandboxesRequest,
    ) -> Result<Streamed<v1::StreamPodSandboxesResponse>, Status> {
        let items = self.pod_items(request.filter)?;
        Ok(paged(items, |pod_sandboxes| v1::StreamPodSandboxesResponse { pod_sandboxes }))
    }

    pub(super) async fn stream_containers(
        &self,
        request: v1::StreamContainersRequest,
    ) -> Result<Streamed<v1::StreamContainersResponse>, Status> {
        let items = self.container_items(request.filter)?;
        Ok(paged(items, |containers| v1::StreamContainersResponse { containers }))
    }

    pub(super) async fn stream_container_stats(
        &self,
        request: v1::StreamContainerStatsRequest,
    ) -> Result<Streamed<v1::StreamContainerStatsResponse>, Status> {
        let items = self.all_container_stats(request.filter).await?;
        Ok(paged(items, |container_stats| v1::StreamContainerStatsResponse { container_stats }))
    }

    pub(super) async fn stream_pod_sandbox_stats(
        &self,
        request: v1::StreamPodSandboxStatsRequest,
    ) -> Result<Streamed<v1::StreamPodSandboxStatsResponse>, Status> {
        let items = self.all_pod_stats(request.filter).await?;
        Ok(paged(items, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse {
            pod_sandbox_stats,
        }))
    }

    pub(super) async fn stream_pod_sandbox_metrics(
        &self,
        _: v1::StreamPodSandboxMetricsRequest,
    ) -> Result<Streamed<v1::StreamPodSandboxMetricsResponse>, Status> {
        let items = self.all_metrics().await;
        Ok(paged(items, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        }))
    }
}
