//! Metrics of pods and containers in the names, units and labels of cAdvisor, which a kubelet hands
//! on to Prometheus as they are. One table holds a metric's description and where its value comes
//! from, so that the two listings cannot disagree.
//!
//! Values are whole numbers on this wire, so seconds are cut off.

use sandbox::model::{ContainerView, PodView};
use sandbox::stats::{
    BlockIoView, ContainerStatsView, FsView, InterfaceView, PodStatsView, PressureView,
};

use super::time::nanos;
use crate::v1;
use crate::v1::MetricType::{self, Counter, Gauge};

/// Labels that every metric has, in this order.
const LABELS: [&str; 5] = ["pod", "namespace", "container", "id", "image"];
/// The writable layer as a device.
const LAYER: &str = "overlay";
const NANOSECONDS: u64 = 1_000_000_000;
const MICROSECONDS: u64 = 1_000_000;

/// A metric of one thing of the kind `T`.
struct Metric<T: ?Sized> {
    name: &'static str,
    help: &'static str,
    kind: MetricType,
    /// None: not measured.
    value: fn(&T) -> Option<u64>,
}

const fn metric<T: ?Sized>(
    kind: MetricType,
    name: &'static str,
    help: &'static str,
    value: fn(&T) -> Option<u64>,
) -> Metric<T> {
    Metric { name, help, kind, value }
}

/// A container and its statistics.
struct Measured<'a> {
    view: &'a ContainerView,
    stats: &'a ContainerStatsView,
    swap_limit: i64,
}

fn seconds(time: Option<std::time::SystemTime>) -> Option<u64> {
    time.and_then(|time| u64::try_from(nanos(time)).ok()).map(|ns| ns / NANOSECONDS)
}

fn waited(pressure: Option<PressureView>, of: fn(&PressureView) -> u64) -> Option<u64> {
    Some(pressure.as_ref().map_or(0, of) / MICROSECONDS)
}

fn limit(value: Option<i64>) -> Option<u64> {
    value.and_then(|value| u64::try_from(value).ok()).filter(|value| *value > 0)
}

/// A function because of the lifetime: a constant would need `'static` references.
fn container_metrics<'a>() -> [Metric<Measured<'a>>; 34] {
    [
        metric(Counter, "container_cpu_usage_seconds_total", "CPU time consumed.", |c| {
            Some(c.stats.cpu.usage_ns / NANOSECONDS)
        }),
        metric(
            Counter,
            "container_cpu_user_seconds_total",
            "CPU time consumed in user mode.",
            |c| Some(c.stats.cpu.user_ns / NANOSECONDS),
        ),
        metric(
            Counter,
            "container_cpu_system_seconds_total",
            "CPU time consumed in the kernel.",
            |c| Some(c.stats.cpu.system_ns / NANOSECONDS),
        ),
        metric(Counter, "container_cpu_cfs_periods_total", "Periods with a CPU limit.", |c| {
            Some(c.stats.cpu.periods)
        }),
        metric(
            Counter,
            "container_cpu_cfs_throttled_periods_total",
            "Periods in which the CPU limit was reached.",
            |c| Some(c.stats.cpu.throttled_periods),
        ),
        metric(
            Counter,
            "container_cpu_cfs_throttled_seconds_total",
            "Time for which the CPU limit held the container up.",
            |c| Some(c.stats.cpu.throttled_ns / NANOSECONDS),
        ),
        metric(Gauge, "container_memory_usage_bytes", "Memory in use, caches included.", |c| {
            Some(c.stats.memory.usage)
        }),
        metric(Gauge, "container_memory_max_usage_bytes", "Most memory that was in use.", |c| {
            Some(c.stats.memory.peak)
        }),
        metric(
            Gauge,
            "container_memory_working_set_bytes",
            "Memory that is not to be had back.",
            |c| Some(c.stats.memory.working_set),
        ),
        metric(Gauge, "container_memory_rss", "Anonymous memory.", |c| Some(c.stats.memory.rss)),
        metric(Gauge, "container_memory_cache", "Page cache.", |c| Some(c.stats.memory.cache)),
        metric(Gauge, "container_memory_mapped_file", "Mapped files.", |c| {
            Some(c.stats.memory.mapped_file)
        }),
        metric(Gauge, "container_memory_swap", "Swap in use.", |c| Some(c.stats.memory.swap)),
        metric(Gauge, "container_memory_kernel_usage", "Kernel memory in use.", |c| {
            Some(c.stats.memory.kernel)
        }),
        metric(Counter, "container_memory_failcnt", "Times that the memory limit was hit.", |c| {
            Some(c.stats.memory.failures)
        }),
        metric(Gauge, "container_memory_total_active_file_bytes", "Active page cache.", |c| {
            Some(c.stats.memory.total_active_file)
        }),
        metric(Gauge, "container_memory_total_inactive_file_bytes", "Inactive page cache.", |c| {
            Some(c.stats.memory.total_inactive_file)
        }),
        metric(Counter, "container_oom_events_total", "Times that memory ran out.", |c| {
            Some(c.stats.oom_events)
        }),
        metric(
            Counter,
            "container_pressure_cpu_waiting_seconds_total",
            "Time for which some tasks waited for a CPU.",
            |c| waited(c.stats.cpu.pressure, |p| p.some_us),
        ),
        metric(
            Counter,
            "container_pressure_cpu_stalled_seconds_total",
            "Time for which all tasks waited for a CPU.",
            |c| waited(c.stats.cpu.pressure, |p| p.full_us),
        ),
        metric(
            Counter,
            "container_pressure_memory_waiting_seconds_total",
            "Time for which some tasks waited for memory.",
            |c| waited(c.stats.memory.pressure, |p| p.some_us),
        ),
        metric(
            Counter,
            "container_pressure_memory_stalled_seconds_total",
            "Time for which all tasks waited for memory.",
            |c| waited(c.stats.memory.pressure, |p| p.full_us),
        ),
        metric(Gauge, "container_processes", "Processes.", |c| Some(c.stats.processes.processes)),
        metric(Gauge, "container_threads", "Threads.", |c| Some(c.stats.processes.threads)),
        metric(Gauge, "container_threads_max", "Threads at most; 0: any number.", |c| {
            Some(c.stats.processes.threads_max)
        }),
        metric(Gauge, "container_file_descriptors", "Open file descriptors.", |c| {
            Some(c.stats.processes.file_descriptors)
        }),
        metric(Gauge, "container_sockets", "Open sockets.", |c| Some(c.stats.processes.sockets)),
        metric(Gauge, "container_start_time_seconds", "When it started, since 1970.", |c| {
            seconds(c.view.started_at)
        }),
        metric(Gauge, "container_last_seen", "When it was measured, since 1970.", |c| {
            seconds(Some(c.stats.at))
        }),
        metric(Gauge, "container_spec_cpu_period", "CPU period, microseconds.", |c| {
            c.view.resources.cpu().as_ref().and_then(|cpu| cpu.period())
        }),
        metric(Gauge, "container_spec_cpu_quota", "CPU limit in a period, microseconds.", |c| {
            limit(c.view.resources.cpu().as_ref().and_then(|cpu| cpu.quota()))
        }),
        metric(Gauge, "container_spec_cpu_shares", "CPU shares.", |c| {
            c.view.resources.cpu().as_ref().and_then(|cpu| cpu.shares())
        }),
        metric(Gauge, "container_spec_memory_limit_bytes", "Memory limit.", |c| {
            limit(c.view.resources.memory().as_ref().and_then(|memory| memory.limit()))
        }),
        metric(Gauge, "container_spec_memory_swap_limit_bytes", "Limit of memory and swap.", |c| {
            limit(Some(c.swap_limit))
                .or(limit(c.view.resources.memory().as_ref().and_then(|memory| memory.limit())))
        }),
    ]
}

/// With the label `interface`; of the pod.
const NETWORK: [Metric<InterfaceView>; 8] = [
    metric(Counter, "container_network_receive_bytes_total", "Bytes received.", |i| {
        Some(i.rx_bytes)
    }),
    metric(Counter, "container_network_receive_packets_total", "Packets received.", |i| {
        Some(i.rx_packets)
    }),
    metric(
        Counter,
        "container_network_receive_packets_dropped_total",
        "Packets dropped on their way in.",
        |i| Some(i.rx_dropped),
    ),
    metric(Counter, "container_network_receive_errors_total", "Errors of receiving.", |i| {
        Some(i.rx_errors)
    }),
    metric(Counter, "container_network_transmit_bytes_total", "Bytes sent.", |i| Some(i.tx_bytes)),
    metric(Counter, "container_network_transmit_packets_total", "Packets sent.", |i| {
        Some(i.tx_packets)
    }),
    metric(
        Counter,
        "container_network_transmit_packets_dropped_total",
        "Packets dropped on their way out.",
        |i| Some(i.tx_dropped),
    ),
    metric(Counter, "container_network_transmit_errors_total", "Errors of sending.", |i| {
        Some(i.tx_errors)
    }),
];

/// With the label `device`.
const LAYERS: [Metric<FsView>; 4] = [
    metric(Gauge, "container_fs_usage_bytes", "Bytes used of the writable layer.", |f| {
        Some(f.used_bytes)
    }),
    metric(Gauge, "container_fs_limit_bytes", "Size of the writable layer.", |f| Some(f.capacity)),
    metric(Gauge, "container_fs_inodes_total", "Inodes of the writable layer.", |f| Some(f.inodes)),
    metric(Gauge, "container_fs_inodes_free", "Unused inodes of the writable layer.", |f| {
        Some(f.inodes.saturating_sub(f.inodes_used))
    }),
];

/// With the label `device`.
const DISKS: [Metric<BlockIoView>; 4] = [
    metric(Counter, "container_fs_reads_bytes_total", "Bytes read from a disk.", |d| {
        Some(d.read_bytes)
    }),
    metric(Counter, "container_fs_reads_total", "Reads from a disk.", |d| Some(d.reads)),
    metric(Counter, "container_fs_writes_bytes_total", "Bytes written to a disk.", |d| {
        Some(d.written_bytes)
    }),
    metric(Counter, "container_fs_writes_total", "Writes to a disk.", |d| Some(d.writes)),
];

/// With the labels `device`, `major`, `minor` and `operation`.
const DISK_USE: Metric<u64> =
    metric(Counter, "container_blkio_device_usage_total", "Bytes to and from a disk.", |n| {
        Some(*n)
    });
/// With the labels `failure_type` and `scope`.
const FAULTS: Metric<u64> =
    metric(Counter, "container_memory_failures_total", "Page faults.", |n| Some(*n));
/// With the label `ulimit`.
const ULIMITS: Metric<u64> =
    metric(Gauge, "container_ulimits_soft", "Soft limits of the container's own process.", |n| {
        Some(*n)
    });

fn describe<T>(metric: &Metric<T>, labels: &[&str]) -> v1::MetricDescriptor {
    v1::MetricDescriptor {
        name: metric.name.to_string(),
        help: metric.help.to_string(),
        label_keys: LABELS.iter().chain(labels).map(ToString::to_string).collect(),
    }
}

/// All metrics.
pub fn descriptors() -> Vec<v1::MetricDescriptor> {
    let disk_use = ["device", "major", "minor", "operation"];
    let own = container_metrics();
    let own = own.iter().map(|metric| describe(metric, &[]));
    let network = NETWORK.iter().map(|metric| describe(metric, &["interface"]));
    let layers = LAYERS.iter().map(|metric| describe(metric, &["device"]));
    let disks = DISKS.iter().map(|metric| describe(metric, &["device"]));
    own.chain(network)
        .chain(layers)
        .chain(disks)
        .chain([
            describe(&DISK_USE, &disk_use),
            describe(&FAULTS, &["failure_type", "scope"]),
            describe(&ULIMITS, &["ulimit"]),
        ])
        .collect()
}

/// Metrics with common values of the first labels.
struct Metrics {
    labels: [String; LABELS.len()],
    at: i64,
    metrics: Vec<v1::Metric>,
}

impl Metrics {
    fn put<T: ?Sized>(&mut self, metric: &Metric<T>, of: &T, labels: &[&str]) {
        let Some(value) = (metric.value)(of) else { return };
        let labels = labels.iter().map(ToString::to_string);
        self.metrics.push(v1::Metric {
            name: metric.name.to_string(),
            timestamp: self.at,
            metric_type: metric.kind as i32,
            label_values: self.labels.iter().cloned().chain(labels).collect(),
            value: Some(v1::UInt64Value { value }),
        });
    }
}

/// Metrics of a pod and of those of its containers that were measured.
pub fn of_pod(
    pod: &PodView,
    stats: &PodStatsView,
    containers: &[ContainerView],
) -> v1::PodSandboxMetrics {
    let meta = &pod.spec.meta;
    let labels = |container: &str, id: &str, image: &str| {
        [&meta.name, &meta.namespace, container, id, image].map(str::to_string)
    };
    let at = nanos(stats.at);
    let mut network = Metrics { labels: labels("", &pod.id, ""), at, metrics: vec![] };
    for interface in &stats.interfaces {
        for metric in &NETWORK {
            network.put(metric, interface, &[&interface.name]);
        }
    }
    let measured = containers.iter().filter_map(|view| {
        let stats = stats.containers.iter().find(|known| known.id == view.id)?;
        let labels = labels(&view.spec.meta.name, &view.id, &view.spec.image_name);
        Some(of_container(view, stats, labels))
    });
    v1::PodSandboxMetrics {
        pod_sandbox_id: pod.id.clone(),
        metrics: network.metrics,
        container_metrics: measured.collect(),
    }
}

fn of_container(
    view: &ContainerView,
    stats: &ContainerStatsView,
    labels: [String; LABELS.len()],
) -> v1::ContainerMetrics {
    let mut sheet = Metrics { labels, at: nanos(stats.at), metrics: vec![] };
    let swap_limit = view.spec.origin["linux"]["resources"]["memory_swap_limit_in_bytes"].as_i64();
    let known = Measured { view, stats, swap_limit: swap_limit.unwrap_or_default() };
    for metric in &container_metrics() {
        sheet.put(metric, &known, &[]);
    }
    for metric in &LAYERS {
        sheet.put(metric, &stats.writable_layer, &[LAYER]);
    }
    for disk in &stats.block_io {
        let (major, minor) = (disk.major.to_string(), disk.minor.to_string());
        let device = format!("{major}:{minor}");
        for metric in &DISKS {
            sheet.put(metric, disk, &[&device]);
        }
        for (operation, bytes) in [("Read", disk.read_bytes), ("Write", disk.written_bytes)] {
            sheet.put(&DISK_USE, &bytes, &[&device, &major, &minor, operation]);
        }
    }
    let memory = &stats.memory;
    for (kind, faults) in
        [("pgfault", memory.page_faults), ("pgmajfault", memory.major_page_faults)]
    {
        sheet.put(&FAULTS, &faults, &[kind, "container"]);
    }
    sheet.put(&ULIMITS, &stats.processes.ulimit_soft_nofile, &["max_open_files"]);
    v1::ContainerMetrics { container_id: view.id.clone(), metrics: sheet.metrics }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};
    use std::time::{Duration, UNIX_EPOCH};

    use super::*;
    use crate::convert::resources;
    use crate::convert::tests::{container, pod};

    /// Metrics that cri-tools' conformance suite requires (pkg/validate/pod.go).
    const REQUIRED: &str = "
        blkio_device_usage_total cpu_cfs_periods_total cpu_cfs_throttled_periods_total
        cpu_cfs_throttled_seconds_total cpu_system_seconds_total cpu_usage_seconds_total
        cpu_user_seconds_total file_descriptors fs_inodes_free fs_inodes_total fs_limit_bytes
        fs_reads_bytes_total fs_reads_total fs_usage_bytes fs_writes_bytes_total fs_writes_total
        last_seen memory_cache memory_failcnt memory_failures_total memory_kernel_usage
        memory_mapped_file memory_max_usage_bytes memory_rss memory_swap memory_usage_bytes
        memory_working_set_bytes network_receive_bytes_total network_receive_errors_total
        network_receive_packets_dropped_total network_receive_packets_total
        network_transmit_bytes_total network_transmit_errors_total
        network_transmit_packets_dropped_total network_transmit_packets_total oom_events_total
        processes sockets spec_cpu_period spec_cpu_shares spec_memory_limit_bytes
        spec_memory_swap_limit_bytes start_time_seconds threads threads_max";

    fn reported() -> v1::PodSandboxMetrics {
        let mut view = container();
        view.started_at = Some(UNIX_EPOCH + Duration::from_secs(7));
        view.resources = resources::to_oci(&v1::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 20_000,
            cpu_shares: 1024,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        })
        .unwrap();
        let mut stats = ContainerStatsView {
            id: view.id.clone(),
            at: UNIX_EPOCH + Duration::from_secs(9),
            cpu: Default::default(),
            memory: Default::default(),
            pids: 1,
            writable_layer: FsView { inodes: 10, inodes_used: 4, ..Default::default() },
            processes: Default::default(),
            block_io: vec![BlockIoView { major: 253, minor: 16, ..Default::default() }],
            oom_events: 0,
            started_at: None,
        };
        stats.cpu.usage_ns = 3_500_000_000;
        let stats = PodStatsView {
            pod: "p".into(),
            at: stats.at,
            cpu: Default::default(),
            memory: Default::default(),
            pids: 1,
            interfaces: vec![InterfaceView {
                name: "eth0".into(),
                rx_bytes: 5,
                ..Default::default()
            }],
            io_pressure: None,
            containers: vec![stats],
            empty_dirs: vec![],
        };
        of_pod(&pod(), &stats, &[view])
    }

    fn all(reported: &v1::PodSandboxMetrics) -> BTreeMap<&str, &v1::Metric> {
        let inner = reported.container_metrics.iter().flat_map(|container| &container.metrics);
        reported.metrics.iter().chain(inner).map(|metric| (metric.name.as_str(), metric)).collect()
    }

    #[test]
    fn every_described_metric_is_reported_with_its_labels() {
        let reported = reported();
        let reported = all(&reported);
        let descriptors = descriptors();
        for described in &descriptors {
            let metric = reported.get(described.name.as_str()).unwrap_or_else(|| {
                panic!("{} is described and not reported", described.name);
            });
            assert_eq!(metric.label_values.len(), described.label_keys.len(), "{}", metric.name);
            assert!(!described.help.is_empty());
        }
        let described: BTreeSet<&str> = descriptors.iter().map(|d| d.name.as_str()).collect();
        assert_eq!(described.len(), descriptors.len(), "a name twice");
        assert!(reported.keys().all(|name| described.contains(name)));
        for name in REQUIRED.split_whitespace() {
            assert!(described.contains(format!("container_{name}").as_str()), "{name}");
        }
    }

    #[test]
    fn values_are_whole_seconds_and_bytes() {
        let reported = reported();
        let reported = all(&reported);
        let value = |name: &str| reported[name].value.unwrap().value;
        assert_eq!(value("container_cpu_usage_seconds_total"), 3);
        assert_eq!(value("container_start_time_seconds"), 7);
        assert_eq!(value("container_network_receive_bytes_total"), 5);
        assert_eq!(value("container_fs_inodes_free"), 6);
        assert_eq!(value("container_spec_memory_swap_limit_bytes"), 7);
        assert_eq!(value("container_spec_cpu_quota"), 20_000);
        assert_eq!(reported["container_cpu_usage_seconds_total"].metric_type(), Counter);
        let labels = &reported["container_network_receive_bytes_total"].label_values;
        assert_eq!(labels.as_slice(), ["pod", "ns", "", "p", "", "eth0"]);
        assert_eq!(reported["container_memory_rss"].label_values[2..], ["web", "c", "nginx:1"]);
    }

    #[test]
    fn missing_measurements_give_no_metrics() {
        let empty = PodStatsView {
            pod: "p".into(),
            at: UNIX_EPOCH,
            cpu: Default::default(),
            memory: Default::default(),
            pids: 0,
            interfaces: vec![],
            io_pressure: None,
            containers: vec![],
            empty_dirs: vec![],
        };
        let reported = of_pod(&pod(), &empty, &[container()]);
        assert!(reported.metrics.is_empty() && reported.container_metrics.is_empty());
    }
}
