//! Events, statistics and metrics.

use std::collections::BTreeMap;
use std::sync::mpsc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;
use cri::v1::ContainerEventType::{
    ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted,
    ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped,
};

use super::Story;
use crate::client::{Cri, container};
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("events of pods and containers are in order and have their statuses", events),
    ("pod statistics and metrics include network, processes and memory", statistics),
];

/// Subscribes to events until the end of the story.
fn follow(cri: &Cri) -> Result<mpsc::Receiver<v1::ContainerEventResponse>> {
    let mut client = cri.runtime.clone();
    let (sender, received) = mpsc::channel();
    cri.block_on(async move {
        let request = v1::GetEventsRequest {};
        let mut events = client.get_container_events(request).await?.into_inner();
        tokio::spawn(async move {
            while let Ok(Some(event)) = events.message().await {
                let _ = sender.send(event);
            }
        });
        Ok::<_, tonic::Status>(())
    })?;
    Ok(received)
}

fn events() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let received = follow(cri)?;
    let pod = node.pod("events")?;
    let id = cri.run(&pod, container("c", &image, &["sh", "-c", "exit 3"]))?;
    cri.exited(&id)?;
    cri.remove(&id)?;
    cri.stop_pod(&pod)?;
    cri.remove_pod(&pod)?;
    let mut all = Vec::new();
    loop {
        let event = received.recv_timeout(Duration::from_secs(10));
        let event = event.with_context(|| format!("no Deleted event of the pod: {all:?}"))?;
        let last = event.container_id == pod && event.container_event_type() == Deleted;
        all.push(event);
        if last {
            break;
        }
    }
    let kinds = |id: &str| {
        let own = all.iter().filter(|event| event.container_id == id);
        own.map(v1::ContainerEventResponse::container_event_type).collect::<Vec<_>>()
    };
    for id in [&id, &pod] {
        ensure!(kinds(id) == [Created, Started, Stopped, Deleted], "{id}: {:?}", kinds(id));
    }
    ensure!(all.windows(2).all(|two| two[0].created_at <= two[1].created_at), "out of order");
    let stopped = all.iter().find(|e| e.container_id == id && e.container_event_type() == Stopped);
    let stopped = stopped.context("no Stopped event")?;
    let name = stopped.pod_sandbox_status.as_ref().and_then(|s| s.metadata.as_ref());
    ensure!(name.is_some_and(|metadata| metadata.name == "events"), "{stopped:?}");
    let status = stopped.containers_statuses.iter().find(|status| status.id == id);
    ensure!(status.is_some_and(|status| status.exit_code == 3), "{stopped:?}");
    node.finish()
}

fn statistics() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("statistics")?;
    let cri = node.cri();
    let line = "head -c 5000000 /dev/zero > /big; sleep 1000 & sleep 1000 & wait";
    let id = cri.run(&pod, container("c", &image, &["sh", "-c", line]))?;
    let value = |value: Option<v1::UInt64Value>| value.map_or(0, |value| value.value);
    let mut last = String::new();
    let whole = wait::until("the pod's statistics are complete", Duration::from_secs(30), || {
        let mut client = cri.runtime.clone();
        let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() };
        let reply = cri.block_on(async move { client.pod_sandbox_stats(request).await })?;
        let stats = reply.into_inner().stats.context("no statistics")?;
        let linux = stats.linux.context("no Linux ones")?;
        let network = linux.network.and_then(|n| n.default_interface).context("no network")?;
        ensure!(network.name == "eth0", "{network:?}");
        let processes = value(linux.process.and_then(|p| p.process_count));
        let memory = value(linux.memory.and_then(|m| m.working_set_bytes));
        let of_container = linux.containers.first().and_then(|c| c.writable_layer.clone());
        let layer = of_container.and_then(|layer| layer.used_bytes);
        let (layer, sent) = (value(layer), value(network.tx_bytes));
        last = format!("{processes} processes, {memory} bytes, on disk {layer}, sent {sent}");
        Ok((processes >= 3 && memory > 0 && layer >= 5_000_000 && sent > 0).then_some(()))
    });
    whole.context(last)?;
    metrics(cri, &pod, &id, &image)?;
    node.finish()
}

fn metrics(cri: &Cri, pod: &str, id: &str, image: &str) -> Result<()> {
    let mut client = cri.runtime.clone();
    let described = cri.block_on(async move {
        client.list_metric_descriptors(v1::ListMetricDescriptorsRequest {}).await
    })?;
    let labels: BTreeMap<String, Vec<String>> =
        described.into_inner().descriptors.into_iter().map(|d| (d.name, d.label_keys)).collect();
    let mut client = cri.runtime.clone();
    let received = cri.block_on(async move {
        client.list_pod_sandbox_metrics(v1::ListPodSandboxMetricsRequest {}).await
    })?;
    let pods = received.into_inner().pod_metrics;
    let of_pod =
        pods.iter().find(|received| received.pod_sandbox_id == pod).context("no metrics")?;
    let of_container = of_pod.container_metrics.first().context("no metrics of the container")?;
    for metric in of_pod.metrics.iter().chain(&of_container.metrics) {
        let keys = labels.get(&metric.name);
        ensure!(
            keys.is_some_and(|keys| keys.len() == metric.label_values.len()),
            "{metric:?} is described with {keys:?}"
        );
    }
    let find = |metrics: &[v1::Metric], name: &str| {
        metrics.iter().find(|metric| metric.name == name).cloned().context(name.to_owned())
    };
    let received = find(&of_pod.metrics, "container_network_receive_bytes_total")?;
    ensure!(
        received.label_values == ["statistics", "stories", "", pod, "", "eth0"],
        "{received:?}"
    );
    let memory = find(&of_container.metrics, "container_memory_working_set_bytes")?;
    ensure!(memory.label_values == ["statistics", "stories", "c", id, image], "{memory:?}");
    ensure!(memory.value.is_some_and(|value| value.value > 0), "{memory:?}");
    let processes = find(&of_container.metrics, "container_processes")?;
    ensure!(processes.value.is_some_and(|value| value.value == 3), "{processes:?}");
    Ok(())
}
