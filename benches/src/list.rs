//! A kubelet's periodic calls on a node with many pods: the real services on a real socket,
//! their cache full of pods that have no VM. A listing that called a guest would fail here.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use async_trait::async_trait;
use cri::v1::runtime_service_client::RuntimeServiceClient;
use cri::{Health, Image, Runtime, Shutdown, Streaming, v1};
use hyper_util::rt::TokioIo;
use image::Images;
use sandbox::Sandboxes;
use sandbox::synthetic_pods::{self, EmptyNode};
use serde_json::json;
use tonic::service::Routes;
use tonic::transport::{Channel, Endpoint};

use crate::table;

type Client = RuntimeServiceClient<Channel>;

/// Calls every listing on a node with `pods` pods, and prints the times.
pub fn run(pods: usize, runs: usize) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let rows = runtime.block_on(measure(pods, runs.max(1)))?;
    let title = format!("{pods} pods with a container each, listed over the socket ({runs} times)");
    table::print(&title, &["call", "items", "best", "median", "worst"], &rows);
    Ok(())
}

async fn measure(pods: usize, runs: usize) -> Result<Vec<Vec<String>>> {
    let dir = tempfile::tempdir()?;
    let mut client = serve(dir.path(), pods).await?;
    let mut rows = Vec::new();
    macro_rules! time {
        ($call:ident, $request:expr, $items:ident) => {{
            let (mut times, mut items) = (Vec::new(), 0);
            for _ in 0..runs {
                let begin = Instant::now();
                items = client.$call($request).await?.into_inner().$items.len();
                times.push(begin.elapsed().as_micros() as u64);
            }
            ensure!(items == pods, "{} returned {items} of {pods}", stringify!($call));
            rows.push(row(stringify!($call), items, &mut times));
        }};
    }
    time!(list_pod_sandbox, v1::ListPodSandboxRequest::default(), items);
    time!(list_containers, v1::ListContainersRequest::default(), containers);
    time!(list_pod_sandbox_stats, v1::ListPodSandboxStatsRequest::default(), stats);
    time!(list_container_stats, v1::ListContainerStatsRequest::default(), stats);
    time!(list_pod_sandbox_metrics, v1::ListPodSandboxMetricsRequest::default(), pod_metrics);
    Ok(rows)
}

fn row(name: &str, items: usize, times: &mut [u64]) -> Vec<String> {
    let median = table::median(times);
    let (best, worst) = (times.first(), times.last());
    let ms = |us: u64| format!("{:.1} ms", us as f64 / 1000.0);
    let [best, worst] = [best, worst].map(|time| ms(time.copied().unwrap_or_default()));
    vec![name.to_owned(), items.to_string(), best, ms(median), worst]
}

/// Starts the services on a node of that many pods.
async fn serve(dir: &Path, pods: usize) -> Result<Client> {
    let config = sandbox::Config {
        root: dir.join("root"),
        state: dir.join("state"),
        ..sandbox::Config::default()
    };
    let sandboxes = Sandboxes::open_with(config, Arc::new(EmptyNode), Arc::new(EmptyNode)).await?;
    synthetic_pods::add(&sandboxes, pods, &pod_request(), &container_request());
    let images = image::Config { root: dir.join("images"), ..image::Config::default() };
    let images = Images::open(images).await?;
    let streams = cri::bind_streams(&Streaming::default(), sandboxes.clone())?;
    let config = cri::Config::default();
    let service = Image::new(images.clone(), sandboxes.clone(), &config);
    let health = Arc::new(EmptyHealth);
    let runtime = Runtime::new(sandboxes, images, health, config, dir.to_owned(), streams);
    let socket = dir.join("cri.sock");
    let listener = cri::listen(&socket)?;
    let never: Shutdown = Box::pin(std::future::pending());
    tokio::spawn(cri::serve(listener, runtime, service, Routes::default(), None, never));
    let connector = tower::service_fn(move |_| {
        let socket = socket.clone();
        async move { tokio::net::UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    let channel = Endpoint::from_static("http://node").connect_with_connector(connector).await;
    let client = RuntimeServiceClient::new(channel.context("connecting to the services")?);
    Ok(client.max_decoding_message_size(64 << 20))
}

/// About as long as a kubelet's.
fn pod_request() -> serde_json::Value {
    let annotations = json!({ "kubernetes.io/config.source": "api", "note": "x".repeat(400) });
    json!({
        "metadata": { "name": "pod", "namespace": "default" },
        "annotations": annotations,
        "linux": { "security_context": { "namespace_options": { "pid": 1 } } },
    })
}

fn container_request() -> serde_json::Value {
    let mounts: Vec<_> = (0..6)
        .map(|n| json!({ "container_path": format!("/m/{n}"), "host_path": format!("/h/{n}") }))
        .collect();
    json!({
        "metadata": { "name": "app" },
        "image": { "image": "registry.example/app:1" },
        "mounts": mounts,
        "linux": { "resources": { "memory_limit_in_bytes": 64 << 20 } },
    })
}

/// A node without conditions.
struct EmptyHealth;

#[async_trait]
impl Health for EmptyHealth {
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
