//! The shim's configuration: /etc/nacelle/shim.toml, which need not be there. [`TEMPLATE`] documents
//! it; a test holds it to the defaults.

use std::io::ErrorKind;
use std::path::PathBuf;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::place::{KEY, Place};

#[cfg(test)]
const TEMPLATE: &str = include_str!("../dist/shim.toml");
const PATH: &str = "/etc/nacelle/shim.toml";
/// Another file, for tests.
const PATH_VARIABLE: &str = "NACELLE_SHIM_CONFIG";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct Settings {
    /// Journals and scratch disks of running pods.
    pub(crate) root: PathBuf,
    /// Sockets.
    pub(crate) state: PathBuf,
    pub(crate) vmm: PathBuf,
    pub(crate) kernel: PathBuf,
    pub(crate) initramfs: PathBuf,
    /// tracing-subscriber's EnvFilter.
    pub(crate) log_level: String,
    /// Added to a pod's memory limit for its kernel and agent.
    pub(crate) guest_overhead_mib: u32,
    pub(crate) min_memory_mib: u32,
    pub(crate) default_vcpus: u8,
    pub(crate) default_memory_mib: u32,
    pub(crate) max_vcpus: u8,
    pub(crate) cmdline_extra: String,
    pub(crate) scratch_size: u64,
    pub(crate) scratch_disk_size: u64,
}

impl Default for Settings {
    fn default() -> Self {
        let pods = sandbox::Config::default();
        Self {
            root: "/var/lib/nacelle-shim".into(),
            state: "/run/nacelle-shim".into(),
            vmm: pods.vmm,
            kernel: pods.kernel,
            initramfs: pods.initramfs,
            log_level: "info".into(),
            guest_overhead_mib: 128,
            min_memory_mib: 128,
            default_vcpus: pods.default_vcpus,
            default_memory_mib: pods.default_memory_mib,
            max_vcpus: pods.max_vcpus,
            cmdline_extra: pods.cmdline_extra,
            scratch_size: pods.scratch_size,
            scratch_disk_size: pods.scratch_disk_size,
        }
    }
}

impl Settings {
    pub(crate) fn load() -> Result<Self> {
        let path = std::env::var_os(PATH_VARIABLE).map_or_else(|| PATH.into(), PathBuf::from);
        let text = match std::fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Self::default()),
            Err(error) => return Err(error).with_context(|| format!("reading {}", path.display())),
        };
        toml::from_str(&text).with_context(|| format!("reading {}", path.display()))
    }

    /// Of a sandbox which is one pod's.
    pub(crate) fn pods(&self, place: &Place, uid: u32) -> sandbox::Config {
        sandbox::Config {
            root: place.root.clone(),
            state: place.state.clone(),
            vmm: self.vmm.clone(),
            kernel: self.kernel.clone(),
            initramfs: self.initramfs.clone(),
            cmdline_extra: self.cmdline_extra.clone(),
            default_vcpus: self.default_vcpus,
            default_memory_mib: self.default_memory_mib,
            max_vcpus: self.max_vcpus,
            scratch_size: self.scratch_size,
            scratch_disk_size: self.scratch_disk_size,
            max_pods: 1,
            uid_base: uid,
            uid_range: 1,
            start_parallelism: 1,
            id_length: KEY,
            scratch_templates: place.originals.clone(),
            caller_reads_output: true,
            ..sandbox::Config::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_template_says_the_defaults() {
        assert_eq!(toml::from_str::<Settings>(TEMPLATE).unwrap(), Settings::default());
        let table: toml::Table = TEMPLATE.parse().unwrap();
        let all = toml::Table::try_from(Settings::default()).unwrap();
        let (mut named, mut known): (Vec<_>, Vec<_>) =
            (table.keys().collect(), all.keys().collect());
        named.sort();
        known.sort();
        assert_eq!(named, known);
    }
}
