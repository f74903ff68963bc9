use std::os::fd::IntoRawFd;
use std::os::unix::net::UnixListener;

use nix::sys::socket::{AddressFamily, Backlog, SockFlag, UnixAddr, bind, listen, socket};
use vmm_api::VsockConfig;

use super::*;
use crate::assemble::failure;
use crate::exit::write_status;

fn file() -> Fd {
    Fd(tempfile::tempfile().unwrap().into_raw_fd())
}

fn null() -> Fd {
    Fd(File::open("/dev/null").unwrap().into_raw_fd())
}

/// A control socket; the directory must live until it has been taken.
fn control(dir: &tempfile::TempDir) -> Fd {
    let fd = socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::empty(), None).unwrap();
    bind(fd.as_raw_fd(), &UnixAddr::new(&dir.path().join("c")).unwrap()).unwrap();
    listen(&fd, Backlog::new(4).unwrap()).unwrap();
    Fd(fd.into_raw_fd())
}

fn config(dir: &tempfile::TempDir) -> VmConfig {
    let listener = UnixListener::bind(dir.path().join("v")).unwrap();
    VmConfig {
        version: VERSION,
        name: "test".to_owned(),
        vcpus: 1,
        max_vcpus: 2,
        memory_mib: 128,
        max_memory_mib: 256,
        free_page_reporting: true,
        kernel: file(),
        initramfs: Some(file()),
        cmdline: String::new(),
        kvm: null(),
        control: control(dir),
        status: file(),
        console: file(),
        log: None,
        vsock: Some(VsockConfig { guest_cid: 3, listener: Fd(listener.into_raw_fd()) }),
        disks: vec![DiskConfig { serial: "one".to_owned(), file: file(), read_only: true }],
        nets: Vec::new(),
        serial_console: false,
        jail: None,
        restore: None,
    }
}

/// The error of [`take`] for a changed configuration.
fn refusal(change: impl FnOnce(&mut VmConfig)) -> ConfigError {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(&dir);
    change(&mut config);
    take(config).unwrap_err().error
}

#[test]
fn a_valid_configuration_is_accepted() {
    let dir = tempfile::tempdir().unwrap();
    let resources = take(config(&dir)).unwrap();
    assert_eq!((resources.disks.len(), resources.vsock.is_some()), (1, true));
    let flags = fcntl(resources.kernel.as_fd(), FcntlArg::F_GETFD).unwrap();
    assert_eq!(flags & FdFlag::FD_CLOEXEC.bits(), FdFlag::FD_CLOEXEC.bits());
}

#[test]
fn errors_are_written_to_the_status_file() {
    type Change = fn(&mut VmConfig);
    let wrong: [(Change, &str); 3] = [
        (|c| c.vcpus = 0, "vcpus is 0"),
        (|c| c.kernel = Fd(9999), "kernel: file descriptor 9999 is not open"),
        (|c| c.disks[0].file = null(), "is not a regular file or a block device"),
    ];
    for (change, expected) in wrong {
        let dir = tempfile::tempdir().unwrap();
        let mut kept = tempfile::tempfile().unwrap();
        let status = Fd(kept.try_clone().unwrap().into_raw_fd());
        let mut config = VmConfig { status, ..config(&dir) };
        change(&mut config);
        let Refused { error, status } = take(config).unwrap_err();
        write_status(&mut status.unwrap(), &failure(&error)).unwrap();
        kept.rewind().unwrap();
        let exit: vmm_api::VmExit = serde_json::from_reader(kept).unwrap();
        assert_eq!(exit.reason, vmm_api::ExitReason::Error);
        assert!(exit.message.contains(expected), "{}", exit.message);
    }
}

#[test]
fn a_status_file_of_the_wrong_kind_is_reported_and_not_written_to() {
    let dir = tempfile::tempdir().unwrap();
    let refused = take(VmConfig { status: null(), ..config(&dir) }).unwrap_err();
    assert!(matches!(refused.error, ConfigError::WrongKind { what, .. } if what == "status"));
    assert!(refused.status.is_none());
}

#[test]
fn sizes_out_of_range_are_refused() {
    assert!(matches!(refusal(|c| c.vcpus = 0), ConfigError::Vcpus { vcpus: 0, .. }));
    assert!(matches!(refusal(|c| c.vcpus = 3), ConfigError::Vcpus { vcpus: 3, max: 2 }));
    assert!(matches!(refusal(|c| c.max_vcpus = 65), ConfigError::Vcpus { max: 65, .. }));
    assert!(matches!(refusal(|c| c.memory_mib = 0), ConfigError::Memory { got: 0 }));
    assert!(matches!(
        refusal(|c| c.max_memory_mib = 127),
        ConfigError::MaxMemory { memory: 128, max: 127 }
    ));
    for got in [MIN_VERSION - 1, VERSION + 1] {
        assert!(matches!(refusal(|c| c.version = got), ConfigError::Version { .. }), "{got}");
    }
    let cid = |c: &mut VmConfig| c.vsock.as_mut().unwrap().guest_cid = 2;
    assert!(matches!(refusal(cid), ConfigError::Cid { cid: 2 }));
}

#[test]
fn file_descriptors_that_are_missing_reused_or_of_the_wrong_kind_are_refused() {
    assert!(matches!(
        refusal(|c| c.kernel = Fd(9999)),
        ConfigError::NotOpen { what, fd: 9999 } if what == "kernel"
    ));
    assert!(matches!(refusal(|c| c.kernel = Fd(-1)), ConfigError::NotOpen { .. }));
    assert!(matches!(refusal(|c| c.initramfs = Some(c.kernel)), ConfigError::Reused { .. }));
    assert!(matches!(refusal(|c| c.kvm = file()), ConfigError::WrongKind { .. }));
    assert!(matches!(refusal(|c| c.console = null()), ConfigError::WrongKind { .. }));
    assert!(matches!(refusal(|c| c.control = file()), ConfigError::WrongKind { .. }));
    assert!(matches!(refusal(|c| c.disks[0].file = null()), ConfigError::WrongKind { .. }));
}

#[test]
fn device_names_are_checked_and_unique() {
    let named = |serial: &str| {
        let serial = serial.to_owned();
        refusal(move |c| c.disks[0].serial = serial)
    };
    for serial in ["", "a b", "ä", "123456789012345678901"] {
        assert!(matches!(named(serial), ConfigError::Serial { .. }), "{serial:?} was taken");
    }
    for own in ["vsock", "mem"] {
        assert!(matches!(named(own), ConfigError::DuplicateId { id } if id == own));
    }
    let twice = |c: &mut VmConfig| c.disks.push(DiskConfig { file: file(), ..c.disks[0].clone() });
    assert!(matches!(refusal(twice), ConfigError::DuplicateId { id } if id == "one"));
}

#[test]
fn network_interfaces_are_checked() {
    let net = NetConfig { id: "eth0".to_owned(), tap: null(), mac: [2, 0, 0, 0, 0, 1], mtu: 1500 };
    let attempt = |net: NetConfig| refusal(move |c| c.nets = vec![net]);
    let multicast = NetConfig { mac: [1, 0, 0, 0, 0, 1], ..net.clone() };
    assert!(matches!(attempt(multicast), ConfigError::Mac { .. }));
    assert!(matches!(attempt(NetConfig { mtu: 10, ..net.clone() }), ConfigError::Mtu { .. }));
    assert!(matches!(
        attempt(NetConfig { id: String::new(), ..net.clone() }),
        ConfigError::Id { .. }
    ));
    assert!(matches!(attempt(net), ConfigError::WrongKind { .. }), "/dev/null was taken as a tap");
}

#[test]
fn a_configuration_that_is_not_json_or_has_unknown_keys_is_refused() {
    for text in ["", "{", "{\"version\":1,\"fly\":true}"] {
        let mut file = tempfile::tempfile().unwrap();
        io::Write::write_all(&mut file, text.as_bytes()).unwrap();
        assert!(matches!(read(file.into_raw_fd()), Err(ConfigError::Json(_))), "{text:?}");
    }
    assert!(matches!(read(9999), Err(ConfigError::NotOpen { .. })));
    let endless = File::open("/dev/zero").unwrap().into_raw_fd();
    assert!(matches!(read(endless), Err(ConfigError::TooLong)));
}

#[test]
fn a_file_system_needs_a_connected_stream_socket() {
    let dir = tempfile::tempdir().unwrap();
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let taken = hot_fs("shares", "nacelle", ours.into()).unwrap();
    assert_eq!((taken.id.as_str(), taken.tag.as_str()), ("shares", "nacelle"));
    let listener = UnixListener::bind(dir.path().join("l")).unwrap();
    let refused = hot_fs("shares", "nacelle", listener.into()).unwrap_err();
    assert!(matches!(refused, ConfigError::WrongKind { .. }));
    let file = tempfile::tempfile().unwrap();
    assert!(hot_fs("shares", "nacelle", file.into()).is_err());
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    assert!(matches!(hot_fs("a b", "t", ours.into()), Err(ConfigError::Id { .. })));
}
