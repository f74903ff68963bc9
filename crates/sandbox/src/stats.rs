//! Resource usage of pods and containers, as last reported by their guests.

use std::time::SystemTime;

use crate::model::{ContainerId, PodId};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodStatsView {
    pub pod: PodId,
    pub at: SystemTime,
    pub cpu: CpuView,
    pub memory: MemoryView,
    pub pids: u64,
    pub interfaces: Vec<InterfaceView>,
    pub io_pressure: Option<PressureView>,
    pub containers: Vec<ContainerStatsView>,
    /// emptyDirs in the guest.
    pub empty_dirs: Vec<EmptyDirView>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EmptyDirView {
    /// Name of the volume.
    pub name: String,
    pub usage: FsView,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStatsView {
    pub id: ContainerId,
    pub at: SystemTime,
    pub cpu: CpuView,
    pub memory: MemoryView,
    pub pids: u64,
    pub writable_layer: FsView,
    pub processes: ProcessView,
    pub block_io: Vec<BlockIoView>,
    /// Kills by the OOM killer.
    pub oom_events: u64,
    /// As the guest reports it.
    pub started_at: Option<SystemTime>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuView {
    pub usage_ns: u64,
    /// Nanoseconds of CPU per second between the last two measurements; 0 after the first.
    pub usage_nano_cores: u64,
    pub user_ns: u64,
    pub system_ns: u64,
    pub throttled_ns: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    /// None: not supported by the guest's kernel.
    pub pressure: Option<PressureView>,
}

/// Time that some or all tasks waited for a resource, microseconds in total
/// (Documentation/accounting/psi.rst).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PressureView {
    pub some_us: u64,
    pub full_us: u64,
}

/// Bytes, and counts of faults and failures.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryView {
    pub usage: u64,
    pub working_set: u64,
    pub available: u64,
    pub rss: u64,
    pub cache: u64,
    pub mapped_file: u64,
    pub swap: u64,
    pub kernel: u64,
    /// 0: none.
    pub limit: u64,
    /// Peak usage; 0: unknown.
    pub peak: u64,
    /// Times the limit was reached.
    pub failures: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
    pub total_active_file: u64,
    pub total_inactive_file: u64,
    pub pressure: Option<PressureView>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FsView {
    pub used_bytes: u64,
    pub inodes_used: u64,
    pub capacity: u64,
    pub inodes: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessView {
    pub processes: u64,
    pub threads: u64,
    /// 0: no limit.
    pub threads_max: u64,
    pub file_descriptors: u64,
    pub sockets: u64,
    /// RLIMIT_NOFILE (soft) of the container's init process.
    pub ulimit_soft_nofile: u64,
}

/// I/O of one block device.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct BlockIoView {
    pub major: u32,
    pub minor: u32,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceView {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_packets: u64,
    pub rx_errors: u64,
    pub rx_dropped: u64,
    pub tx_bytes: u64,
    pub tx_packets: u64,
    pub tx_errors: u64,
    pub tx_dropped: u64,
}
