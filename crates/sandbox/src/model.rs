//! What a pod and a container are here: requests in ([`PodSpec`], [`ContainerSpec`], [`ExecSpec`]),
//! observations out ([`PodView`], [`ContainerView`]). Plain values; nothing here does I/O.
//!
//! The life cycles:
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

/// Labels, annotations and the caller's own names: kept and given back, never interpreted.
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
    /// Runtime handler the caller named; given back in the view.
    pub handler: String,
    /// Parent cgroup below the cgroup v2 root (e.g. `/kubepods/burstable/pod…`); the VMM's cgroup
    /// is made in it. Empty: `/nacelle`.
    pub cgroup_parent: String,
    /// Folder for container logs; empty: none are written.
    pub log_directory: String,
    pub sysctls: BTreeMap<String, String>,
    pub dns: Dns,
    pub ports: Vec<PortMapping>,
    /// CPUs the VM gets; none: the configured default.
    pub vcpus: Option<u8>,
    /// Memory of the VM, MiB; none: the configured default.
    pub memory_mib: Option<u32>,
    /// What the VM may take of the host's CPUs.
    pub cpu: CpuLimits,
    /// The pod has namespaces of the host, so it runs there and not in a VM. Whether it may is its
    /// caller's to decide.
    pub host: Option<HostNamespaces>,
    /// Whole request as the caller gave it (JSON), for verbose status.
    pub origin: serde_json::Value,
}

/// Namespaces that a pod has in common with its host.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct HostNamespaces {
    /// And the host's name.
    pub network: bool,
    pub pid: bool,
    pub ipc: bool,
}

/// Limits of a cgroup (cgroup-v2.rst, "CPU Interface Files").
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CpuLimits {
    /// Microseconds of CPU time in a period; none: no cap.
    pub quota_us: Option<u64>,
    /// None: the kernel's default, 100 ms.
    pub period_us: Option<u64>,
    /// Share among those who want more than there is, as cgroup v1 counts it: 2 to 262144; none:
    /// 1024.
    pub shares: Option<u64>,
}

/// What a pod may have that its request does not say.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Room {
    /// Size of a pod that states no limits.
    pub vcpus: u8,
    pub memory_mib: u32,
    /// The parent of the pod's cgroup has no limit of CPU time.
    pub open_cpu: bool,
    /// It has none of memory.
    pub open_memory: bool,
}

/// A change of what a running pod has; what is none stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct PodResources {
    /// CPUs that run in the VM.
    pub vcpus: Option<u8>,
    /// Memory, MiB, up to what the configuration allows. The VM keeps what it was started with: less
    /// than that is a promise that the containers' limits keep.
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
    /// Id taken, not started yet; never listed.
    Reserved,
    Ready,
    /// Stopped, or its VM died.
    NotReady,
}

#[derive(Debug, Clone, PartialEq)]
pub struct PodView {
    pub id: PodId,
    /// Shared: a listing copies no specification.
    pub spec: Arc<PodSpec>,
    pub state: PodState,
    pub created_at: SystemTime,
    /// Why the pod is not ready, for people; empty while it is, or when it was stopped on request.
    pub reason: String,
    /// First is the primary address.
    pub addresses: Vec<IpAddr>,
    pub netns: Option<PathBuf>,
    pub vmm_pid: Option<u32>,
    pub kernel_release: String,
    /// The pod's record cannot be read ([`Self::reason`] says why): most of `spec` is empty.
    pub unread: bool,
}

#[derive(Debug, Clone, PartialEq)]
pub struct ContainerSpec {
    pub meta: Meta,
    /// Root file system.
    pub rootfs: RootfsSpec,
    /// OCI runtime spec; `root` and the rootfs' own mounts are filled in by the guest. Its `mounts`
    /// hold only guest-side ones (proc, sysfs, tmpfs, devpts, ...).
    pub oci: oci_spec::runtime::Spec,
    /// `user[:group]` to look up inside the root file system; empty: `oci.process.user` counts.
    pub user: String,
    pub pid: PidMode,
    pub stdin: bool,
    pub stdin_once: bool,
    pub tty: bool,
    /// Relative to the pod's log folder; empty: no log.
    pub log_path: String,
    /// Files, folders and images mounted into the container, parents before what lies in them.
    pub volumes: Vec<Volume>,
    /// Block devices of the host.
    pub devices: Vec<BlockDevice>,
    /// Only the groups that `oci.process.user` names, not those of the image's /etc/group.
    pub strict_groups: bool,
    /// Image as the caller named it, and its id; given back in the view.
    pub image_name: String,
    pub image_id: String,
    /// Signal that asks the container to end (number); 15 when the image names none.
    pub stop_signal: u32,
    /// Places in the container of volumes of which the guest is to cache nothing.
    pub strict_volumes: Vec<String>,
    pub origin: serde_json::Value,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RootfsSpec {
    /// EROFS image on the host, attached read-only. Empty: the lower layer is a folder of the host,
    /// shared by the volume at `/` ([`Volume::is_lower_layer`]).
    pub image: PathBuf,
    pub read_only: bool,
    /// Folders of it that can be written to all the same: the image's own volumes.
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
    /// It is not a volume in the container but the lower layer of its root file system.
    pub fn is_lower_layer(&self, rootfs: &RootfsSpec) -> bool {
        let shared = matches!(self.source, VolumeSource::Shared { .. });
        rootfs.image.as_os_str().is_empty() && self.container_path == "/" && shared
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum VolumeSource {
    /// Small files of the host, copied into a tmpfs of the guest once.
    Copied { host_path: PathBuf },
    /// A folder that its writer replaces atomically behind `..data` (ConfigMap, Secret, projected,
    /// downward API): copied, and kept in step while the container lives.
    Synced { host_path: PathBuf },
    /// A file that the container writes and the host reads after its end (termination log): a copy
    /// that is written back when the container ends.
    WrittenBack { host_path: PathBuf },
    /// A file or folder of the host itself, shared with it.
    Shared { host_path: PathBuf },
    /// An EROFS image on the host, or a folder or file inside it; always read-only.
    Image { image: PathBuf, sub_path: String },
    /// A kubelet's emptyDir: made in the guest, or shared where the pod's are.
    EmptyDir {
        /// What is mounted, on the host.
        host_path: PathBuf,
        /// The volume's own folder on the host, whose name is the volume's.
        folder: PathBuf,
        /// What of the volume is mounted; empty: all of it.
        sub_path: String,
        /// Bytes.
        size_limit: Option<u64>,
    },
    /// Huge pages of the VM's memory; containers that say the same name have the same files.
    HugePages { name: String },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Access {
    ReadWrite,
    /// Mounts of the host below the source stay as they are.
    ReadOnly,
    ReadOnlyRecursive,
}

/// The share behind a volume ([`VolumeSource::Shared`]); several volumes of a pod may have the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct ShareUse {
    /// Number of the volume in its container.
    pub(crate) volume: usize,
    pub(crate) name: String,
    /// What is shared, and the path of the volume in it.
    pub(crate) source: PathBuf,
    pub(crate) sub_path: String,
    pub(crate) access: Access,
    pub(crate) propagation: Propagation,
    /// How ids are mapped, as text; empty: not at all.
    pub(crate) ids: String,
    /// The guest caches nothing.
    pub(crate) strict: bool,
}

/// mount_namespaces(7), between the host and the container.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Propagation {
    #[default]
    Private,
    /// What the host mounts below the source later appears in the container.
    HostToContainer,
    /// And what the container mounts appears on the host; of pods without a VM only.
    Bidirectional,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockDevice {
    pub host_path: PathBuf,
    pub container_path: String,
    /// Access as cgroups name it: of `rwm`.
    pub permissions: String,
}

/// The process' user as the guest resolved it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Identity {
    pub uid: u32,
    pub gid: u32,
    /// Primary group first.
    pub groups: Vec<u32>,
}

/// A change of a pod or container, for those who follow them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum EventKind {
    Created,
    Started,
    Stopped,
    Deleted,
}

/// Told after the change is journaled and visible in listings.
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
    /// The host's; of pods that have it in common with the host only.
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
    /// Limits as last set.
    pub resources: oci_spec::runtime::LinuxResources,
    /// None until the guest has made the process.
    pub user: Option<Identity>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitView {
    /// Exit status, or 128 + signal; -1 when the VM died with it and nobody knows more.
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
    /// Variables in addition to the container's own.
    pub env: Vec<String>,
    /// Empty: the container's user and folder.
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
    /// Id or an unambiguous beginning of it.
    pub id: Option<String>,
    pub pod: Option<PodId>,
    pub labels: BTreeMap<String, String>,
}
