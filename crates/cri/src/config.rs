//! Settings of the CRI's door.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Runtime handlers accepted besides the empty one; a RuntimeClass names one of them.
    pub handlers: Vec<String>,
    /// What a container gets whose request says nothing about seccomp. A kubelet always says, by
    /// its own seccompDefault; for others silence means unconfined, as with containerd.
    pub default_seccomp: DefaultSeccomp,
    /// Added to a pod's memory limit for the guest's kernel and agent, when the request states no
    /// overhead of its own.
    pub guest_overhead_mib: u32,
    /// Smallest VM; a guest does not boot in less.
    pub min_memory_mib: u32,
    /// Bytes of each stream that ExecSync gives back; the rest of the output is thrown away.
    pub exec_output_limit: usize,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum DefaultSeccomp {
    RuntimeDefault,
    #[default]
    Unconfined,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            handlers: vec!["nacelle".into()],
            default_seccomp: DefaultSeccomp::Unconfined,
            guest_overhead_mib: 128,
            min_memory_mib: 128,
            exec_output_limit: 16 << 20,
        }
    }
}
