//! What the host asks of a running `nacelle-vmm`, and what it is started with.
//!
//! Knows virtual machines and devices; has never heard of pods, images or containers.
//!
//! - [`VmConfig`]: JSON on the descriptor named by `--config-fd`; every other descriptor it names
//!   is inherited by the process.
//! - [`Request`] / [`Reply`]: one JSON object a packet on a `SOCK_SEQPACKET` unix socket, the
//!   descriptor of a plugged device attached as `SCM_RIGHTS` ([`transport`]).
//! - [`VmExit`]: what the VMM leaves in its status file when it ends.
//! - [`shares`]: the same for `nacelle-fs`, which serves files to a VM.
//! - [`console_ring`]: the file in which the guest's console output stands.

pub mod client;
pub mod console_ring;
pub mod shares;
pub mod transport;

use serde::{Deserialize, Serialize};

/// Newest version of everything in this crate that this release speaks. [`VmStatus::version`] says
/// which one a running VMM speaks: VMMs outlive daemons.
pub const VERSION: u32 = 1;
/// Oldest version that this release speaks; a VMM takes configurations from here to [`VERSION`].
pub const MIN_VERSION: u32 = 1;

/// A descriptor's number in the VMM's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

/// Everything a VM is made of when it starts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`MIN_VERSION`] to [`VERSION`].
    pub version: u32,
    /// For logs only.
    pub name: String,
    /// vCPUs that run from the start, 1 to `max_vcpus`.
    pub vcpus: u8,
    /// vCPUs the guest may bring online later, up to 64.
    pub max_vcpus: u8,
    /// Guest memory, MiB. Only touched pages cost anything.
    pub memory_mib: u32,
    /// What [`Request::ResizeMemory`] can ask for, `memory_mib` at least; as far as the processor
    /// has addresses. What is not asked for costs nothing.
    pub max_memory_mib: u32,
    /// The guest has a device by which it tells which pages it does not use; they go back to the host.
    #[serde(default = "yes")]
    pub free_page_reporting: bool,
    /// An ELF `vmlinux` (or a bzImage whose payload is extracted by the host side).
    pub kernel: Fd,
    pub initramfs: Option<Fd>,
    /// Appended to what the VMM itself needs.
    pub cmdline: String,
    /// `/dev/kvm`.
    pub kvm: Fd,
    /// Bound and listening `SOCK_SEQPACKET` unix socket of the control API.
    pub control: Fd,
    /// Regular file that gets a [`VmExit`] as JSON.
    pub status: Fd,
    /// Regular file of [`console_ring::FILE_SIZE`] bytes.
    pub console: Fd,
    /// Log lines (JSON) go here; none: standard error.
    pub log: Option<Fd>,
    pub vsock: Option<VsockConfig>,
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Bytes the guest sees on its emulated 8250 as well; slow, for debugging a kernel.
    #[serde(default)]
    pub serial_console: bool,
    pub jail: Option<JailConfig>,
}

fn yes() -> bool {
    true
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    pub guest_cid: u64,
    /// Bound and listening `SOCK_STREAM` unix socket. A host program connects, sends
    /// `CONNECT <port>\n`, reads `OK <host port>\n`, and is then joined to the guest's listener.
    pub listener: Fd,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Serial the guest reads (virtio-blk `VIRTIO_BLK_T_GET_ID`), 1 to 20 ASCII bytes; also the
    /// device's id in this API.
    pub serial: String,
    /// Raw file or block device. In an [`Request::AddDisk`] the attached descriptor is meant.
    pub file: Fd,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Device id in this API.
    pub id: String,
    /// Tap with `IFF_VNET_HDR | IFF_NO_PI`.
    pub tap: Fd,
    pub mac: [u8; 6],
    pub mtu: u16,
}

/// What the VMM gives up once its descriptors are open.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    pub uid: u32,
    pub gid: u32,
}

/// A request to the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status,
    /// The descriptor comes with the packet; `disk.file` is ignored.
    AddDisk {
        disk: DiskConfig,
    },
    /// The tap comes with the packet; `net.tap` is ignored.
    AddNet {
        net: NetConfig,
    },
    /// A file system that another process serves: the descriptor that comes with the packet is a
    /// unix socket connected to it, over which it is told (vhost-user) of the guest's memory and
    /// queues once the guest's driver is ready. A backend that goes away fails the guest's requests
    /// with ENOTCONN; it cannot be replaced but by a new device.
    AddFs {
        /// Device id in this API.
        id: String,
        /// What the guest mounts it by, 1 to 36 bytes.
        tag: String,
    },
    /// Pulls a device by id (a disk's serial). The guest must have released it first.
    RemoveDevice {
        id: String,
    },
    /// Asks the guest to have so much memory, between what the VM was started with (which it keeps)
    /// and [`VmConfig::max_memory_mib`]. Answered at once; how far the guest has come is in
    /// [`VmStatus::plugged_mib`].
    ResizeMemory {
        memory_mib: u32,
    },
    Pause,
    Resume,
    /// Ends the VMM at once; the guest gets no warning.
    Kill,
    Counters,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "reply", rename_all = "snake_case")]
pub enum Reply {
    Done,
    Status(VmStatus),
    Added {
        /// PCI address in the guest, e.g. `0000:00:04.0`.
        pci: String,
    },
    Counters(Counters),
    Error(Error),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    pub version: u32,
    pub phase: Phase,
    pub pid: u32,
    pub vcpus: u8,
    /// Memory that was asked for last, in steps of 2 MiB above what the VM was started with.
    pub memory_mib: u32,
    /// Memory that the guest has: as asked for, once it has followed.
    #[serde(default)]
    pub plugged_mib: u32,
    /// The most that can be asked for; 0: the VMM is older than the question.
    #[serde(default)]
    pub max_memory_mib: u32,
    pub devices: Vec<DeviceStatus>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceStatus {
    pub id: String,
    /// `blk`, `net`, `vsock`, `fs`, `rng`, `console`, `mem`, `balloon`.
    pub kind: String,
    pub pci: String,
    /// The guest's driver has set DRIVER_OK.
    pub active: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    Running,
    Paused,
}

/// Counts since the VM started.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// KVM exits to user space by reason, e.g. `mmio_read`, `io_out`, `hlt`.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Microseconds from the VMM's `main` to the first vCPU's first `KVM_RUN`.
    pub start_us: u64,
    /// Per device id: requests or packets handled, bytes moved, malformed guest input dropped.
    pub devices: std::collections::BTreeMap<String, DeviceCounters>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DeviceCounters {
    pub operations: u64,
    pub bytes: u64,
    pub errors: u64,
}

/// Why a request was refused.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Error {
    #[error("request is malformed: {message}")]
    Malformed { message: String },
    #[error("device {id:?} exists already")]
    Exists { id: String },
    #[error("no device {id:?}")]
    NoSuchDevice { id: String },
    #[error("the PCI bus has no free slot ({limit} devices)")]
    BusFull { limit: usize },
    #[error("device {id:?} cannot be pulled: {why}")]
    NotRemovable { id: String, why: String },
    #[error("packet carries {got} descriptors, {want} expected")]
    Descriptors { got: usize, want: usize },
    #[error("{memory_mib} MiB of memory are more than the {limit_mib} MiB the VM can have")]
    Memory { memory_mib: u32, limit_mib: u32 },
    #[error("{message}")]
    Failed { message: String },
}

/// Left in the status file as JSON before the VMM exits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmExit {
    pub reason: ExitReason,
    /// Sentence for people: an error's text, the panic's first line.
    pub message: String,
    /// Last console lines, at most 4 KiB.
    pub console_tail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered off.
    Shutdown,
    /// The guest asked for a reset (a VM is never rebooted: the VMM ends).
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// [`Request::Kill`].
    Killed,
    /// A vCPU triple-faulted.
    TripleFault,
    /// The VMM itself failed.
    Error,
}
