//! Configuration. Every field has a default; times are in milliseconds, sizes in bytes unless the
//! name says otherwise.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Limit of the VMM ([`vmm_api::VmConfig::max_vcpus`]).
const MAX_VCPUS: u8 = 64;
/// Default maximum memory of a pod: `GROWTH` times the initial size, at most `MAX_GROWTH_MIB`
/// more.
const GROWTH: u32 = 4;
const MAX_GROWTH_MIB: u32 = 16 << 10;
/// Length of generated ids, characters.
const ID_LENGTH: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Persistent state: `pods/<id>/…`, the formatted scratch template.
    pub root: PathBuf,
    /// Sockets of running pods; may vanish with a reboot.
    pub state: PathBuf,
    /// The `nacelle-vmm` binary.
    pub vmm: PathBuf,
    /// The `nacelle-fs` binary, which serves host directories to a guest; empty: next to the VMM
    /// binary.
    pub file_server: PathBuf,
    /// The `nacelle-agent` binary, for host pods; empty: next to the VMM binary.
    pub agent: PathBuf,
    /// Command that runs [`crate::launcher::main`] with a socket as its standard input.
    pub launcher: Vec<OsString>,
    /// An ELF `vmlinux`.
    pub kernel: PathBuf,
    /// cpio archive with the agent as `/init`.
    pub initramfs: PathBuf,
    pub kvm: PathBuf,
    /// The host's resolv.conf, for pods without DNS configuration.
    pub resolv_conf: PathBuf,
    /// Appended to the guest kernel's command line.
    pub cmdline_extra: String,
    /// Enable AppArmor in guest kernels if the host has it enabled, so that containers can use the
    /// host's loaded profiles.
    pub apparmor: bool,
    /// Mount point of cgroup v2; empty: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on a host
    /// with both versions.
    pub cgroup_root: PathBuf,
    pub default_vcpus: u8,
    pub default_memory_mib: u32,
    /// Most vCPUs of a running pod, at most the number of host CPUs. Each costs the guest about 100
    /// KiB at boot, also while offline.
    pub max_vcpus: u8,
    /// Most memory of a running pod. 0: four times the initial size, at most 16 GiB more. Unplugged
    /// memory costs nothing; only the devices of a hostile guest could be made to fill it, which
    /// the pod's cgroup on the host limits.
    pub max_memory_mib: u32,
    /// Return unused guest memory to the host: free pages, and page cache of idle pods.
    pub reclaim_memory: bool,
    /// Most pods on this node; a further one is refused.
    pub max_pods: usize,
    /// Most containers in a pod; bounds the record and the guest's devices.
    pub max_containers: usize,
    /// Size of a container's writable layer.
    pub scratch_size: u64,
    /// Size of a pod's scratch disk with its writable layers and emptyDirs; at least
    /// `scratch_size`. The file is sparse.
    pub scratch_disk_size: u64,
    /// Location of emptyDirs.
    pub empty_dir: EmptyDirLocation,
    /// Most templates: VMs that were saved after their boot, in memory, from which further pods of
    /// the same size start. 0: every pod boots its kernel.
    pub templates: usize,
    /// Time after which a template is made anew.
    pub template_max_age_ms: u64,
    /// Concurrent VM starts; further ones wait. 0: twice the number of CPUs.
    pub start_parallelism: usize,
    /// VMMs run as `uid_base .. uid_base + uid_range`, one uid per pod.
    pub uid_base: u32,
    pub uid_range: u32,
    /// From the launch of the VMM to the agent's first answer.
    pub boot_deadline_ms: u64,
    /// Calls to a guest's agent.
    pub guest_call_deadline_ms: u64,
    /// Calls to a VMM's control socket.
    pub vmm_call_deadline_ms: u64,
    /// Time for the guest to power off before the VMM is killed.
    pub shutdown_deadline_ms: u64,
    pub ping_interval_ms: u64,
    /// Consecutive missed pings after which a guest is killed.
    pub ping_misses: u32,
    pub stats_interval_ms: u64,
    /// Guests do not cache shared host directories. Otherwise they cache a file's pages until its
    /// size or modification time changes, and see a change on the host within a second.
    pub strict_volumes: bool,
    /// Largest copied volume, bytes.
    pub volume_bytes: u64,
    /// Largest copied volume, files and directories.
    pub volume_files: usize,
    /// Longest id of a pod. A caller that provides ids ([`crate::Sandboxes::run_pod_with_id`]) may
    /// use shorter ones, which allows a longer `state` path: socket paths contain the id.
    #[serde(skip)]
    pub id_length: usize,
    /// Directory of the formatted scratch templates, which several processes may share; empty:
    /// `root`.
    #[serde(skip)]
    pub scratch_templates: PathBuf,
    /// No log files: the guest buffers the output of containers for [`crate::Sandboxes::streams`].
    #[serde(skip)]
    pub caller_reads_output: bool,
}

/// Location of the emptyDirs of a pod with a VM; fixed when the pod starts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmptyDirLocation {
    /// On the pod's scratch disk, or in the memory of its VM.
    Guest,
    /// In the kubelet's directories on the host, shared with the guest.
    Share,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: "/var/lib/nacelle".into(),
            state: "/run/nacelle".into(),
            vmm: "/usr/lib/nacelle/nacelle-vmm".into(),
            file_server: PathBuf::new(),
            agent: PathBuf::new(),
            launcher: vec!["/proc/self/exe".into(), "launcher".into()],
            kernel: "/usr/lib/nacelle/vmlinux".into(),
            initramfs: "/usr/lib/nacelle/initramfs.cpio".into(),
            kvm: "/dev/kvm".into(),
            resolv_conf: "/etc/resolv.conf".into(),
            cmdline_extra: String::new(),
            apparmor: true,
            cgroup_root: PathBuf::new(),
            default_vcpus: 2,
            default_memory_mib: 2048,
            max_vcpus: 16,
            max_memory_mib: 0,
            reclaim_memory: true,
            max_pods: 1024,
            max_containers: 128,
            scratch_size: 10 << 30,
            scratch_disk_size: 64 << 30,
            empty_dir: EmptyDirLocation::Guest,
            templates: 2,
            template_max_age_ms: 24 * 3600 * 1000,
            start_parallelism: 0,
            uid_base: 0x7000_0000,
            uid_range: 65_536,
            boot_deadline_ms: 60_000,
            guest_call_deadline_ms: 30_000,
            vmm_call_deadline_ms: 10_000,
            shutdown_deadline_ms: 2_000,
            ping_interval_ms: 5_000,
            ping_misses: 6,
            stats_interval_ms: 5_000,
            strict_volumes: false,
            volume_bytes: 64 << 20,
            volume_files: 4096,
            id_length: ID_LENGTH,
            scratch_templates: PathBuf::new(),
            caller_reads_output: false,
        }
    }
}

impl Config {
    pub fn boot_deadline(&self) -> Duration {
        Duration::from_millis(self.boot_deadline_ms)
    }

    pub fn template_max_age(&self) -> Duration {
        Duration::from_millis(self.template_max_age_ms)
    }

    pub fn guest_call_deadline(&self) -> Duration {
        Duration::from_millis(self.guest_call_deadline_ms)
    }

    pub fn vmm_call_deadline(&self) -> Duration {
        Duration::from_millis(self.vmm_call_deadline_ms)
    }

    pub fn shutdown_deadline(&self) -> Duration {
        Duration::from_millis(self.shutdown_deadline_ms)
    }

    pub fn ping_interval(&self) -> Duration {
        Duration::from_millis(self.ping_interval_ms)
    }

    pub fn stats_interval(&self) -> Duration {
        Duration::from_millis(self.stats_interval_ms)
    }

    /// [`Self::file_server`] with the default applied.
    pub(crate) fn file_server(&self) -> PathBuf {
        if self.file_server.as_os_str().is_empty() {
            self.vmm.with_file_name("nacelle-fs")
        } else {
            self.file_server.clone()
        }
    }

    /// [`Self::agent`] with the default applied.
    pub(crate) fn agent(&self) -> PathBuf {
        if self.agent.as_os_str().is_empty() {
            self.vmm.with_file_name("nacelle-agent")
        } else {
            self.agent.clone()
        }
    }

    /// Maximum vCPUs of a VM that starts with `vcpus`, including offline ones.
    pub(crate) fn max_vcpus_of(&self, vcpus: u8) -> u8 {
        let host = std::thread::available_parallelism().map_or(1, |n| n.get());
        let host = u8::try_from(host).unwrap_or(u8::MAX);
        self.max_vcpus.min(host).min(MAX_VCPUS).max(vcpus)
    }

    /// [`Self::scratch_disk_size`], but at least one writable layer.
    pub(crate) fn scratch_disk_size(&self) -> u64 {
        self.scratch_disk_size.max(self.scratch_size)
    }

    /// [`Self::scratch_templates`] with the default applied.
    pub(crate) fn scratch_templates(&self) -> PathBuf {
        if self.scratch_templates.as_os_str().is_empty() {
            self.root.clone()
        } else {
            self.scratch_templates.clone()
        }
    }

    /// Maximum memory of a VM that starts with `memory_mib`.
    pub(crate) fn max_memory_of(&self, memory_mib: u32) -> u32 {
        match self.max_memory_mib {
            0 => memory_mib.saturating_mul(GROWTH).min(memory_mib.saturating_add(MAX_GROWTH_MIB)),
            most => most.max(memory_mib),
        }
    }

    /// [`Self::start_parallelism`] with the default applied.
    pub fn max_concurrent_starts(&self) -> usize {
        match self.start_parallelism {
            0 => 2 * std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        }
    }
}
