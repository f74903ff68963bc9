//! RuntimeService: one call per file; this module has the table of calls.

mod containers;
mod conversions;
mod create_container;
mod events;
mod exec_sync;
mod paged;
mod pods;
mod run_pod_sandbox;
mod stats;
mod status;
mod streamed_lists;
mod streaming;
mod update_container_resources;
mod update_pod_sandbox_resources;
mod update_runtime_config;

use std::path::PathBuf;
use std::sync::Arc;

use ::streaming::Server;
use async_trait::async_trait;
use image::Images;
use sandbox::Sandboxes;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use crate::config::Config;
use crate::convert::pod::Host;
use crate::errors::unimplemented;
use crate::v1;
use conversions::Conversions;
pub(crate) use paged::{Streamed, paged};

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

/// Implements the service. Each call is implemented by the method of the same name: of those in the
/// first group `name(request type) -> reply type`, of those in the second with a stream of replies. Those
/// in the third group are not implemented and return their error message.
macro_rules! service {
    (
        replies { $($call:ident($request:ident) -> $reply:ident;)* }
        streams { $($stream:ident: $streaming:ident($filter:ident) -> $message:ident;)* }
        unsupported { $($missing:ident($unread:ident) -> $none:ident: $sentence:literal;)* }
    ) => {
        #[async_trait]
        impl v1::runtime_service_server::RuntimeService for Runtime {
            $(
                async fn $call(
                    &self,
                    request: Request<v1::$request>,
                ) -> Result<Response<v1::$reply>, Status> {
                    Runtime::$call(self, request.into_inner()).await.map(Response::new)
                }
            )*
            $(
                type $stream = Streamed<v1::$message>;

                async fn $streaming(
                    &self,
                    request: Request<v1::$filter>,
                ) -> Result<Response<Self::$stream>, Status> {
                    Runtime::$streaming(self, request.into_inner()).await.map(Response::new)
                }
            )*
            $(
                async fn $missing(
                    &self,
                    _: Request<v1::$unread>,
                ) -> Result<Response<v1::$none>, Status> {
                    Err(unimplemented($sentence))
                }
            )*
        }
    };
}

service! {
    replies {
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
    streams {
        StreamPodSandboxesStream: stream_pod_sandboxes(StreamPodSandboxesRequest)
            -> StreamPodSandboxesResponse;
        StreamContainersStream: stream_containers(StreamContainersRequest)
            -> StreamContainersResponse;
        StreamContainerStatsStream: stream_container_stats(StreamContainerStatsRequest)
            -> StreamContainerStatsResponse;
        StreamPodSandboxStatsStream: stream_pod_sandbox_stats(StreamPodSandboxStatsRequest)
            -> StreamPodSandboxStatsResponse;
        StreamPodSandboxMetricsStream: stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest)
            -> StreamPodSandboxMetricsResponse;
        GetContainerEventsStream: get_container_events(GetEventsRequest)
            -> ContainerEventResponse;
    }
    unsupported {
        checkpoint_container(CheckpointContainerRequest) -> CheckpointContainerResponse:
            "nacelle cannot checkpoint a container: it lives inside a VM";
        checkpoint_pod(CheckpointPodRequest) -> CheckpointPodResponse:
            "nacelle cannot checkpoint a pod yet";
        restore_pod(RestorePodRequest) -> RestorePodResponse:
            "nacelle cannot restore a pod from a checkpoint yet";
    }
}
