//! Usage of pods and containers as last measured by their guests.

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
    pub containers: Vec<ContainerStatsView>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerStatsView {
    pub id: ContainerId,
    pub at: SystemTime,
    pub cpu: CpuView,
    pub memory: MemoryView,
    pub pids: u64,
    pub writable_layer: FsView,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuView {
    pub usage_ns: u64,
    /// Nanoseconds of CPU a second, between the last two measurements; 0 after the first.
    pub usage_nano_cores: u64,
    pub throttled_ns: u64,
    pub periods: u64,
    pub throttled_periods: u64,
}

/// Bytes, and counts of faults.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MemoryView {
    pub usage: u64,
    pub working_set: u64,
    pub available: u64,
    pub rss: u64,
    pub page_faults: u64,
    pub major_page_faults: u64,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FsView {
    pub used_bytes: u64,
    pub inodes_used: u64,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct InterfaceView {
    pub name: String,
    pub rx_bytes: u64,
    pub rx_errors: u64,
    pub tx_bytes: u64,
    pub tx_errors: u64,
}
