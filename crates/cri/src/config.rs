//! Settings of the CRI services.

use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Runtime handlers accepted besides the empty one; a RuntimeClass names one of them.
    pub handlers: Vec<String>,
    /// Seccomp profile of a container whose request has none. A kubelet always sets one, by
    /// its own seccompDefault; for other clients the default is unconfined, as with containerd.
    pub default_seccomp: DefaultSeccomp,
    /// Added to a pod's memory limit for the guest's kernel and agent, when the request states no
    /// overhead of its own.
    pub guest_overhead_mib: u32,
    /// Smallest VM; a guest does not boot in less.
    pub min_memory_mib: u32,
    /// Bytes of each stream that ExecSync returns; further output is discarded.
    pub exec_output_limit: usize,
    pub host_pods: HostPods,
}

/// Which pods may have namespaces of the host, and so run without a VM. All conditions must be met.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HostPods {
    pub enabled: bool,
    /// Kubernetes namespaces they may be of; `*`: any.
    pub namespaces: Vec<String>,
    /// Runtime handlers they may be started with; empty: any.
    pub handlers: Vec<String>,
    /// An annotation that has to be `true`; empty: none.
    pub annotation: String,
}

impl Default for HostPods {
    fn default() -> Self {
        Self {
            enabled: false,
            namespaces: vec!["kube-system".into()],
            handlers: Vec::new(),
            annotation: String::new(),
        }
    }
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
            host_pods: HostPods::default(),
        }
    }
}
