//! Calls of the CRI on a real socket, on a node that runs no VMs and gives no networks.

use std::sync::Arc;

use async_trait::async_trait;
use cri::v1;
use cri::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use image::Images;
use sandbox::Sandboxes;
use sandbox::synthetic_pods::EmptyNode;
use tonic::service::Routes;
use tonic::transport::Endpoint as Target;

use super::{Counters, Endpoint, Node, registry, value};

struct EmptyHealth;

#[async_trait]
impl cri::Health for EmptyHealth {
    async fn runtime(&self) -> Option<String> {
        None
    }

    async fn network(&self) -> Option<String> {
        None
    }

    fn facts(&self) -> serde_json::Value {
        serde_json::Value::Null
    }
}

#[tokio::test]
async fn successful_and_failed_calls_and_starts_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    let counters = Arc::new(Counters::new());
    let pods = sandbox::Config {
        root: root.join("root"),
        state: root.join("state"),
        ..sandbox::Config::default()
    };
    let node = Arc::new(EmptyNode);
    let opened = Sandboxes::open_observed(pods, node.clone(), node, counters.clone()).await;
    let sandboxes = match opened {
        Ok(sandboxes) => sandboxes,
        Err(error @ sandbox::Error::FailedPrecondition { .. }) => {
            eprintln!("SKIP: {error}");
            return;
        }
        Err(error) => panic!("{error}"),
    };
    let images = image::Config { root: root.join("images"), ..image::Config::default() };
    let images = Images::open_observed(images, counters.clone()).await.unwrap();
    let streams = cri::bind_streams(&cri::Streaming::default(), sandboxes.clone()).unwrap();
    let config = cri::Config::default();
    let service = cri::Image::new(images.clone(), sandboxes.clone(), &config);
    let runtime = cri::Runtime::new(
        sandboxes.clone(),
        images.clone(),
        Arc::new(EmptyHealth),
        config,
        root.clone(),
        streams,
    );
    let socket = root.join("cri.sock");
    let listener = cri::listen(&socket).unwrap();
    let shutdown: cri::Shutdown = Box::pin(std::future::pending());
    let beside = Routes::default();
    let served = cri::serve(listener, runtime, service, beside, Some(counters.clone()), shutdown);
    let server = tokio::spawn(served);
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Target::from_static("http://node").connect_with_connector(connector).await;
    let mut client = RuntimeServiceClient::new(channel.unwrap());
    sandbox::synthetic_pods::add(&sandboxes, 2, &serde_json::Value::Null, &serde_json::Value::Null);
    let endpoint = Endpoint::start(registry(&counters, Node::new(sandboxes))).await;

    let before = endpoint.scrape().await;
    let missing = [("method", "Version"), ("code", "OK")];
    assert_eq!(value(&before, "nacelle_cri_requests_total", &missing), None);
    client.version(v1::VersionRequest::default()).await.unwrap();
    let id = "0123456789abcdef".to_owned();
    let status = v1::ContainerStatusRequest { container_id: id, verbose: false };
    client.container_status(status).await.unwrap_err();
    let metadata = v1::PodSandboxMetadata {
        name: "web".into(),
        namespace: "default".into(),
        uid: "u".into(),
        attempt: 0,
    };
    let config = v1::PodSandboxConfig { metadata: Some(metadata), ..Default::default() };
    let run = v1::RunPodSandboxRequest { config: Some(config), ..Default::default() };
    client.run_pod_sandbox(run).await.unwrap_err();
    images.pull("UPPER CASE", None, None).await.unwrap_err();
    // A port that nobody listens on.
    images.pull("127.0.0.1:1/none:1", None, None).await.unwrap_err();

    let after = endpoint.scrape().await;
    let count = |name: &str, labels: &[(&str, &str)]| value(&after, name, labels).unwrap_or(0.0);
    let requests = "nacelle_cri_requests_total";
    assert_eq!(count(requests, &[("method", "Version"), ("code", "OK")]), 1.0);
    assert_eq!(count(requests, &[("method", "ContainerStatus"), ("code", "NotFound")]), 1.0);
    let durations = "nacelle_cri_request_duration_seconds_count";
    assert_eq!(count(durations, &[("method", "RunPodSandbox")]), 1.0);
    assert_eq!(count("nacelle_pod_starts_total", &[("kind", "vm"), ("result", "error")]), 1.0);
    assert_eq!(count("nacelle_pod_starts_total", &[("kind", "vm"), ("result", "ok")]), 0.0);
    assert!(count("nacelle_journal_writes_total", &[("result", "ok")]) >= 1.0);
    assert_eq!(count("nacelle_image_pulls_total", &[("result", "error")]), 1.0);
    assert_eq!(count("nacelle_pods", &[("state", "ready")]), 2.0);
    assert_eq!(count("nacelle_containers", &[("state", "running")]), 2.0);
    let first = [("namespace", "default"), ("pod", "pod-0"), ("uid", &*format!("{:032x}", 0))];
    assert!(value(&after, "nacelle_pod_cpu_usage_seconds_total", &first).is_some());
    server.abort();
}
