//! The API of `nacelle-vmm`: its start configuration, control protocol and exit report.
//!
//! It describes virtual machines and devices; it does not depend on pods, images or containers.
//!
//! - [`VmConfig`]: JSON on the file descriptor of `--config-fd`; the process inherits all file
//!   descriptors named in it.
//! - [`Request`] / [`Reply`]: one JSON object per packet on a `SOCK_SEQPACKET` unix socket, with
//!   the file descriptor of a plugged device as `SCM_RIGHTS` ([`transport`]).
//! - [`VmExit`]: written to the status file when the VM ends.
//! - [`shares`]: the control protocol of `nacelle-fs`, which serves files to a VM.
//! - [`snapshot`]: the memory file of a saved VM.
//! - [`console_ring`]: the file with the guest's console output.

pub mod client;
pub mod console_ring;
pub mod shares;
pub mod snapshot;
pub mod transport;

use serde::{Deserialize, Serialize};

/// Newest version of configuration and protocol that this release supports. [`VmStatus::version`]
/// is that of a running VMM, which may be of another release: VMMs outlive the daemon.
pub const VERSION: u32 = 1;
/// Oldest supported version; a VMM accepts configurations from it to [`VERSION`].
pub const MIN_VERSION: u32 = 1;

/// A file descriptor number in the VMM's process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fd(pub i32);

/// The configuration of a VM at its start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmConfig {
    /// [`MIN_VERSION`] to [`VERSION`].
    pub version: u32,
    /// Name in log lines.
    pub name: String,
    /// vCPUs online at boot, 1 to `max_vcpus`.
    pub vcpus: u8,
    /// vCPUs that the guest can bring online, up to 64.
    pub max_vcpus: u8,
    /// Boot memory of the guest, MiB. Pages are allocated when they are touched.
    pub memory_mib: u32,
    /// Most memory that [`Request::ResizeMemory`] can request, MiB, at least `memory_mib`. It is
    /// limited by the processor's guest-physical address space. Memory that is not requested is not
    /// allocated.
    pub max_memory_mib: u32,
    /// Adds a balloon device with free page reporting: the guest reports pages that it does not
    /// use, and the VMM returns them to the host.
    #[serde(default = "default_true")]
    pub free_page_reporting: bool,
    /// An ELF `vmlinux` (or a bzImage whose payload is extracted by the host side).
    pub kernel: Fd,
    pub initramfs: Option<Fd>,
    /// Appended to the kernel parameters of the VMM.
    pub cmdline: String,
    /// `/dev/kvm`.
    pub kvm: Fd,
    /// Listening `SOCK_SEQPACKET` unix socket for [`Request`]s.
    pub control: Fd,
    /// Regular file to which a [`VmExit`] is written as JSON.
    pub status: Fd,
    /// Regular file of [`console_ring::FILE_SIZE`] bytes.
    pub console: Fd,
    /// File for log lines (JSON); none: standard error.
    pub log: Option<Fd>,
    pub vsock: Option<VsockConfig>,
    #[serde(default)]
    pub disks: Vec<DiskConfig>,
    #[serde(default)]
    pub nets: Vec<NetConfig>,
    /// Emulates an 8250 serial port as the kernel's console; slow, for debugging a kernel.
    #[serde(default)]
    pub serial_console: bool,
    pub jail: Option<JailConfig>,
    /// Continues a saved VM ([`Request::Snapshot`]) instead of booting the kernel. All other fields
    /// that the guest can see must be those of the saved VM. The same files can start many VMs: they
    /// are only read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restore: Option<RestoreConfig>,
}

/// The files of a saved VM ([`Request::Snapshot`]).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RestoreConfig {
    pub state: Fd,
    pub memory: Fd,
}

fn default_true() -> bool {
    true
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VsockConfig {
    pub guest_cid: u64,
    /// Listening `SOCK_STREAM` unix socket. A host client connects, sends `CONNECT <port>\n`, reads
    /// `OK <host port>\n`, and is then connected to the guest's listener on that port.
    pub listener: Fd,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DiskConfig {
    /// Serial number (`VIRTIO_BLK_T_GET_ID`), 1 to 20 printable ASCII bytes; also the device's id
    /// in this API.
    pub serial: String,
    /// Raw image file or block device. Ignored in [`Request::AddDisk`].
    pub file: Fd,
    pub read_only: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetConfig {
    /// Device id in this API, 1 to 64 printable ASCII bytes.
    pub id: String,
    /// Tap with `IFF_VNET_HDR | IFF_NO_PI`.
    pub tap: Fd,
    pub mac: [u8; 6],
    /// Bytes, 68 to 65521.
    pub mtu: u16,
}

/// The unprivileged user that the VMM changes to; neither id may be 0.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JailConfig {
    pub uid: u32,
    pub gid: u32,
}

/// A request on the control socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    Status,
    /// Plugs a disk. Its file descriptor comes with the packet; `disk.file` is ignored.
    AddDisk {
        disk: DiskConfig,
    },
    /// Plugs a network interface. The tap comes with the packet; `net.tap` is ignored.
    AddNet {
        net: NetConfig,
    },
    /// Plugs a file system that a vhost-user backend serves. A connected `SOCK_STREAM` unix socket
    /// of the backend comes with the packet; the VMM sends it guest memory and queues once the
    /// guest's driver is ready. When the backend exits, the guest's requests fail with ENOTCONN;
    /// only a new device can have a new backend.
    AddFs {
        /// Device id in this API.
        id: String,
        /// Tag by which the guest mounts it, 1 to 36 bytes.
        tag: String,
    },
    /// Unplugs a device by id (for a disk: its serial). The guest's driver must have released it
    /// first.
    RemoveDevice {
        id: String,
    },
    /// Requests that the guest has this much memory, MiB, up to [`VmConfig::max_memory_mib`]; the
    /// boot memory always stays. Answered at once; [`VmStatus::plugged_mib`] is what the guest has
    /// plugged.
    ResizeMemory {
        memory_mib: u32,
    },
    /// Stops the vCPUs and completes the devices' requests.
    Pause,
    Resume,
    /// Writes the state of a paused VM to a regular file, whose descriptor comes with the packet
    /// and which is truncated first. Answered with [`Reply::Saved`]. Refused while a device cannot
    /// be saved: a network interface, a file system, an open vsock connection, plugged memory.
    Snapshot,
    /// Ends the VM at once, without notice to the guest.
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
    /// The state was written. The file with the guest's memory comes with the packet: the client
    /// copies it ([`snapshot::copy_memory`]) before it resumes the VM, so that the copy is charged
    /// to the client's memory cgroup.
    Saved,
    Error(Error),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmStatus {
    pub version: u32,
    pub phase: Phase,
    pub pid: u32,
    pub vcpus: u8,
    /// Requested memory, MiB; rounded up to 2 MiB above the boot memory.
    pub memory_mib: u32,
    /// Memory that the guest has, MiB: boot memory plus plugged memory.
    #[serde(default)]
    pub plugged_mib: u32,
    /// Most memory that can be requested, MiB; 0 from a VMM of a release without this field.
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

/// Counters since the start of the VM.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counters {
    /// KVM exits to user space by reason: `io_in`, `io_out`, `mmio_read`, `mmio_write`, `signal`,
    /// `other`.
    pub exits: std::collections::BTreeMap<String, u64>,
    /// Microseconds from the VMM's `main` to the first vCPU's first `KVM_RUN`.
    pub start_us: u64,
    /// By device id: completed requests or packets, data bytes, errors.
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
    #[error("the PCI bus has no free function ({limit} devices at most)")]
    BusFull { limit: usize },
    #[error("device {id:?} cannot be unplugged: {why}")]
    NotRemovable { id: String, why: String },
    #[error("packet has {got} file descriptors, {want} expected")]
    Descriptors { got: usize, want: usize },
    #[error("{memory_mib} MiB of memory exceed the VM's limit of {limit_mib} MiB")]
    Memory { memory_mib: u32, limit_mib: u32 },
    #[error("{message}")]
    Failed { message: String },
}

/// The exit report, written to the status file as JSON before the VMM exits.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmExit {
    pub reason: ExitReason,
    /// Human-readable reason: an error with its causes, or the first line of a panic.
    pub message: String,
    /// Last console lines, at most 4 KiB.
    pub console_tail: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ExitReason {
    /// The guest powered off.
    Shutdown,
    /// The guest requested a reset. VMs are not rebooted: the VMM exits.
    Reset,
    /// The guest's kernel panicked.
    Panic,
    /// [`Request::Kill`], SIGTERM, SIGINT or SIGHUP.
    Killed,
    /// A vCPU triple-faulted.
    TripleFault,
    /// The VMM itself failed.
    Error,
}
