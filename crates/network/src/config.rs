//! Configuration of [`crate::Cni`]: directories, timeouts, limits. All fields have defaults.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Settings of [`crate::Cni`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Network configurations; the first `.conflist`, `.conf` or `.json` by name is used. Read for
    /// each pod, so a change needs no restart.
    pub conf_dir: PathBuf,
    /// Directories that are searched for plugins, in order.
    pub bin_dirs: Vec<PathBuf>,
    /// Records of the pods' networks, kept until the networks are removed. Must survive a reboot,
    /// because IPAM leases do.
    pub cache_dir: PathBuf,
    /// Cache directory of libcni, with a file for each attachment of a pod to a network. nacelle
    /// writes such files for its pods, and its GC keeps the pods that have one. Empty: not used.
    pub results_dir: PathBuf,
    /// Directory in which network namespaces are mounted, as by `ip netns`.
    pub netns_dir: PathBuf,
    /// Name of the pod's first interface (CNI_IFNAME).
    pub interface: String,
    /// Timeout of a plugin, milliseconds; it is then killed with its children.
    pub plugin_timeout_ms: u64,
    /// Maximum bytes of a plugin on each of stdout and stderr.
    pub plugin_output_limit: usize,
    /// Maximum concurrent attaches, and the same for detaches; 0: twice the number of CPUs.
    pub parallel: usize,
    /// Run CHECK after ADD.
    pub check_after_add: bool,
    /// Minimum interval between GCs after a detach, milliseconds. GC needs cniVersion 1.1.0 or
    /// later.
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
