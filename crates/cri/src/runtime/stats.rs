//! ContainerStats, PodSandboxStats, their listings, and metrics: what the guests have last reported,
//! from a cache.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures_util::future::join_all;
use sandbox::model::{ContainerState, ContainerView, Filter, PodState, PodView};
use sandbox::stats::PodStatsView;
use tonic::Status;

use super::Runtime;
use crate::convert::{metrics, stats};
use crate::errors::sandbox_status;
use crate::v1;

/// Pods and containers younger than this may not be in the cache yet, and are measured now. For others no
/// listing calls a guest.
const UNCACHED_AGE: Duration = Duration::from_secs(15);

fn is_new(since: Option<SystemTime>) -> bool {
    since.and_then(|since| since.elapsed().ok()).is_some_and(|age| age < UNCACHED_AGE)
}

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
        let by_pod = by_pod(views);
        // A pod that cannot be measured now is listed without numbers; the others keep theirs.
        let mut cache = self.sandboxes.all_stats();
        let measured = by_pod.iter().map(|(pod, views)| self.refreshed(cache.remove(pod), views));
        let measured = join_all(measured).await;
        let mountpoint = self.mountpoint();
        let listed = by_pod.values().zip(&measured).flat_map(|(views, measured)| {
            views.iter().map(|view| of_container(view, measured.as_deref(), &mountpoint))
        });
        Ok(listed.collect())
    }

    pub(super) async fn pod_sandbox_stats(
        &self,
        request: v1::PodSandboxStatsRequest,
    ) -> Result<v1::PodSandboxStatsResponse, Status> {
        let view = self.sandboxes.pod(&request.pod_sandbox_id).map_err(sandbox_status)?;
        let running = self.running_in(&view.id);
        let measured = self.sandboxes.pod_stats(&view.id).await.map_err(sandbox_status)?;
        let measured = Arc::new(measured);
        let refreshed = self.refreshed(Some(measured.clone()), &running).await;
        let stats = self.pod_usage(&view, &running, &refreshed.unwrap_or(measured));
        Ok(v1::PodSandboxStatsResponse { stats: Some(stats) })
    }

    pub(super) async fn list_pod_sandbox_stats(
        &self,
        request: v1::ListPodSandboxStatsRequest,
    ) -> Result<v1::ListPodSandboxStatsResponse, Status> {
        Ok(v1::ListPodSandboxStatsResponse { stats: self.all_pod_stats(request.filter).await? })
    }

    /// Of pods that are ready and have been measured, as containerd does: a kubelet expects a measurement
    /// of each pod in the list.
    pub(super) async fn all_pod_stats(
        &self,
        filter: Option<v1::PodSandboxStatsFilter>,
    ) -> Result<Vec<v1::PodSandboxStats>, Status> {
        let filter = filter.unwrap_or_default();
        let filter = Filter {
            id: Some(filter.id).filter(|id| !id.is_empty()),
            pod: None,
            labels: filter.label_selector,
        };
        let pods = self.measured_pods(&filter).await;
        let usage = |(view, running, measured): &Measured| self.pod_usage(view, running, measured);
        Ok(pods.iter().map(usage).collect())
    }

    pub(super) async fn list_metric_descriptors(
        &self,
        _: v1::ListMetricDescriptorsRequest,
    ) -> Result<v1::ListMetricDescriptorsResponse, Status> {
        Ok(v1::ListMetricDescriptorsResponse { descriptors: metrics::descriptors() })
    }

    pub(super) async fn list_pod_sandbox_metrics(
        &self,
        _: v1::ListPodSandboxMetricsRequest,
    ) -> Result<v1::ListPodSandboxMetricsResponse, Status> {
        Ok(v1::ListPodSandboxMetricsResponse { pod_metrics: self.all_metrics().await })
    }

    /// Of pods that are up and have been measured.
    pub(super) async fn all_metrics(&self) -> Vec<v1::PodSandboxMetrics> {
        let pods = self.measured_pods(&Filter::default()).await;
        let metrics_of =
            |(view, running, measured): &Measured| metrics::of_pod(view, measured, running);
        pods.iter().map(metrics_of).collect()
    }

    async fn measured_pods(&self, filter: &Filter) -> Vec<Measured> {
        let mut views = self.sandboxes.pods(filter);
        views.retain(|view| view.state == PodState::Ready);
        let mut cache = self.sandboxes.all_stats();
        // Of all pods at once: a search per pod would take quadratic time.
        let mut by_pod = by_pod(self.running_in(""));
        let measured = join_all(views.into_iter().map(|view| {
            let cached = cache.remove(&view.id);
            let running = by_pod.remove(&view.id).unwrap_or_default();
            async {
                let mut measured = self.refreshed(cached, &running).await;
                if measured.is_none() && is_new(Some(view.created_at)) {
                    measured = self.measured_now(&view.id).await;
                }
                Some((view, running, measured?))
            }
        }));
        measured.await.into_iter().flatten().collect()
    }

    /// None, and a log line, if the pod cannot be measured; others are listed.
    async fn measured_now(&self, pod: &str) -> Option<Arc<PodStatsView>> {
        match self.sandboxes.pod_stats(pod).await {
            Ok(measured) => Some(Arc::new(measured)),
            Err(error) => {
                log_not_measured("pod", pod, &error);
                None
            }
        }
    }

    /// Running containers of a pod; empty: of all pods.
    fn running_in(&self, pod: &str) -> Vec<ContainerView> {
        let mut views = self.container_views(String::new(), pod, BTreeMap::new());
        views.retain(|view| view.state == ContainerState::Running);
        views
    }

    /// The cached measurement of a pod; a new one if a container has just started.
    async fn refreshed(
        &self,
        cached: Option<Arc<PodStatsView>>,
        running: &[ContainerView],
    ) -> Option<Arc<PodStatsView>> {
        let known = |view: &ContainerView| {
            cached.as_ref().is_some_and(|pod| pod.containers.iter().any(|c| c.id == view.id))
        };
        let missing = running.iter().find(|view| is_new(view.started_at) && !known(view));
        let Some(view) = missing else { return cached };
        // Fills the cache.
        if let Err(error) = self.sandboxes.container_stats(&view.id).await {
            log_not_measured("container", &view.id, &error);
        }
        self.measured_now(&view.pod).await.or(cached)
    }

    fn pod_usage(
        &self,
        view: &PodView,
        running: &[ContainerView],
        measured: &PodStatsView,
    ) -> v1::PodSandboxStats {
        let mountpoint = self.mountpoint();
        let usage =
            running.iter().map(|container| of_container(container, Some(measured), &mountpoint));
        stats::pod(view, measured, usage.collect())
    }

    /// The file system that writable layers are on.
    fn mountpoint(&self) -> String {
        self.storage.to_string_lossy().into_owned()
    }
}

/// A pod, its containers that run, and what was measured of them.
type Measured = (PodView, Vec<ContainerView>, Arc<PodStatsView>);

/// Pods that start, stop or answer late are expected; other errors are warnings.
fn log_not_measured(what: &str, id: &str, error: &sandbox::Error) {
    use sandbox::Error::{Deadline, FailedPrecondition, NotFound, Unavailable};
    match error {
        Deadline { .. } | FailedPrecondition { .. } | NotFound { .. } | Unavailable { .. } => {
            tracing::debug!(what, id, %error, "not measured");
        }
        _ => tracing::warn!(what, id, %error, "cannot be measured"),
    }
}

fn by_pod(views: Vec<ContainerView>) -> BTreeMap<String, Vec<ContainerView>> {
    let mut by_pod: BTreeMap<String, Vec<ContainerView>> = BTreeMap::new();
    for view in views {
        by_pod.entry(view.pod.clone()).or_default().push(view);
    }
    by_pod
}

fn of_container(
    view: &ContainerView,
    measured: Option<&PodStatsView>,
    mountpoint: &str,
) -> v1::ContainerStats {
    let known = measured.and_then(|pod| pod.containers.iter().find(|known| known.id == view.id));
    stats::container(view, known, mountpoint)
}
