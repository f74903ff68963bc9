//! The shim's configuration: /etc/nacelle/shim.toml, which is optional. [`DEFAULT_FILE`] documents it;
//! a test compares it with the defaults.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::paths::{KEY_LENGTH, PodPaths};

#[cfg(test)]
const DEFAULT_FILE: &str = include_str!("../dist/shim.toml");
const PATH: &str = "/etc/nacelle/shim.toml";
/// Copy of the settings in the bundle of each task of a pod. A pod keeps the settings that it was
/// started with, so that its files are found after a change of shim.toml.
const SAVED: &str = "nacelle-shim.json";
/// Overrides the path, for tests.
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

/// Bundle of a sandbox that containerd 2.x has created by the Sandbox service, from the directory of its
/// namespace's tasks: `<state>/io.containerd.runtime.v2.task/<namespace>`.
fn sandbox_bundle(tasks: &Path, pod: &str) -> Option<PathBuf> {
    let (namespace, state) = (tasks.file_name()?, tasks.parent()?.parent()?);
    Some(state.join("io.containerd.sandbox.controller.v1.shim").join(namespace).join(pod))
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

    /// Settings of a task's pod: those that are saved in its bundle, or in its pod's, which is beside it;
    /// for a new pod those of shim.toml.
    pub(crate) fn of_task(bundle: &Path, pod: Option<&str>) -> Result<Self> {
        let of_pod = || {
            let (pod, tasks) = (pod?, bundle.parent()?);
            Self::saved(&tasks.join(pod)).or_else(|| Self::saved(&sandbox_bundle(tasks, pod)?))
        };
        match Self::saved(bundle).or_else(of_pod) {
            Some(settings) => Ok(settings),
            None => Self::load(),
        }
    }

    fn saved(bundle: &Path) -> Option<Self> {
        Self::read_saved(&bundle.join(SAVED))
    }

    /// Settings of a pod without a shim in the root directory of these settings: those that it was started
    /// with, if they are readable and name the same root directory.
    pub(crate) fn of_former_pod(&self, key: &str) -> Self {
        let saved = Self::read_saved(&PodPaths::from_key(self, key.to_owned()).settings());
        saved.filter(|saved| saved.root == self.root).unwrap_or_else(|| self.clone())
    }

    /// None also if the file is of a release with other settings.
    fn read_saved(path: &Path) -> Option<Self> {
        serde_json::from_slice(&std::fs::read(path).ok()?).ok()
    }

    pub(crate) fn save(&self, bundle: &Path) -> Result<()> {
        self.write(&bundle.join(SAVED))
    }

    /// Replaces the file atomically.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let new = path.with_extension("new");
        let written = std::fs::write(&new, serde_json::to_vec(self)?);
        let written = written.and_then(|()| std::fs::rename(&new, path));
        written.with_context(|| format!("writing {}", path.display()))
    }

    /// Configuration of the sandbox crate for one pod.
    pub(crate) fn sandbox_config(&self, paths: &PodPaths, uid: u32) -> sandbox::Config {
        sandbox::Config {
            root: paths.root.clone(),
            state: paths.state.clone(),
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
            // A shim has one pod.
            templates: 0,
            id_length: KEY_LENGTH,
            scratch_templates: paths.originals.clone(),
            caller_reads_output: true,
            ..sandbox::Config::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pod_keeps_the_settings_that_it_was_started_with() {
        let dir = tempfile::tempdir().unwrap();
        let (pod, container) = (dir.path().join("p"), dir.path().join("c"));
        std::fs::create_dir_all(&pod).unwrap();
        std::fs::create_dir_all(&container).unwrap();
        let started = Settings { root: "/elsewhere".into(), ..Settings::default() };
        started.save(&pod).unwrap();
        assert_eq!(Settings::of_task(&pod, None).unwrap(), started);
        assert_eq!(Settings::of_task(&container, Some("p")).unwrap(), started);
        // The copy of the container is used when its pod's bundle is gone.
        started.save(&container).unwrap();
        std::fs::remove_dir_all(&pod).unwrap();
        assert_eq!(Settings::of_task(&container, Some("p")).unwrap(), started);
        let state = dir.path().join("state");
        let bundle = |plugin: &str, id: &str| {
            let path = state.join(plugin).join("k8s.io").join(id);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let sandbox = bundle("io.containerd.sandbox.controller.v1.shim", "p");
        let task = bundle("io.containerd.runtime.v2.task", "c");
        started.save(&sandbox).unwrap();
        assert_eq!(Settings::of_task(&task, Some("p")).unwrap(), started);
        std::fs::write(container.join(SAVED), r#"{"setting_of_another_release": 1}"#).unwrap();
        assert_eq!(Settings::saved(&container), None);
    }

    #[test]
    fn the_default_file_has_all_settings_with_their_defaults() {
        assert_eq!(toml::from_str::<Settings>(DEFAULT_FILE).unwrap(), Settings::default());
        let table: toml::Table = DEFAULT_FILE.parse().unwrap();
        let all = toml::Table::try_from(Settings::default()).unwrap();
        let (mut named, mut known): (Vec<_>, Vec<_>) =
            (table.keys().collect(), all.keys().collect());
        named.sort();
        known.sort();
        assert_eq!(named, known);
    }
}
