//! Measurements from the guests to the interface's statistics.

use sandbox::model::{ContainerView, PodView};
use sandbox::stats::{
    ContainerStatsView, CpuView, FsView, InterfaceView, MemoryView, PodStatsView, PressureView,
};

use super::status::{container_metadata, pod_metadata};
use super::time::nanos;
use crate::v1;

/// The interface that a pod's traffic counts by.
const DEFAULT_INTERFACE: &str = "eth0";

fn value(value: u64) -> Option<v1::UInt64Value> {
    Some(v1::UInt64Value { value })
}

/// Totals only, in nanoseconds: a guest keeps no averages for us.
fn pressure(view: Option<PressureView>) -> Option<v1::PsiStats> {
    let data = |microseconds: u64| {
        Some(v1::PsiData { total: microseconds.saturating_mul(1000), ..Default::default() })
    };
    view.map(|view| v1::PsiStats { full: data(view.full_us), some: data(view.some_us) })
}

fn cpu(view: &CpuView, timestamp: i64) -> v1::CpuUsage {
    v1::CpuUsage {
        timestamp,
        usage_core_nano_seconds: value(view.usage_ns),
        usage_nano_cores: value(view.usage_nano_cores),
        psi: pressure(view.pressure),
    }
}

fn memory(view: &MemoryView, timestamp: i64) -> v1::MemoryUsage {
    v1::MemoryUsage {
        timestamp,
        working_set_bytes: value(view.working_set),
        available_bytes: value(view.available),
        usage_bytes: value(view.usage),
        rss_bytes: value(view.rss),
        page_faults: value(view.page_faults),
        major_page_faults: value(view.major_page_faults),
        psi: pressure(view.pressure),
    }
}

/// A guest has no swap to give.
fn swap(view: &MemoryView, timestamp: i64) -> v1::SwapUsage {
    v1::SwapUsage { timestamp, swap_available_bytes: value(0), swap_usage_bytes: value(view.swap) }
}

fn writable_layer(view: &FsView, timestamp: i64, mountpoint: &str) -> v1::FilesystemUsage {
    v1::FilesystemUsage {
        timestamp,
        fs_id: Some(v1::FilesystemIdentifier { mountpoint: mountpoint.to_string() }),
        used_bytes: value(view.used_bytes),
        inodes_used: value(view.inodes_used),
    }
}

fn interface(view: &InterfaceView) -> v1::NetworkInterfaceUsage {
    v1::NetworkInterfaceUsage {
        name: view.name.clone(),
        rx_bytes: value(view.rx_bytes),
        rx_errors: value(view.rx_errors),
        tx_bytes: value(view.tx_bytes),
        tx_errors: value(view.tx_errors),
    }
}

/// None without the pod's own interface: a kubelet takes it for granted where there is a network. A
/// pod with the host's network has none, for the host's traffic is not the pod's.
fn network(interfaces: &[InterfaceView], timestamp: i64) -> Option<v1::NetworkUsage> {
    let (default, others): (Vec<_>, Vec<_>) =
        interfaces.iter().partition(|view| view.name == DEFAULT_INTERFACE);
    Some(v1::NetworkUsage {
        timestamp,
        default_interface: Some(interface(default.first()?)),
        interfaces: others.into_iter().map(interface).collect(),
    })
}

/// A container without a measurement (created, exited) has only its attributes, which a kubelet reads
/// without a check.
pub fn container(
    view: &ContainerView,
    stats: Option<&ContainerStatsView>,
    mountpoint: &str,
) -> v1::ContainerStats {
    let at = stats.map_or(0, |stats| nanos(stats.at));
    v1::ContainerStats {
        attributes: Some(v1::ContainerAttributes {
            id: view.id.clone(),
            metadata: Some(container_metadata(view)),
            labels: view.spec.meta.labels.clone(),
            annotations: view.spec.meta.annotations.clone(),
        }),
        cpu: stats.map(|stats| cpu(&stats.cpu, at)),
        memory: stats.map(|stats| memory(&stats.memory, at)),
        writable_layer: stats.map(|stats| writable_layer(&stats.writable_layer, at, mountpoint)),
        swap: stats.map(|stats| swap(&stats.memory, at)),
        io: None,
    }
}

/// Of a pod that was measured: a kubelet takes `linux` for granted.
pub fn pod(
    view: &PodView,
    stats: &PodStatsView,
    containers: Vec<v1::ContainerStats>,
) -> v1::PodSandboxStats {
    let at = nanos(stats.at);
    let linux = v1::LinuxPodSandboxStats {
        cpu: Some(cpu(&stats.cpu, at)),
        memory: Some(memory(&stats.memory, at)),
        network: network(&stats.interfaces, at),
        process: Some(v1::ProcessUsage { timestamp: at, process_count: value(stats.pids) }),
        containers,
        io: stats.io_pressure.map(|view| v1::IoUsage { timestamp: at, psi: pressure(Some(view)) }),
    };
    v1::PodSandboxStats {
        attributes: Some(v1::PodSandboxAttributes {
            id: view.id.clone(),
            metadata: Some(pod_metadata(view)),
            labels: view.spec.meta.labels.clone(),
            annotations: view.spec.meta.annotations.clone(),
        }),
        linux: Some(linux),
        windows: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pressure_is_reported_in_nanoseconds_if_known() {
        assert_eq!(pressure(None), None);
        let reported = pressure(Some(PressureView { some_us: 7, full_us: 3 })).unwrap();
        assert_eq!((reported.some.unwrap().total, reported.full.unwrap().total), (7000, 3000));
    }

    #[test]
    fn the_pods_own_interface_stands_apart_from_further_ones() {
        let named = |name: &str| InterfaceView { name: name.into(), ..InterfaceView::default() };
        let usage = network(&[named("net1"), named("eth0")], 1).unwrap();
        assert_eq!(usage.default_interface.unwrap().name, "eth0");
        assert_eq!(usage.interfaces.len(), 1);
        assert_eq!(usage.interfaces[0].name, "net1");
        assert_eq!(network(&[], 1), None);
        assert_eq!(network(&[named("net1")], 1), None);
    }

    /// What pkg/kubelet/stats/cri_stats_provider_linux.go reads without a look whether it is there.
    #[test]
    fn fields_that_a_kubelet_requires_are_always_set() {
        use crate::convert::tests::{container as view, pod as pod_view};
        for interfaces in
            [vec![], vec![InterfaceView { name: "eth0".into(), ..Default::default() }]]
        {
            let stats = PodStatsView {
                pod: "p".into(),
                at: std::time::UNIX_EPOCH,
                cpu: Default::default(),
                memory: Default::default(),
                pids: 0,
                interfaces,
                io_pressure: None,
                containers: vec![],
                empty_dirs: vec![],
            };
            let reported = pod(&pod_view(), &stats, vec![container(&view(), None, "/m")]);
            assert!(reported.attributes.unwrap().metadata.is_some());
            let linux = reported.linux.unwrap();
            assert!(linux.network.is_none_or(|network| network.default_interface.is_some()));
            let attributes = linux.containers[0].attributes.as_ref().unwrap();
            assert!(attributes.metadata.is_some() && !attributes.id.is_empty());
        }
    }
}
