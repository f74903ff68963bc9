//! RuntimeService: one call per file; this module has the table of calls.

mod containers;
mod conversions;
mod create_container;
mod events;
mod exec_sync;
mod pods;
mod run_pod_sandbox;
mod stats;
mod status;
mod streaming;
mod update_container_resources;
mod update_pod_sandbox_resources;
mod update_runtime_config;

use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;

use ::streaming::Server;
use async_trait::async_trait;
use futures_util::Stream;
use image::Images;
use sandbox::Sandboxes;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::convert::pod::Host;
use crate::errors::unimplemented;
use crate::v1;
use conversions::Conversions;

/// Reasons why the node cannot run pods, for Status.
#[async_trait]
pub trait Health: Send + Sync {
    /// Whether VMs can be run here.
    async fn runtime(&self) -> Option<String>;
    /// Whether pods can be given a network.
    async fn network(&self) -> Option<String>;
    /// Records of networks that cannot be read, for people.
    async fn damaged_networks(&self) -> Vec<String> {
        Vec::new()
    }
    /// Facts for verbose status.
    fn facts(&self) -> serde_json::Value;
}

/// The service. A cheap handle.
#[derive(Clone)]
pub struct Runtime {
    pub(crate) sandboxes: Sandboxes,
    pub(crate) images: Images,
    pub(crate) health: Arc<dyn Health>,
    pub(crate) config: Arc<Config>,
    pub(crate) host: Arc<Host>,
    /// Folder of images and writable layers.
    pub(crate) storage: PathBuf,
    pub(crate) streams: Arc<Server>,
    /// Ends streamed replies without end.
    pub(crate) stopping: CancellationToken,
    conversions: Conversions,
}

impl Runtime {
    pub fn new(
        sandboxes: Sandboxes,
        images: Images,
        health: Arc<dyn Health>,
        config: Config,
        storage: PathBuf,
        streams: Server,
    ) -> Self {
        let host = Arc::new(Host::here());
        let (config, streams) = (Arc::new(config), Arc::new(streams));
        let (stopping, conversions) = (CancellationToken::new(), Conversions::default());
        Self { sandboxes, images, health, config, host, storage, streams, stopping, conversions }
    }
}

pub(crate) type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

/// Items a message of a streamed list; a thousand pods fit well into the message limit.
const PAGE: usize = 500;

/// A list in pages, for the streaming verbs.
pub(crate) fn paged<I, M>(items: Vec<I>, message: fn(Vec<I>) -> M) -> Streamed<M>
where
    I: Send + 'static,
    M: Send + 'static,
{
    let mut items = items.into_iter();
    let pages = std::iter::from_fn(move || {
        let page: Vec<I> = items.by_ref().take(PAGE).collect();
        (!page.is_empty()).then(|| Ok(message(page)))
    });
    Box::pin(tokio_stream::iter(pages))
}

/// What `async_trait` makes of a method's result; it does not look into macros.
type Reply<'a, T> = Pin<Box<dyn Future<Output = Result<Response<T>, Status>> + Send + 'a>>;

/// Implemented calls: `name(request type) -> reply type`, each implemented by the method of the
/// same name.
macro_rules! verbs {
    ($($verb:ident($request:ident) -> $reply:ident;)*) => {
        $(
            fn $verb<'a, 'b>(
                &'a self,
                request: Request<v1::$request>,
            ) -> Reply<'b, v1::$reply>
            where
                'a: 'b,
            {
                Box::pin(async move {
                    Runtime::$verb(self, request.into_inner()).await.map(Response::new)
                })
            }
        )*
    };
}

/// Calls that are not implemented, each with its error message.
macro_rules! unsupported {
    ($($verb:ident($request:ident) -> $reply:ident: $sentence:literal;)*) => {
        $(
            fn $verb<'a, 'b>(&'a self, _: Request<v1::$request>) -> Reply<'b, v1::$reply>
            where
                'a: 'b,
            {
                Box::pin(async { Err(unimplemented($sentence)) })
            }
        )*
    };
}

#[async_trait]
impl v1::runtime_service_server::RuntimeService for Runtime {
    verbs! {
        version(VersionRequest) -> VersionResponse;
        status(StatusRequest) -> StatusResponse;
        runtime_config(RuntimeConfigRequest) -> RuntimeConfigResponse;
        run_pod_sandbox(RunPodSandboxRequest) -> RunPodSandboxResponse;
        stop_pod_sandbox(StopPodSandboxRequest) -> StopPodSandboxResponse;
        remove_pod_sandbox(RemovePodSandboxRequest) -> RemovePodSandboxResponse;
        pod_sandbox_status(PodSandboxStatusRequest) -> PodSandboxStatusResponse;
        list_pod_sandbox(ListPodSandboxRequest) -> ListPodSandboxResponse;
        create_container(CreateContainerRequest) -> CreateContainerResponse;
        start_container(StartContainerRequest) -> StartContainerResponse;
        stop_container(StopContainerRequest) -> StopContainerResponse;
        remove_container(RemoveContainerRequest) -> RemoveContainerResponse;
        list_containers(ListContainersRequest) -> ListContainersResponse;
        container_status(ContainerStatusRequest) -> ContainerStatusResponse;
        update_container_resources(UpdateContainerResourcesRequest)
            -> UpdateContainerResourcesResponse;
        reopen_container_log(ReopenContainerLogRequest) -> ReopenContainerLogResponse;
        exec_sync(ExecSyncRequest) -> ExecSyncResponse;
        exec(ExecRequest) -> ExecResponse;
        attach(AttachRequest) -> AttachResponse;
        port_forward(PortForwardRequest) -> PortForwardResponse;
        update_runtime_config(UpdateRuntimeConfigRequest) -> UpdateRuntimeConfigResponse;
        update_pod_sandbox_resources(UpdatePodSandboxResourcesRequest)
            -> UpdatePodSandboxResourcesResponse;
        container_stats(ContainerStatsRequest) -> ContainerStatsResponse;
        list_container_stats(ListContainerStatsRequest) -> ListContainerStatsResponse;
        pod_sandbox_stats(PodSandboxStatsRequest) -> PodSandboxStatsResponse;
        list_pod_sandbox_stats(ListPodSandboxStatsRequest) -> ListPodSandboxStatsResponse;
        list_metric_descriptors(ListMetricDescriptorsRequest) -> ListMetricDescriptorsResponse;
        list_pod_sandbox_metrics(ListPodSandboxMetricsRequest) -> ListPodSandboxMetricsResponse;
    }

    unsupported! {
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse:
            "nacelle cannot checkpoint a container: it lives inside a VM";
        checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse:
            "nacelle cannot checkpoint a pod yet";
        restore_pod(RestorePodRequest) -> RestorePodResponse:
            "nacelle cannot restore a pod from a checkpoint yet";
    }

    type StreamPodSandboxesStream = Streamed<v1::StreamPodSandboxesResponse>;

    async fn stream_pod_sandboxes(
        &self,
        request: Request<v1::StreamPodSandboxesRequest>,
    ) -> Result<Response<Self::StreamPodSandboxesStream>, Status> {
        let items = self.pod_items(request.into_inner().filter)?;
        Ok(Response::new(paged(items, |pod_sandboxes| v1::StreamPodSandboxesResponse {
            pod_sandboxes,
        })))
    }

    type StreamContainersStream = Streamed<v1::StreamContainersResponse>;

    async fn stream_containers(
        &self,
        request: Request<v1::StreamContainersRequest>,
    ) -> Result<Response<Self::StreamContainersStream>, Status> {
        let items = self.container_items(request.into_inner().filter)?;
        Ok(Response::new(paged(items, |containers| v1::StreamContainersResponse { containers })))
    }

    type StreamContainerStatsStream = Streamed<v1::StreamContainerStatsResponse>;

    async fn stream_container_stats(
        &self,
        request: Request<v1::StreamContainerStatsRequest>,
    ) -> Result<Response<Self::StreamContainerStatsStream>, Status> {
        let items = self.all_container_stats(request.into_inner().filter).await?;
        Ok(Response::new(paged(items, |container_stats| v1::StreamContainerStatsResponse {
            container_stats,
        })))
    }

    type StreamPodSandboxStatsStream = Streamed<v1::StreamPodSandboxStatsResponse>;

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<v1::StreamPodSandboxStatsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxStatsStream>, Status> {
        let items = self.all_pod_stats(request.into_inner().filter).await?;
        Ok(Response::new(paged(items, |pod_sandbox_stats| v1::StreamPodSandboxStatsResponse {
            pod_sandbox_stats,
        })))
    }

    type StreamPodSandboxMetricsStream = Streamed<v1::StreamPodSandboxMetricsResponse>;

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<v1::StreamPodSandboxMetricsRequest>,
    ) -> Result<Response<Self::StreamPodSandboxMetricsStream>, Status> {
        let items = self.all_metrics().await;
        Ok(Response::new(paged(items, |pod_sandbox_metrics| v1::StreamPodSandboxMetricsResponse {
            pod_sandbox_metrics,
        })))
    }

    type GetContainerEventsStream = Streamed<v1::ContainerEventResponse>;

    async fn get_container_events(
        &self,
        _: Request<v1::GetEventsRequest>,
    ) -> Result<Response<Self::GetContainerEventsStream>, Status> {
        Ok(Response::new(self.container_events()))
    }
}

#[cfg(test)]
mod tests {
    use futures_util::StreamExt;

    use super::*;

    #[tokio::test]
    async fn a_long_list_is_streamed_in_pages() {
        let items: Vec<usize> = (0..PAGE + 1).collect();
        let pages: Vec<usize> = paged(items, |page| page.len()).map(Result::unwrap).collect().await;
        assert_eq!(pages, [PAGE, 1]);
        assert_eq!(paged(Vec::<usize>::new(), |page| page.len()).count().await, 0);
    }
}
