//! Where things are and how long they may take. Every field has a default, so that a configuration
//! names only what differs.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of [`crate::Cni`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Network configurations; the first `.conflist`, `.conf` or `.json` by name counts. It is read
    /// again for each pod, so a new one needs no restart.
    pub conf_dir: PathBuf,
    /// Where plugins are looked for, in this order.
    pub bin_dirs: Vec<PathBuf>,
    /// What each pod was given, kept until it has been given back; must survive a reboot, because
    /// address leases do.
    pub cache_dir: PathBuf,
    /// Where runtimes that use the reference library (libcni) keep a file for each pod on a network.
    /// Our pods get one too, and a GC spares the pods that have one. Empty: none is written or read.
    pub results_dir: PathBuf,
    /// Where network namespaces are mounted, as `ip netns` does.
    pub netns_dir: PathBuf,
    /// Name of the pod's first interface.
    pub interface: String,
    /// A plugin that takes longer is killed together with its children.
    pub plugin_timeout_ms: u64,
    /// Bytes of output a plugin may write to each of stdout and stderr.
    pub plugin_output_limit: usize,
    /// Pods attached or detached at the same time; 0: twice the number of CPUs.
    pub parallel: usize,
    /// Run the plugins' CHECK right after ADD.
    pub check_after_add: bool,
    /// After a removal plugins are asked to collect garbage (GC, where the network's cniVersion is
    /// 1.1.0 or later), but not more often than this.
    pub gc_interval_ms: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into(), "/usr/lib/cni".into()],
            cache_dir: "/var/lib/nacelle/network".into(),
            results_dir: "/var/lib/cni/results".into(),
            netns_dir: "/run/netns".into(),
            interface: "eth0".into(),
            plugin_timeout_ms: 30_000,
            plugin_output_limit: 1 << 20,
            parallel: 0,
            check_after_add: false,
            gc_interval_ms: 300_000,
        }
    }
}

impl Config {
    pub(crate) fn plugin_timeout(&self) -> Duration {
        Duration::from_millis(self.plugin_timeout_ms)
    }

    pub(crate) fn parallelism(&self) -> usize {
        if self.parallel > 0 {
            return self.parallel;
        }
        2 * std::thread::available_parallelism().map_or(2, usize::from)
    }
}
