//! Settings of the life cycle. Every field has a default; times are in milliseconds, sizes in
//! bytes unless the name says otherwise.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};

/// What a VMM takes ([`vmm_api::VmConfig::max_vcpus`]).
const MAX_VCPUS: u8 = 64;
/// What a pod can become unless the configuration says so.
const GROWTH: u32 = 4;
const GROWTH_AT_MOST_MIB: u32 = 16 << 10;
/// Characters of an id that is made here.
const ID_LENGTH: usize = 64;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Durable state: `pods/<id>/…`, the formatted scratch original.
    pub root: PathBuf,
    /// Sockets of running pods; may vanish with a reboot.
    pub state: PathBuf,
    /// The `nacelle-vmm` binary.
    pub vmm: PathBuf,
    /// The `nacelle-fs` binary, which shares folders of the host with a guest; empty: beside the
    /// VMM.
    pub file_server: PathBuf,
    /// The `nacelle-agent` binary, for pods without a VM; empty: beside the VMM.
    pub agent: PathBuf,
    /// Command that runs [`crate::launcher::main`] with a socket as its standard input.
    pub launcher: Vec<OsString>,
    /// An ELF `vmlinux`.
    pub kernel: PathBuf,
    /// cpio archive with the agent as `/init`.
    pub initramfs: PathBuf,
    pub kvm: PathBuf,
    /// The host's resolver configuration, for pods that bring none.
    pub resolv_conf: PathBuf,
    /// Appended to the guest kernel's command line.
    pub cmdline_extra: String,
    /// Kernels of pods run AppArmor where the host's does, so that containers can have the profiles
    /// that are loaded there.
    pub apparmor: bool,
    /// Mount point of cgroup v2; empty: `/sys/fs/cgroup`, or its `unified` folder on a host with
    /// both versions.
    pub cgroup_root: PathBuf,
    pub default_vcpus: u8,
    pub default_memory_mib: u32,
    /// vCPUs that a pod can be given while it runs, as far as the host has so many. Each costs the
    /// guest some 100 KiB from the start, whether it runs or not.
    pub max_vcpus: u8,
    /// Memory that a pod can be given while it runs. 0: four times what it starts with, but no more
    /// than 16 GiB beyond that. What it is not given costs nothing; only the devices of a guest that
    /// means harm could be made to fill it, which the limits of the pod's cgroup on the host bound.
    pub max_memory_mib: u32,
    /// Memory that a guest does not use goes back to the host: pages that are free, and page cache
    /// that an idle pod does not read.
    pub reclaim_memory: bool,
    /// Pods this node holds at most; a further one is refused.
    pub max_pods: usize,
    /// Containers in a pod at most; bounds the record and the guest's devices.
    pub max_containers: usize,
    /// Size of a container's writable layer.
    pub scratch_size: u64,
    /// Size of a pod's scratch disk, which has its containers' writable layers and its emptyDirs; at
    /// least `scratch_size`. The file is sparse.
    pub scratch_disk_size: u64,
    /// Where a kubelet's emptyDirs are.
    pub empty_dir: EmptyDirPlace,
    /// VMs that start at the same time; further ones wait. 0: twice the number of CPUs.
    pub start_parallelism: usize,
    /// VMMs run as `uid_base .. uid_base + uid_range`, a uid a pod.
    pub uid_base: u32,
    pub uid_range: u32,
    /// VMM launched to agent ready.
    pub boot_deadline_ms: u64,
    /// Ordinary calls into a guest.
    pub guest_call_deadline_ms: u64,
    /// Calls to a VMM's control socket.
    pub vmm_call_deadline_ms: u64,
    /// What the guest gets to power off before its VMM is killed.
    pub shutdown_deadline_ms: u64,
    pub ping_interval_ms: u64,
    /// Pings in a row without an answer after which a guest counts as dead.
    pub ping_misses: u32,
    pub stats_interval_ms: u64,
    /// Guests cache nothing of the host's folders that they share. Otherwise they keep a file's pages
    /// until its size or time is another one, and see a change of the host within a second.
    pub strict_volumes: bool,
    /// A copied volume at most, bytes of content.
    pub volume_bytes: u64,
    /// A copied volume at most, files and folders.
    pub volume_files: usize,
    /// Longest id of a pod. Who gives ids himself ([`crate::Sandboxes::run_pod_as`]) may have shorter
    /// ones, which leave a longer path to `state`: sockets bear the id in their paths.
    #[serde(skip)]
    pub id_length: usize,
    /// Folder of the formatted scratch originals, which several processes may use; empty: `root`.
    #[serde(skip)]
    pub scratch_originals: PathBuf,
    /// Nothing is logged: the output of containers waits in the guest for
    /// [`crate::Sandboxes::streams`].
    #[serde(skip)]
    pub caller_reads_output: bool,
}

/// Where the emptyDirs of a pod with a VM are; of a pod's first moment, it keeps them there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum EmptyDirPlace {
    /// On the pod's scratch disk, or in the memory of its VM.
    Guest,
    /// In the folders that a kubelet has made for them on the host, shared with the guest.
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
            empty_dir: EmptyDirPlace::Guest,
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
            scratch_originals: PathBuf::new(),
            caller_reads_output: false,
        }
    }
}

impl Config {
    pub fn boot_deadline(&self) -> Duration {
        Duration::from_millis(self.boot_deadline_ms)
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

    /// [`Self::file_server`] with its emptiness resolved.
    pub(crate) fn file_server(&self) -> PathBuf {
        if self.file_server.as_os_str().is_empty() {
            self.vmm.with_file_name("nacelle-fs")
        } else {
            self.file_server.clone()
        }
    }

    /// [`Self::agent`] with its emptiness resolved.
    pub(crate) fn agent(&self) -> PathBuf {
        if self.agent.as_os_str().is_empty() {
            self.vmm.with_file_name("nacelle-agent")
        } else {
            self.agent.clone()
        }
    }

    /// vCPUs of a VM that starts with `vcpus`, parked ones included.
    pub(crate) fn vcpus_at_most(&self, vcpus: u8) -> u8 {
        let host = std::thread::available_parallelism().map_or(1, |n| n.get());
        let host = u8::try_from(host).unwrap_or(u8::MAX);
        self.max_vcpus.min(host).min(MAX_VCPUS).max(vcpus)
    }

    /// [`Self::scratch_disk_size`], with room for a container's layer.
    pub(crate) fn scratch_disk_size(&self) -> u64 {
        self.scratch_disk_size.max(self.scratch_size)
    }

    /// [`Self::scratch_originals`] with its emptiness resolved.
    pub(crate) fn scratch_originals(&self) -> PathBuf {
        if self.scratch_originals.as_os_str().is_empty() {
            self.root.clone()
        } else {
            self.scratch_originals.clone()
        }
    }

    /// Memory that a VM which starts with `memory_mib` can become.
    pub(crate) fn memory_at_most(&self, memory_mib: u32) -> u32 {
        match self.max_memory_mib {
            0 => {
                memory_mib.saturating_mul(GROWTH).min(memory_mib.saturating_add(GROWTH_AT_MOST_MIB))
            }
            most => most.max(memory_mib),
        }
    }

    /// [`Self::start_parallelism`] with its 0 resolved.
    pub fn starts_at_once(&self) -> usize {
        match self.start_parallelism {
            0 => 2 * std::thread::available_parallelism().map_or(1, |n| n.get()),
            n => n,
        }
    }
}
