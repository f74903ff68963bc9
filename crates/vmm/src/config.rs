//! Turns a [`VmConfig`] with inherited file descriptors into owned, checked [`Resources`].
//!
//! Every file descriptor is taken once, verified to be of the expected kind, and marked
//! close-on-exec. All errors of a configuration are found here, before anything is started.
#![allow(unsafe_code)] // inherited descriptors are plain numbers

use std::collections::HashSet;
use std::fs::File;
use std::io::{self, Read, Seek};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::socket::{SockType, getsockopt, sockopt};
use nix::sys::stat::{SFlag, fstat};
use vmm_api::{DiskConfig, Fd, JailConfig, MIN_VERSION, NetConfig, VERSION, VmConfig};

use crate::devices::{Disk, FsDevice, NetDevice};
use machine::layout::VCPUS_MAX;

/// Longest configuration, bytes. Attack: the daemon is made to pass an endless file.
const CONFIG_MAX: u64 = 1 << 20;
/// `VIRTIO_BLK_ID_BYTES` (virtio 1.2, 5.2.6).
const SERIAL_MAX: usize = 20;
const ID_MAX: usize = 64;
/// From the minimum of IPv4 (68) to the largest MTU of a tap (65535 minus an Ethernet header).
const MTU: std::ops::RangeInclusive<u16> = 68..=65_521;
/// Device number of `/dev/net/tun` (major, minor).
const TUN_DEVICE: (u64, u64) = (10, 200);

#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("cannot read the configuration from file descriptor {fd}")]
    Read { fd: RawFd, source: io::Error },
    #[error("configuration is longer than {CONFIG_MAX} bytes")]
    TooLong,
    #[error("configuration is not valid")]
    Json(#[from] serde_json::Error),
    #[error(
        "configuration has version {got}, this VMM supports {MIN_VERSION} to {VERSION}; update \
         one of them"
    )]
    Version { got: u32 },
    #[error(
        "vcpus is {vcpus} and max_vcpus {max}; 1 <= vcpus <= max_vcpus <= {VCPUS_MAX} is required"
    )]
    Vcpus { vcpus: u8, max: u8 },
    #[error("memory_mib is {got}, at least {} is required", machine::layout::MEMORY_MIN_MIB)]
    Memory { got: u32 },
    #[error("max_memory_mib is {max}, less than memory_mib, {memory}")]
    MaxMemory { memory: u32, max: u32 },
    #[error("{what}: file descriptor {fd} is not open; the VMM must inherit it")]
    NotOpen { what: String, fd: RawFd },
    #[error("{what}: file descriptor {fd} is used twice in the configuration")]
    Reused { what: String, fd: RawFd },
    #[error("{what}: file descriptor {fd} is not {want}")]
    WrongKind { what: String, fd: RawFd, want: &'static str },
    #[error("{what}: cannot examine file descriptor {fd}")]
    Examine { what: String, fd: RawFd, source: Errno },
    #[error("disk serial {serial:?} is not 1 to {SERIAL_MAX} printable ASCII characters")]
    Serial { serial: String },
    #[error("device id {id:?} is not 1 to {ID_MAX} printable ASCII characters")]
    Id { id: String },
    #[error("device id {id:?} is used twice")]
    DuplicateId { id: String },
    #[error("net {id:?}: MTU {mtu} is outside 68 to 65521")]
    Mtu { id: String, mtu: u16 },
    #[error("net {id:?}: {mac:02x?} is not a unicast MAC address")]
    Mac { id: String, mac: [u8; 6] },
    #[error("vsock: guest CID {cid} is reserved; use 3 to 0xfffffffe")]
    Cid { cid: u64 },
}

/// A refused configuration.
#[derive(Debug)]
pub struct Refused {
    pub error: ConfigError,
    /// The status file, for the error; none if its file descriptor is not a regular file.
    pub status: Option<File>,
}

/// Owned resources of a VM.
#[derive(Debug)]
pub struct Resources {
    /// The configuration; its file descriptor numbers must not be used any more.
    pub config: VmConfig,
    pub kernel: File,
    pub initramfs: Option<File>,
    pub kvm: OwnedFd,
    pub control: OwnedFd,
    pub status: File,
    pub console: File,
    pub log: Option<OwnedFd>,
    pub vsock: Option<(u64, OwnedFd)>,
    pub disks: Vec<Disk>,
    pub nets: Vec<NetDevice>,
    pub jail: Option<JailConfig>,
    pub restore: Option<Saved>,
}

/// The files of a saved VM.
#[derive(Debug)]
pub struct Saved {
    pub state: File,
    pub memory: File,
}

/// Reads the configuration from an inherited file descriptor, which is closed. Fails if it cannot
/// be read, is longer than [`CONFIG_MAX`], or is not valid JSON.
pub fn read(fd: RawFd) -> Result<VmConfig, ConfigError> {
    let file = FdTable::default().take("configuration", Fd(fd), Kind::Any)?;
    let mut file = File::from(file);
    let failed = |source| ConfigError::Read { fd, source };
    // A file is read from its start, whatever its position; a pipe cannot seek.
    let _ = file.rewind();
    let mut text = Vec::new();
    file.take(CONFIG_MAX + 1).read_to_end(&mut text).map_err(failed)?;
    if text.len() as u64 > CONFIG_MAX {
        return Err(ConfigError::TooLong);
    }
    Ok(serde_json::from_slice(&text)?)
}

/// Checks the configuration and takes all its file descriptors.
pub fn take(config: VmConfig) -> Result<Resources, Refused> {
    let mut table = FdTable::default();
    // The status file first: errors are written to it.
    let status = table.take("status", config.status, Kind::Regular).map(File::from);
    match (check(&config), status) {
        (Ok(()), Ok(status)) => match take_rest(config, table) {
            Ok(resources) => Ok(resources(status)),
            Err(error) => Err(Refused { error, status: Some(status) }),
        },
        (Err(error), status) => Err(Refused { error, status: status.ok() }),
        (Ok(()), Err(error)) => Err(Refused { error, status: None }),
    }
}

/// Takes everything but the status file, which the returned function adds.
fn take_rest(
    config: VmConfig,
    mut table: FdTable,
) -> Result<impl FnOnce(File) -> Resources, ConfigError> {
    let file = |table: &mut FdTable, what, fd, kind| table.take(what, fd, kind).map(File::from);
    let console = file(&mut table, "console", config.console, Kind::Regular)?;
    let log = config.log.map(|fd| table.take("log", fd, Kind::Any)).transpose()?;
    let kvm = table.take("kvm", config.kvm, Kind::Character)?;
    let control = table.take("control", config.control, Kind::Listener(SockType::SeqPacket))?;
    let kernel = file(&mut table, "kernel", config.kernel, Kind::Regular)?;
    let initramfs =
        config.initramfs.map(|fd| file(&mut table, "initramfs", fd, Kind::Regular)).transpose()?;
    let vsock = match &config.vsock {
        Some(vsock) => {
            let kind = Kind::Listener(SockType::Stream);
            Some((vsock.guest_cid, table.take("vsock", vsock.listener, kind)?))
        }
        None => None,
    };
    let mut disks = Vec::new();
    for disk in &config.disks {
        let what = format!("disk {:?}", disk.serial);
        let file = table.take(&what, disk.file, Kind::Disk)?;
        disks.push(Disk { serial: disk.serial.clone(), file, read_only: disk.read_only });
    }
    let mut nets = Vec::new();
    for net in &config.nets {
        let tap = table.take(&format!("net {:?}", net.id), net.tap, Kind::Tap)?;
        let (id, mac, mtu) = (net.id.clone(), net.mac, net.mtu);
        nets.push(NetDevice { id, tap, mac, mtu });
    }
    let restore = match &config.restore {
        Some(restore) => Some(Saved {
            state: file(&mut table, "state", restore.state, Kind::Regular)?,
            memory: file(&mut table, "memory", restore.memory, Kind::Regular)?,
        }),
        None => None,
    };
    let jail = config.jail.clone();
    Ok(move |status| Resources {
        config,
        kernel,
        initramfs,
        kvm,
        control,
        status,
        console,
        log,
        vsock,
        disks,
        nets,
        jail,
        restore,
    })
}

/// A disk of an AddDisk request. Fails if its serial is invalid or `file` is not a disk.
pub fn hot_disk(disk: &DiskConfig, file: OwnedFd) -> Result<Disk, ConfigError> {
    check_disk(disk)?;
    let what = format!("disk {:?}", disk.serial);
    examine(&what, &file, Kind::Disk)?;
    Ok(Disk { serial: disk.serial.clone(), file, read_only: disk.read_only })
}

/// A network interface of an AddNet request. Fails if a field is invalid or `tap` is not a tap.
pub fn hot_net(net: &NetConfig, tap: OwnedFd) -> Result<NetDevice, ConfigError> {
    check_net(net)?;
    examine(&format!("net {:?}", net.id), &tap, Kind::Tap)?;
    Ok(NetDevice { id: net.id.clone(), tap, mac: net.mac, mtu: net.mtu })
}

/// The file of a Snapshot request. Fails if it is not a regular file.
pub fn hot_state(file: OwnedFd) -> Result<File, ConfigError> {
    examine("state", &file, Kind::Regular)?;
    Ok(File::from(file))
}

/// A file system of an AddFs request. Fails if the id is invalid or `backend` is not a connected
/// stream socket.
pub fn hot_fs(id: &str, tag: &str, backend: OwnedFd) -> Result<FsDevice, ConfigError> {
    if !printable(id, ID_MAX) {
        return Err(ConfigError::Id { id: id.to_owned() });
    }
    examine(&format!("fs {id:?}"), &backend, Kind::Stream)?;
    Ok(FsDevice { id: id.to_owned(), tag: tag.to_owned(), backend })
}

fn check(config: &VmConfig) -> Result<(), ConfigError> {
    if !(MIN_VERSION..=VERSION).contains(&config.version) {
        return Err(ConfigError::Version { got: config.version });
    }
    let (vcpus, max) = (config.vcpus, config.max_vcpus);
    if vcpus == 0 || vcpus > max || max > VCPUS_MAX {
        return Err(ConfigError::Vcpus { vcpus, max });
    }
    if config.memory_mib < machine::layout::MEMORY_MIN_MIB {
        return Err(ConfigError::Memory { got: config.memory_mib });
    }
    let (memory, max) = (config.memory_mib, config.max_memory_mib);
    if max < memory {
        return Err(ConfigError::MaxMemory { memory, max });
    }
    if let Some(vsock) = &config.vsock {
        // 0 to 2 are hypervisor, loopback and host; the highest is "any" (vsock(7)).
        let cid = vsock.guest_cid;
        if !(3..u64::from(u32::MAX)).contains(&cid) {
            return Err(ConfigError::Cid { cid });
        }
    }
    // Ids of the VMM's own devices.
    let mut ids: HashSet<&str> = ["vsock", "rng", "console", "mem", "balloon"].into();
    config.disks.iter().try_for_each(check_disk)?;
    config.nets.iter().try_for_each(check_net)?;
    let serials = config.disks.iter().map(|disk| disk.serial.as_str());
    for id in serials.chain(config.nets.iter().map(|net| net.id.as_str())) {
        if !ids.insert(id) {
            return Err(ConfigError::DuplicateId { id: id.to_owned() });
        }
    }
    Ok(())
}

fn printable(text: &str, max: usize) -> bool {
    (1..=max).contains(&text.len()) && text.bytes().all(|b| b.is_ascii_graphic())
}

fn check_disk(disk: &DiskConfig) -> Result<(), ConfigError> {
    if printable(&disk.serial, SERIAL_MAX) {
        return Ok(());
    }
    Err(ConfigError::Serial { serial: disk.serial.clone() })
}

fn check_net(net: &NetConfig) -> Result<(), ConfigError> {
    let id = net.id.clone();
    if !printable(&id, ID_MAX) {
        return Err(ConfigError::Id { id });
    }
    if !MTU.contains(&net.mtu) {
        return Err(ConfigError::Mtu { id, mtu: net.mtu });
    }
    if net.mac[0] & 1 != 0 || net.mac == [0; 6] {
        return Err(ConfigError::Mac { id, mac: net.mac });
    }
    Ok(())
}

#[derive(Debug, Clone, Copy)]
enum Kind {
    Any,
    Regular,
    /// A regular file or a block device.
    Disk,
    Character,
    Tap,
    Listener(SockType),
    /// A connected stream socket.
    Stream,
}

/// File descriptors already taken.
#[derive(Default)]
struct FdTable {
    taken: HashSet<RawFd>,
}

impl FdTable {
    fn take(&mut self, what: &str, Fd(fd): Fd, kind: Kind) -> Result<OwnedFd, ConfigError> {
        let what = what.to_owned();
        if fd < 0 {
            return Err(ConfigError::NotOpen { what, fd });
        }
        if !self.taken.insert(fd) {
            return Err(ConfigError::Reused { what, fd });
        }
        // SAFETY: F_GETFD accesses no memory; it fails for a number that is not a file descriptor.
        if unsafe { libc::fcntl(fd, libc::F_GETFD) } < 0 {
            return Err(ConfigError::NotOpen { what, fd });
        }
        // SAFETY: the file descriptor is open and was inherited from the parent process for the
        // VMM: the configuration names it, nothing in this process has opened it, and it is taken
        // once.
        let owned = unsafe { OwnedFd::from_raw_fd(fd) };
        examine(&what, &owned, kind)?;
        fcntl(owned.as_fd(), FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
            .map_err(|source| ConfigError::Examine { what, fd, source })?;
        Ok(owned)
    }
}

fn examine(what: &str, owned: &OwnedFd, kind: Kind) -> Result<(), ConfigError> {
    let fd = owned.as_raw_fd();
    let failed = |source| ConfigError::Examine { what: what.to_owned(), fd, source };
    let stat = fstat(owned).map_err(failed)?;
    let format = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
    let device = (nix::sys::stat::major(stat.st_rdev), nix::sys::stat::minor(stat.st_rdev));
    let listens = |kind| {
        format == SFlag::S_IFSOCK
            && getsockopt(owned, sockopt::SockType) == Ok(kind)
            && getsockopt(owned, sockopt::AcceptConn) == Ok(true)
    };
    let (good, want) = match kind {
        Kind::Any => (true, "usable"),
        Kind::Regular => (format == SFlag::S_IFREG, "a regular file"),
        Kind::Disk => (
            format == SFlag::S_IFREG || format == SFlag::S_IFBLK,
            "a regular file or a block device",
        ),
        Kind::Character => (format == SFlag::S_IFCHR, "a character device"),
        Kind::Tap => (format == SFlag::S_IFCHR && device == TUN_DEVICE, "a tap of /dev/net/tun"),
        Kind::Stream => (
            format == SFlag::S_IFSOCK
                && getsockopt(owned, sockopt::SockType) == Ok(SockType::Stream)
                && getsockopt(owned, sockopt::AcceptConn) == Ok(false),
            "a connected SOCK_STREAM socket",
        ),
        Kind::Listener(SockType::Stream) => {
            (listens(SockType::Stream), "a listening SOCK_STREAM socket")
        }
        Kind::Listener(kind) => (listens(kind), "a listening SOCK_SEQPACKET socket"),
    };
    if good {
        return Ok(());
    }
    Err(ConfigError::WrongKind { what: what.to_owned(), fd, want })
}

#[cfg(test)]
mod tests;
