//! ContainerStats, ListContainerStats, PodSandboxStats, ListPodSandboxStats: what the guests have
//! last reported, from a cache.

use std::collections::HashMap;

use futures_util::future::join_all;
use sandbox::model::{ContainerState, ContainerView, Filter, PodState, PodView};
use sandbox::stats::{ContainerStatsView, PodStatsView};
use tonic::Status;

use super::Runtime;
use crate::convert::stats;
use crate::errors::sandbox_status;
use crate::v1;

impl Runtime {
    pub(super) async fn container_stats(
        &self,
        request: v1::ContainerStatsRequest,
    ) -> Result<v1::ContainerStatsResponse, Status> {
        let view = self.sandboxes.container(&request.container_id).map_err(sandbox_status)?;
        let measured = match view.state {
            ContainerState::Running => {
                Some(self.sandboxes.container_stats(&view.id).await.map_err(sandbox_status)?)
            }
            _ => None,
        };
        let stats = stats::container(&view, measured.as_ref(), &self.mountpoint());
        Ok(v1::ContainerStatsResponse { stats: Some(stats) })
    }

    pub(super) async fn list_container_stats(
        &self,
        request: v1::ListContainerStatsRequest,
    ) -> Result<v1::ListContainerStatsResponse, Status> {
        Ok(v1::ListContainerStatsResponse {
            stats: self.all_container_stats(request.filter).await?,
        })
    }

    /// Running containers only, as containerd does: the others use nothing.
    pub(super) async fn all_container_stats(
        &self,
        filter: Option<v1::ContainerStatsFilter>,
    ) -> Result<Vec<v1::ContainerStats>, Status> {
        let filter = filter.unwrap_or_default();
        let mut views =
            self.container_views(filter.id, &filter.pod_sandbox_id, filter.label_selector);
        views.retain(|view| view.state == ContainerState::Running);
        let mut pods: Vec<&str> = views.iter().map(|view| view.pod.as_str()).collect();
        pods.sort_unstable();
        pods.dedup();
        // A pod that cannot be measured now is left out; the others are still worth telling.
        let measured = join_all(pods.into_iter().map(|pod| self.sandboxes.pod_stats(pod))).await;
        let by_id: HashMap<String, ContainerStatsView> = measured
            .into_iter()
            .flatten()
            .flat_map(|pod| pod.containers)
            .map(|container| (container.id.clone(), container))
            .collect();
        let mountpoint = self.mountpoint();
        let listed =
            |view: &ContainerView| stats::container(view, by_id.get(&view.id), &mountpoint);
        Ok(views.iter().map(listed).collect())
    }

    pub(super) async fn pod_sandbox_stats(
        &self,
        request: v1::PodSandboxStatsRequest,
    ) -> Result<v1::PodSandboxStatsResponse, Status> {
        let view = self.sandboxes.pod(&request.pod_sandbox_id).map_err(sandbox_status)?;
        let measured = self.sandboxes.pod_stats(&view.id).await.map_err(sandbox_status)?;
        Ok(v1::PodSandboxStatsResponse { stats: Some(self.pod_usage(&view, Some(&measured))) })
    }

    pub(super) async fn list_pod_sandbox_stats(
        &self,
        request: v1::ListPodSandboxStatsRequest,
    ) -> Result<v1::ListPodSandboxStatsResponse, Status> {
        Ok(v1::ListPodSandboxStatsResponse { stats: self.all_pod_stats(request.filter).await? })
    }

    pub(super) async fn all_pod_stats(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>, Status> {
        let filter = filter.unwrap_or_default();
        let mut views = self.sandboxes.pods(&Filter {
            id: Some(filter.id).filter(|id| !id.is_empty()),
            pod: None,
            labels: filter.label_selector,
        });
        views.retain(|view| view.state == PodState::Ready);
        let measured = join_all(views.iter().map(|view| self.sandboxes.pod_stats(&view.id))).await;
        let listed = views.iter().zip(&measured);
        Ok(listed.map(|(view, stats)| self.pod_usage(view, stats.as_ref().ok())).collect())
    }

    fn pod_usage(&self, view: &PodView, measured: Option<&PodStatsView>) -> v1::PodSandboxStats {
        let mountpoint = self.mountpoint();
        let containers =
            self.container_views(String::new(), &view.id, std::collections::BTreeMap::new());
        let of = |container: &ContainerView| {
            measured.and_then(|pod| pod.containers.iter().find(|known| known.id == container.id))
        };
        let usage = containers
            .iter()
            .filter(|container| container.state == ContainerState::Running)
            .map(|container| stats::container(container, of(container), &mountpoint))
            .collect();
        stats::pod(view, measured, usage)
    }

    /// The file system that writable layers are on.
    fn mountpoint(&self) -> String {
        self.storage.to_string_lossy().into_owned()
    }
}
