//! Statistics as `io.containerd.cgroups.v2.Metrics`, which containerd expects.

use containerd_shim_protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, NetworkStat, PidsStat,
};
use containerd_shim_protos::protobuf::MessageField;
use sandbox::stats::{
    BlockIoView, ContainerStatsView, CpuView, InterfaceView, MemoryView, PodStatsView,
};

pub(crate) fn container_metrics(stats: &ContainerStatsView) -> Metrics {
    let entries = stats.block_io.iter().map(io).collect();
    Metrics {
        pids: MessageField::some(PidsStat {
            current: stats.pids,
            limit: stats.processes.threads_max,
            ..Default::default()
        }),
        cpu: MessageField::some(cpu(&stats.cpu)),
        memory: MessageField::some(memory(&stats.memory)),
        io: MessageField::some(IOStat { usage: entries, ..Default::default() }),
        memory_events: MessageField::some(MemoryEvents {
            max: stats.memory.failures,
            oom: stats.oom_events,
            oom_kill: stats.oom_events,
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// Metrics of the whole guest.
pub(crate) fn pod_metrics(stats: &PodStatsView) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat { current: stats.pids, ..Default::default() }),
        cpu: MessageField::some(cpu(&stats.cpu)),
        memory: MessageField::some(memory(&stats.memory)),
        network: stats.interfaces.iter().map(network).collect(),
        ..Default::default()
    }
}

fn cpu(view: &CpuView) -> CPUStat {
    CPUStat {
        usage_usec: view.usage_ns / 1000,
        user_usec: view.user_ns / 1000,
        system_usec: view.system_ns / 1000,
        nr_periods: view.periods,
        nr_throttled: view.throttled_periods,
        throttled_usec: view.throttled_ns / 1000,
        ..Default::default()
    }
}

fn memory(view: &MemoryView) -> MemoryStat {
    MemoryStat {
        anon: view.rss,
        file: view.cache,
        file_mapped: view.mapped_file,
        active_file: view.total_active_file,
        // Readers compute the working set as usage minus inactive_file.
        inactive_file: view.usage.saturating_sub(view.working_set),
        pgfault: view.page_faults,
        pgmajfault: view.major_page_faults,
        usage: view.usage,
        // No limit ("max" in cgroup v2) is the maximum number in containerd.
        usage_limit: if view.limit == 0 { u64::MAX } else { view.limit },
        max_usage: view.peak,
        swap_usage: view.swap,
        ..Default::default()
    }
}

fn io(view: &BlockIoView) -> IOEntry {
    IOEntry {
        major: view.major.into(),
        minor: view.minor.into(),
        rbytes: view.read_bytes,
        wbytes: view.written_bytes,
        rios: view.reads,
        wios: view.writes,
        ..Default::default()
    }
}

fn network(view: &InterfaceView) -> NetworkStat {
    NetworkStat {
        name: view.name.clone(),
        rx_bytes: view.rx_bytes,
        rx_packets: view.rx_packets,
        rx_errors: view.rx_errors,
        rx_dropped: view.rx_dropped,
        tx_bytes: view.tx_bytes,
        tx_packets: view.tx_packets,
        tx_errors: view.tx_errors,
        tx_dropped: view.tx_dropped,
        ..Default::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::any;

    #[test]
    fn metrics_have_the_working_set_and_containerds_type() {
        let view = MemoryView { usage: 100, working_set: 60, limit: 0, ..Default::default() };
        let stat = memory(&view);
        assert_eq!(stat.usage - stat.inactive_file, 60);
        assert_eq!(stat.usage_limit, u64::MAX);
        assert_eq!(cpu(&CpuView { usage_ns: 5_000_000, ..Default::default() }).usage_usec, 5000);
        assert_eq!(any(&Metrics::new()).type_url, "io.containerd.cgroups.v2.Metrics");
    }
}
