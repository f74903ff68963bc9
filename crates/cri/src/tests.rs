//! The services on a real socket, on a node without pods.

use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use hyper_util::rt::TokioIo;
use image::Images;
use sandbox::Sandboxes;
use sandbox::synthetic_pods::EmptyNode;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, service::Routes};

use crate::observe::Observer;
use crate::v1::runtime_service_client::RuntimeServiceClient;
use crate::{Config, Health, Image, Runtime, Shutdown, Streaming, bind_streams, listen, serve, v1};

/// The conditions of [`EmptyNode`].
struct EmptyHealth;

#[async_trait]
impl Health for EmptyHealth {
    async fn runtime(&self) -> Option<String> {
        None
    }

    async fn network(&self) -> Option<String> {
        Some(EmptyNode::NOT_READY.into())
    }

    fn facts(&self) -> serde_json::Value {
        serde_json::json!({ "root": "/somewhere" })
    }
}

#[derive(Debug, Default)]
struct Seen(Mutex<Vec<(&'static str, Code)>>);

impl Observer for Seen {
    fn called(&self, method: &'static str, code: Code, _: Duration) {
        self.0.lock().unwrap().push((method, code));
    }
}

struct Node {
    client: RuntimeServiceClient<Channel>,
    sandboxes: Sandboxes,
    seen: Arc<Seen>,
    stop: tokio::sync::oneshot::Sender<()>,
    server: tokio::task::JoinHandle<Result<(), tonic::transport::Error>>,
    _dir: tempfile::TempDir,
}

impl Node {
    /// None, with a printed SKIP, if the life cycle cannot be opened.
    async fn start() -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let pods = sandbox::Config {
            root: root.join("root"),
            state: root.join("state"),
            ..sandbox::Config::default()
        };
        let opened = Sandboxes::open_with(pods, Arc::new(EmptyNode), Arc::new(EmptyNode)).await;
        let sandboxes = match opened {
            Ok(sandboxes) => sandboxes,
            Err(error @ sandbox::Error::FailedPrecondition { .. }) => {
                eprintln!("SKIP: {error}");
                return None;
            }
            Err(error) => panic!("{error}"),
        };
        let images = image::Config { root: root.join("images"), ..image::Config::default() };
        let images = Images::open(images).await.unwrap();
        let streams = bind_streams(&Streaming::default(), sandboxes.clone()).unwrap();
        let config = Config::default();
        let service = Image::new(images.clone(), sandboxes.clone(), &config);
        let runtime =
            Runtime::new(sandboxes.clone(), images, Arc::new(EmptyHealth), config, root, streams);
        let socket = dir.path().join("cri.sock");
        let listener = listen(&socket).unwrap();
        let (stop, stopped) = tokio::sync::oneshot::channel();
        let shutdown: Shutdown = Box::pin(async {
            let _ = stopped.await;
        });
        let seen = Arc::new(Seen::default());
        let beside = Routes::default();
        let observer = Some(seen.clone() as Arc<dyn Observer>);
        let server = tokio::spawn(serve(listener, runtime, service, beside, observer, shutdown));
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel = Endpoint::from_static("http://node").connect_with_connector(connector).await;
        let client = RuntimeServiceClient::new(channel.unwrap());
        Some(Self { client, sandboxes, seen, stop, server, _dir: dir })
    }
}

fn id() -> String {
    "0123456789abcdef".into()
}

#[tokio::test]
async fn stop_and_remove_of_unknown_ids_succeed() {
    let Some(mut node) = Node::start().await else { return };
    let pod = || v1::StopPodSandboxRequest { pod_sandbox_id: id() };
    node.client.stop_pod_sandbox(pod()).await.unwrap();
    let pod = v1::RemovePodSandboxRequest { pod_sandbox_id: id() };
    node.client.remove_pod_sandbox(pod).await.unwrap();
    let container = v1::StopContainerRequest { container_id: id(), timeout: 0 };
    node.client.stop_container(container).await.unwrap();
    let container = v1::RemoveContainerRequest { container_id: id() };
    node.client.remove_container(container).await.unwrap();
}

#[tokio::test]
async fn calls_with_unknown_ids_fail_with_not_found() {
    let Some(mut node) = Node::start().await else { return };
    let client = &mut node.client;
    let container = v1::ContainerStatusRequest { container_id: id(), verbose: true };
    let mut codes = vec![client.container_status(container).await.unwrap_err().code()];
    let exec = v1::ExecRequest {
        container_id: id(),
        cmd: vec!["true".into()],
        stdout: true,
        ..Default::default()
    };
    codes.push(client.exec(exec).await.unwrap_err().code());
    let attach = v1::AttachRequest { container_id: id(), stdout: true, ..Default::default() };
    codes.push(client.attach(attach).await.unwrap_err().code());
    let forward = v1::PortForwardRequest { pod_sandbox_id: id(), port: vec![80] };
    codes.push(client.port_forward(forward).await.unwrap_err().code());
    let update =
        v1::UpdatePodSandboxResourcesRequest { pod_sandbox_id: id(), ..Default::default() };
    codes.push(client.update_pod_sandbox_resources(update).await.unwrap_err().code());
    let stats = v1::PodSandboxStatsRequest { pod_sandbox_id: id() };
    codes.push(client.pod_sandbox_stats(stats).await.unwrap_err().code());
    assert!(codes.iter().all(|code| *code == Code::NotFound), "{codes:?}");
}

#[tokio::test]
async fn the_status_reports_conditions_and_features() {
    let Some(mut node) = Node::start().await else { return };
    let request = v1::StatusRequest { verbose: true };
    let reply = node.client.status(request).await.unwrap().into_inner();
    let conditions = reply.status.unwrap().conditions;
    let of = |kind: &str| conditions.iter().find(|found| found.r#type == kind).unwrap();
    assert!(of("RuntimeReady").status);
    assert_eq!(of("NetworkReady").message, "no CNI configuration");
    let features = reply.runtime_handlers[0].features.unwrap();
    assert!(reply.runtime_handlers[0].name.is_empty());
    assert!(features.recursive_read_only_mounts && features.user_namespaces);
    assert!(reply.features.unwrap().supplemental_groups_policy);
    assert!(reply.info["config"].contains("/somewhere"));
}

#[tokio::test]
async fn invalid_requests_are_rejected_with_the_field() {
    let Some(mut node) = Node::start().await else { return };
    let client = &mut node.client;
    let run = v1::RunPodSandboxRequest::default();
    let refused = client.run_pod_sandbox(run).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    assert!(refused.message().contains("config"), "{}", refused.message());
    let state = v1::PodSandboxStateValue { state: 99 };
    let filter = v1::PodSandboxFilter { state: Some(state), ..Default::default() };
    let list = v1::ListPodSandboxRequest { filter: Some(filter) };
    assert_eq!(client.list_pod_sandbox(list).await.unwrap_err().code(), Code::InvalidArgument);
    let network = v1::NetworkConfig { pod_cidr: "all of them".into() };
    let config = v1::RuntimeConfig { network_config: Some(network) };
    let update = v1::UpdateRuntimeConfigRequest { runtime_config: Some(config) };
    let refused = client.update_runtime_config(update).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    let checkpoint = v1::CheckpointContainerRequest::default();
    let refused = client.checkpoint_container(checkpoint).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unimplemented);
}

#[tokio::test]
async fn an_empty_node_describes_metrics_and_reports_none() {
    let Some(mut node) = Node::start().await else { return };
    let described = node.client.list_metric_descriptors(v1::ListMetricDescriptorsRequest {});
    assert!(described.await.unwrap().into_inner().descriptors.len() > 45);
    let reported = node.client.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {});
    assert!(reported.await.unwrap().into_inner().pod_metrics.is_empty());
}

#[tokio::test]
async fn pods_that_were_not_measured_are_in_no_statistics() {
    let Some(mut node) = Node::start().await else { return };
    let nothing = serde_json::Value::Null;
    sandbox::synthetic_pods::add(&node.sandboxes, 1, &nothing, &nothing);
    sandbox::synthetic_pods::add_without_stats(&node.sandboxes, 1..3);
    let client = &mut node.client;
    let pods = client.list_pod_sandbox(v1::ListPodSandboxRequest::default()).await.unwrap();
    let pods = pods.into_inner().items;
    assert_eq!(pods.len(), 3);
    let stats = client.list_pod_sandbox_stats(v1::ListPodSandboxStatsRequest::default()).await;
    let stats = stats.unwrap().into_inner().stats;
    assert_eq!(stats.len(), 1);
    assert!(stats[0].linux.is_some());
    let measured = stats[0].attributes.as_ref().unwrap().id.clone();
    let metrics = client.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {}).await;
    assert_eq!(metrics.unwrap().into_inner().pod_metrics.len(), 1);
    for pod in pods.iter().filter(|pod| pod.id != measured) {
        let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() };
        let refused = client.pod_sandbox_stats(request).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    }
}

#[tokio::test]
async fn event_subscribers_do_not_delay_the_shutdown() {
    let Some(mut node) = Node::start().await else { return };
    let request = v1::GetEventsRequest {};
    let mut events = node.client.get_container_events(request).await.unwrap().into_inner();
    node.stop.send(()).unwrap();
    let limit = Duration::from_secs(3);
    let end = tokio::time::timeout(limit, events.message()).await.expect("the stream ends");
    assert!(matches!(end, Ok(None)), "{end:?}");
    drop(node.client);
    tokio::time::timeout(limit, node.server).await.expect("the server ends").unwrap().unwrap();
}

#[tokio::test]
async fn an_observer_is_told_of_every_call_with_its_code() {
    let Some(mut node) = Node::start().await else { return };
    node.client.version(v1::VersionRequest::default()).await.unwrap();
    let container = v1::ContainerStatusRequest { container_id: id(), verbose: false };
    node.client.container_status(container).await.unwrap_err();
    let list = v1::StreamContainersRequest::default();
    let mut list = node.client.stream_containers(list).await.unwrap().into_inner();
    assert!(list.message().await.unwrap().is_none());
    // Its client goes away.
    drop(node.client.get_container_events(v1::GetEventsRequest {}).await.unwrap());
    let expected = [
        ("Version", Code::Ok),
        ("ContainerStatus", Code::NotFound),
        ("StreamContainers", Code::Ok),
        ("GetContainerEvents", Code::Cancelled),
    ];
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while node.seen.0.lock().unwrap().len() < expected.len() {
        assert!(std::time::Instant::now() < deadline, "{:?}", node.seen);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(*node.seen.0.lock().unwrap(), expected);
}
