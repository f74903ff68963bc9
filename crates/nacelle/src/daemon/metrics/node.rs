//! States of pods and containers, and the usage of each ready pod as its guest reported it last. Read at
//! each scrape from what the daemon has in memory.

use std::collections::{BTreeMap, HashMap};
use std::fmt::{self, Error};
use std::sync::{Arc, Mutex, PoisonError};

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use sandbox::Sandboxes;
use sandbox::model::{
    ContainerId, ContainerState, ContainerView, Filter, PodId, PodState, PodView,
};
use sandbox::stats::PodStatsView;

/// Bytes of a label's value; what is longer is cut. Names of Kubernetes are shorter.
const MAX_LABEL: usize = 253;

/// Where the states come from; a fake in tests.
pub(crate) trait Source: Send + Sync {
    fn pods(&self) -> Vec<PodView>;
    fn containers(&self) -> Vec<ContainerView>;
    /// Of ready pods that were measured.
    fn stats(&self) -> BTreeMap<PodId, Arc<PodStatsView>>;
}

impl Source for Sandboxes {
    fn pods(&self) -> Vec<PodView> {
        Sandboxes::pods(self, &Filter::default())
    }

    fn containers(&self) -> Vec<ContainerView> {
        Sandboxes::containers(self, &Filter::default())
    }

    fn stats(&self) -> BTreeMap<PodId, Arc<PodStatsView>> {
        self.last_stats()
    }
}

pub(crate) struct Node {
    source: Box<dyn Source>,
    disks: Mutex<HashMap<PodId, Disk>>,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Node")
    }
}

/// Guests count bytes for each container; the sum must not decrease when a container is removed.
#[derive(Debug, Default)]
struct Disk {
    /// Of containers that are gone.
    gone: (u64, u64),
    last: BTreeMap<ContainerId, (u64, u64)>,
}

impl Disk {
    /// Bytes read and written.
    fn renew(&mut self, stats: &PodStatsView) -> (u64, u64) {
        let mut now: BTreeMap<_, _> = stats
            .containers
            .iter()
            .map(|c| {
                let read = c.block_io.iter().map(|io| io.read_bytes);
                let written = c.block_io.iter().map(|io| io.written_bytes);
                (c.id.clone(), (sum(read), sum(written)))
            })
            .collect();
        for (id, last) in std::mem::take(&mut self.last) {
            match now.get_mut(&id) {
                // A container that ends while it is measured is reported without its bytes.
                Some(now) => *now = (now.0.max(last.0), now.1.max(last.1)),
                None => self.gone = add(self.gone, last),
            }
        }
        self.last = now;
        self.last.values().copied().fold(self.gone, add)
    }
}

fn add(a: (u64, u64), b: (u64, u64)) -> (u64, u64) {
    (a.0.saturating_add(b.0), a.1.saturating_add(b.1))
}

/// A guest may report any numbers.
fn sum(values: impl Iterator<Item = u64>) -> u64 {
    values.fold(0, u64::saturating_add)
}

/// One pod's series.
struct Usage {
    labels: [(&'static str, String); 3],
    values: [f64; USAGE.len()],
}

const USAGE: [(&str, &str, MetricType); 8] = [
    ("nacelle_pod_cpu_usage_seconds", "CPU time used in a pod.", MetricType::Counter),
    ("nacelle_pod_memory_usage_bytes", "Memory used in a pod, with page cache.", MetricType::Gauge),
    ("nacelle_pod_memory_working_set_bytes", "Working set of a pod.", MetricType::Gauge),
    ("nacelle_pod_network_receive_bytes", "Bytes received by a pod.", MetricType::Counter),
    ("nacelle_pod_network_transmit_bytes", "Bytes sent by a pod.", MetricType::Counter),
    ("nacelle_pod_disk_read_bytes", "Bytes that a pod read from its disks.", MetricType::Counter),
    ("nacelle_pod_disk_written_bytes", "Bytes that a pod wrote to its disks.", MetricType::Counter),
    (
        "nacelle_pod_filesystem_usage_bytes",
        "Bytes in the writable layers and emptyDirs of a pod.",
        MetricType::Gauge,
    ),
];

fn values(stats: &PodStatsView, (read, written): (u64, u64)) -> [f64; USAGE.len()] {
    let received = sum(stats.interfaces.iter().map(|i| i.rx_bytes));
    let sent = sum(stats.interfaces.iter().map(|i| i.tx_bytes));
    let layers = stats.containers.iter().map(|c| c.writable_layer.used_bytes);
    let stored = sum(layers.chain(stats.empty_dirs.iter().map(|d| d.usage.used_bytes)));
    [
        stats.cpu.usage_ns as f64 / 1e9,
        stats.memory.usage as f64,
        stats.memory.working_set as f64,
        received as f64,
        sent as f64,
        read as f64,
        written as f64,
        stored as f64,
    ]
}

impl Node {
    pub(crate) fn new(source: impl Source + 'static) -> Self {
        Self { source: Box::new(source), disks: Mutex::default() }
    }

    fn usage(&self, pods: &[PodView]) -> Vec<Usage> {
        // Locked first: of two scrapes the one with the older statistics comes first.
        let mut disks = self.disks.lock().unwrap_or_else(PoisonError::into_inner);
        let stats = self.source.stats();
        disks.retain(|pod, _| stats.contains_key(pod));
        // A pod and the next attempt at it have the same labels; the latest is shown.
        let mut latest: BTreeMap<[String; 3], &PodView> = BTreeMap::new();
        for pod in pods.iter().filter(|pod| stats.contains_key(&pod.id)) {
            let meta = &pod.spec.meta;
            let names = [&meta.namespace, &meta.name, &meta.uid].map(|text| cut(text));
            let shown = latest.entry(names).or_insert(pod);
            if (shown.spec.meta.attempt, shown.created_at) < (meta.attempt, pod.created_at) {
                *shown = pod;
            }
        }
        let series = latest.into_iter().filter_map(|([namespace, pod, uid], view)| {
            let measured = stats.get(&view.id)?;
            let disk = disks.entry(view.id.clone()).or_default().renew(measured);
            let labels = [("namespace", namespace), ("pod", pod), ("uid", uid)];
            Some(Usage { labels, values: values(measured, disk) })
        });
        series.collect()
    }
}

fn cut(text: &str) -> String {
    text[..text.floor_char_boundary(MAX_LABEL)].to_owned()
}

impl Collector for Node {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), Error> {
        let pods = self.source.pods();
        let count = |state| pods.iter().filter(|pod| pod.state == state).count();
        let by_state =
            [("ready", count(PodState::Ready)), ("not_ready", count(PodState::NotReady))];
        states(&mut encoder, "nacelle_pods", "Pods by state.", &by_state)?;

        let containers = self.source.containers();
        let count = |state| containers.iter().filter(|container| container.state == state).count();
        let by_state = [
            ("created", count(ContainerState::Created)),
            ("running", count(ContainerState::Running)),
            ("exited", count(ContainerState::Exited)),
            ("unknown", count(ContainerState::Unknown)),
        ];
        states(&mut encoder, "nacelle_containers", "Containers by state.", &by_state)?;

        let usage = self.usage(&pods);
        if usage.is_empty() {
            return Ok(());
        }
        for (index, (name, help, kind)) in USAGE.into_iter().enumerate() {
            let mut metric = encoder.encode_descriptor(name, help, None, kind)?;
            for pod in &usage {
                let series = metric.encode_family(&pod.labels)?;
                let value = pod.values[index];
                match kind {
                    MetricType::Counter => ConstCounter::new(value).encode(series)?,
                    _ => ConstGauge::new(value).encode(series)?,
                }
            }
        }
        Ok(())
    }
}

fn states(
    encoder: &mut DescriptorEncoder<'_>,
    name: &str,
    help: &str,
    by_state: &[(&str, usize)],
) -> Result<(), Error> {
    let mut metric = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
    for (state, count) in by_state {
        let labels = [("state", *state)];
        ConstGauge::new(*count as u64).encode(metric.encode_family(&labels)?)?;
    }
    Ok(())
}
