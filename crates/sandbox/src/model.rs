//! Public types of pods and containers: requests ([`PodSpec`], [`ContainerSpec`], [`ExecSpec`]) and
//! their state ([`PodView`], [`ContainerView`]). Plain values, no I/O.
//!
//! Life cycles:
//! ```text
//! pod:        Reserved -> Ready -> NotReady -> (removed)
//! container:  Created -> Running -> Exited -> (removed)
//! ```

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

pub type PodId = String;
pub type ContainerId = String;

/// Names, labels and annotations of the caller: stored and returned, never interpreted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Meta {
    pub name: String,
    /// Of pods only.
    pub namespace: String,
    /// Of pods only.
    pub uid: String,
    pub attempt: u32,
    pub labels: BTreeMap<String, String>,
    pub annotations: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PodSpec {
    pub meta: Meta,
    pub hostname: String,
    /// Runtime handler named by the caller; returned in the view.
    pub handler: String,
    /// Parent cgroup below the cgroup v2 root (e.g. `/kubepods/burstable/pod…`); the VMM's cgroup
    /// is made in it. Empty: `/nacelle`.
    pub cgroup_parent: String,
    /// Directory of container logs; empty: no logs.
    pub log_directory: String,
    pub sysctls: BTreeMap<String, String>,
    pub dns: Dns,
    pub ports: Vec<PortMapping>,
    /// vCPUs; None: the configured default.
    pub vcpus: Option<u8>,
    /// Memory of the VM, MiB; None: the configured default.
    pub memory_mib: Option<u32>,
    /// CPU limits of the VM on the host.
    pub cpu: CpuLimits,
    /// A host pod: runs on the host and not in a VM. The caller decides whether that is allowed.
    pub host: Option<HostNamespaces>,
    /// The caller's complete request as JSON, for verbose status.
    pub origin: serde_json::Value,
}

/// Namespaces that a pod shares with the host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostNamespaces {
    /// Includes the UTS namespace.
    pub network: bool,
    pub pid: bool,
    pub ipc: bool,
}

/// Limits of a cgroup (cgroup-v2.rst, "CPU Interface Files").
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuLimits {
    /// Microseconds of CPU time per period; None: unlimited.
    pub quota_us: Option<u64>,
    /// None: the kernel's default, 100 ms.
    pub period_us: Option<u64>,
    /// CPU shares as in cgroup v1, 2 to 262144; None: 1024.
    pub shares: Option<u64>,
}

/// Inputs for a pod's size that are not in its request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodSizing {
    /// Default size of a pod without limits.
    pub vcpus: u8,
    pub memory_mib: u32,
    /// The parent cgroup has no limit of CPU time.
    pub cpu_unlimited: bool,
    /// The parent cgroup has no limit of memory.
    pub memory_unlimited: bool,
}

/// A resize of a running pod; None: unchanged.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodResources {
    /// Online vCPUs.
    pub vcpus: Option<u8>,
    /// Memory, MiB, up to the configured maximum. The VM keeps its boot memory: below that, only
    /// the containers' limits apply.
    pub memory_mib: Option<u32>,
    pub cpu: Option<CpuLimits>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Dns {
    pub servers: Vec<String>,
    pub searches: Vec<String>,
    pub options: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Protocol {
    Tcp,
    Udp,
    Sctp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PortMapping {
    pub protocol: Protocol,
    pub container_port: u16,
    pub host_port: u16,
    pub host_ip: Option<IpAddr>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PodState {
    /// Id reserved, not started yet; never listed.
    Reserved,
    Ready,
    /// Stopped, or its VM died.
    NotReady,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PodView {
    pub id: PodId,
    /// Shared, so that listings do not copy the specification.
    pub spec: Arc<PodSpec>,
    pub state: PodState,
    pub created_at: SystemTime,
    /// Why the pod is not ready; empty if it is ready or was stopped on request.
    pub reason: String,
    /// First is the primary address.
    pub addresses: Vec<IpAddr>,
    pub netns: Option<PathBuf>,
    pub vmm_pid: Option<u32>,
    pub kernel_release: String,
    /// The pod's record is unreadable ([`Self::reason`] has the error): most of `spec` is empty.
    pub unreadable: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ContainerSpec {
    pub meta: Meta,
    /// Root file system.
    pub rootfs: RootfsSpec,
    /// OCI runtime spec; the guest fills in `root` and the rootfs' own mounts. `mounts` has only
    /// guest-side ones (proc, sysfs, tmpfs, devpts, ...).
    pub oci: oci_spec::runtime::Spec,
    /// `user[:group]`, resolved in the root file system; empty: `oci.process.user` applies.
    pub user: String,
    pub pid: PidMode,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    /// Relative to the pod's log directory; empty: no log.
    pub log_path: String,
    /// Volumes, parents before their children.
    pub volumes: Vec<Volume>,
    /// Block devices of the host.
    pub devices: Vec<BlockDevice>,
    /// Only the groups in `oci.process.user`, not those of the image's /etc/group
    /// (SupplementalGroupsPolicy Strict).
    pub strict_groups: bool,
    /// Image name of the caller, and its id; returned in the view.
    pub image_name: String,
    pub image_id: String,
    /// Stop signal (number); 15 if the image has none.
    pub stop_signal: u32,
    /// Container paths of strict volumes: the guest does not cache them.
    pub strict_volumes: Vec<String>,
    pub origin: serde_json::Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsSpec {
    /// EROFS image on the host, attached read-only. Empty: the lower layer is a host directory,
    /// shared by the volume at `/` ([`Volume::is_lower_layer`]).
    pub image: PathBuf,
    pub read_only: bool,
    /// Writable paths in it even if read-only: the image's VOLUMEs.
    pub volumes: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Volume {
    pub container_path: String,
    pub source: VolumeSource,
    pub access: Access,
    pub propagation: Propagation,
}

impl Volume {
    /// The volume is the lower layer of the container's root file system.
    pub fn is_lower_layer(&self, rootfs: &RootfsSpec) -> bool {
        let shared = matches!(self.source, VolumeSource::Shared { .. });
        rootfs.image.as_os_str().is_empty() && self.container_path == "/" && shared
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// Small host files, copied into a tmpfs of the guest once.
    Copied { host_path: PathBuf },
    /// A directory updated atomically by a `..data` link (ConfigMap, Secret, projected, downward
    /// API): copied, and updated while the container lives.
    Synced { host_path: PathBuf },
    /// A file that the container writes and the host reads after its exit (termination log): a copy
    /// that is written back when the container exits.
    WrittenBack { host_path: PathBuf },
    /// A host file or directory, shared with the guest.
    Shared { host_path: PathBuf },
    /// An EROFS image on the host, or a path inside it; always read-only.
    Image { image: PathBuf, sub_path: String },
    /// A kubelet's emptyDir: in the guest, or shared from the host.
    EmptyDir {
        /// The mounted path on the host.
        host_path: PathBuf,
        /// The volume's directory on the host; its name is the volume's name.
        directory: PathBuf,
        /// Path in the volume; empty: all of it.
        sub_path: String,
        /// Bytes.
        size_limit: Option<u64>,
    },
    /// hugetlbfs in the guest; containers with the same name share it.
    HugePages { name: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    /// Submounts of the source keep their own access.
    ReadOnly,
    ReadOnlyRecursive,
}

/// The share that serves a volume ([`VolumeSource::Shared`]); volumes of a pod may use the same
/// share.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareUse {
    /// Index of the volume in its container.
    pub(crate) volume: usize,
    pub(crate) name: String,
    /// Shared path on the host, and the path of the volume in it.
    pub(crate) source: PathBuf,
    pub(crate) sub_path: String,
    pub(crate) access: Access,
    pub(crate) propagation: Propagation,
    /// Id mappings as text; empty: none.
    pub(crate) ids: String,
    /// Not cached by the guest.
    pub(crate) strict: bool,
}

/// mount_namespaces(7), between the host and the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Propagation {
    #[default]
    Private,
    /// Later mounts of the host below the source appear in the container.
    HostToContainer,
    /// Also mounts of the container appear on the host; host pods only.
    Bidirectional,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    pub host_path: PathBuf,
    pub container_path: String,
    /// Device access, characters of `rwm`.
    pub permissions: String,
}

/// The process' user as resolved by the guest.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Primary group first.
    pub groups: Vec<u32>,
}

/// Kind of a lifecycle event.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Created,
    Started,
    Stopped,
    Deleted,
}

/// Sent after the change is journaled and visible in listings.
#[derive(Debug, Clone)]
pub struct Event {
    pub kind: EventKind,
    pub at: SystemTime,
    pub pod: PodId,
    /// None: the pod itself.
    pub container: Option<ContainerId>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum PidMode {
    #[default]
    Container,
    Pod,
    Target(ContainerId),
    /// The host's PID namespace; host pods only.
    Node,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ContainerState {
    Created,
    Running,
    Exited,
    /// The VM does not answer.
    Unknown,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ContainerView {
    pub id: ContainerId,
    pub pod: PodId,
    pub spec: Arc<ContainerSpec>,
    pub state: ContainerState,
    pub created_at: SystemTime,
    pub started_at: Option<SystemTime>,
    pub exit: Option<ExitView>,
    /// Absolute; empty: none.
    pub log_path: PathBuf,
    /// Current limits.
    pub resources: oci_spec::runtime::LinuxResources,
    /// None until the guest has created the process.
    pub user: Option<Identity>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitView {
    /// Exit status, or 128 + signal; -1 if the VM died before the exit was reported.
    pub code: i32,
    pub oom_killed: bool,
    pub at: SystemTime,
    /// `Completed`, `Error`, `OOMKilled`, `StartError`, `VmDied`, `AgentDied`, ...
    pub reason: String,
    pub message: String,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ExecSpec {
    pub command: Vec<String>,
    pub tty: bool,
    pub stdin: bool,
    /// Environment in addition to the container's.
    pub env: Vec<String>,
    /// Empty: the container's user and working directory.
    pub user: String,
    pub cwd: String,
    pub tty_size: Option<(u16, u16)>,
}

/// Result of a finished, non-interactive exec.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ExecOutput {
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub code: i32,
}

/// One phase of a pod's start.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TracePhase {
    /// e.g. `network`, `launch`, `boot`, `configure`.
    pub name: String,
    /// Microseconds since the request arrived.
    pub start_us: u64,
    pub duration_us: u64,
}

/// Filter of a listing; all fields must match.
#[derive(Debug, Clone, Default)]
pub struct Filter {
    /// Id or unambiguous id prefix.
    pub id: Option<String>,
    pub pod: Option<PodId>,
    pub labels: BTreeMap<String, String>,
}
