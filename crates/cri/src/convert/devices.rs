//! Devices of a container: block devices of the host become disks of the pod's VM; character
//! devices are the guest's, so only those that the guest's kernel has are available. A pod without a
//! VM has the host's devices.

use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
};
use sandbox::model::BlockDevice;

use super::Refusal;
use super::container_path::container_path;
use crate::v1;

/// Each block device takes a function of the VM's PCI bus.
const MAX_DEVICES: usize = 128;
/// Folders of the host may hold any number.
const MAX_HOST_DEVICES: usize = 4096;
const ANY_ACCESS: &str = "rwm";
const EVERYBODY: u32 = 0o666;

/// A character device of the guest. Numbers: Documentation/admin-guide/
/// devices.txt of Linux.
#[derive(Debug)]
pub struct GuestDevice {
    path: &'static str,
    major: i64,
    minor: i64,
    /// Every container has it, so it needs no node of its own.
    default: bool,
}

const fn default_device(path: &'static str, major: i64, minor: i64) -> GuestDevice {
    GuestDevice { path, major, minor, default: true }
}

const fn optional_device(path: &'static str, major: i64, minor: i64) -> GuestDevice {
    GuestDevice { path, major, minor, default: false }
}

const GUEST_DEVICES: [GuestDevice; 10] = [
    default_device("/dev/null", 1, 3),
    default_device("/dev/zero", 1, 5),
    default_device("/dev/full", 1, 7),
    default_device("/dev/random", 1, 8),
    default_device("/dev/urandom", 1, 9),
    default_device("/dev/tty", 5, 0),
    optional_device("/dev/kmsg", 1, 11), // a kubelet in a pod reads the kernel's log
    optional_device("/dev/net/tun", 10, 200), // VPN sidecars
    optional_device("/dev/fuse", 10, 229), // rootless image builders, file systems of users
    optional_device("/dev/loop-control", 10, 237), // image builders
];

#[derive(Debug, Default)]
pub struct Devices {
    pub blocks: Vec<BlockDevice>,
    pub nodes: Vec<LinuxDevice>,
    /// Device cgroup rules in addition to the default ones.
    pub rules: Vec<LinuxDeviceCgroup>,
}

/// Accesses the host's devices. Blocks. A privileged container has all devices of its guest anyway:
/// the guest knows them.
pub fn devices(requested: &[v1::Device], mounts: &[v1::Mount]) -> Result<Devices, Refusal> {
    if requested.len() > MAX_DEVICES {
        return Err(Refusal::invalid(
            "devices",
            format!("{} of them; at most {MAX_DEVICES} are taken", requested.len()),
        ));
    }
    let mut devices = Devices::default();
    for (index, device) in requested.iter().enumerate() {
        add(&mut devices, device)
            .map_err(|refusal| refusal.in_field(&format!("devices[{index}]")))?;
    }
    // No rule: a mount adds the node, not the permission, as with runc.
    for (known, target) in mounts.iter().filter_map(of_mount) {
        devices.nodes.push(node(known, &target)?);
    }
    Ok(devices)
}

/// Whether a mount is of a device that the guest has (a VPN's pod mounts /dev/net/tun), and where it
/// is to be.
pub fn of_mount(mount: &v1::Mount) -> Option<(&'static GuestDevice, String)> {
    let known = GUEST_DEVICES.iter().find(|known| known.path == mount.host_path)?;
    let target = container_path(&mount.container_path).ok()?;
    (mount.image.is_none() && target.starts_with("/dev/")).then_some((known, target))
}

/// Devices of the host, for a pod without a VM; a directory means all devices in it. Blocks.
pub fn of_host(requested: &[v1::Device]) -> Result<Devices, Refusal> {
    let mut devices = Devices::default();
    for (index, device) in requested.iter().enumerate() {
        let inside = |refusal: Refusal| refusal.in_field(&format!("devices[{index}]"));
        let (target, permissions) = target_of(device).map_err(inside)?;
        if !Path::new(&target).starts_with("/dev") {
            let reason = format!("{target}: device nodes stand below /dev");
            return Err(inside(Refusal::unsupported("container_path", reason)));
        }
        let host = Path::new(&device.host_path);
        add_of_host(&mut devices, host, Path::new(&target), permissions).map_err(inside)?;
    }
    Ok(devices)
}

fn add_of_host(
    devices: &mut Devices,
    host: &Path,
    target: &Path,
    permissions: &str,
) -> Result<(), Refusal> {
    let failed = |error: std::io::Error| {
        Refusal::invalid("host_path", format!("{}: {error}", host.display()))
    };
    if devices.rules.len() >= MAX_HOST_DEVICES {
        let reason = format!("more than {MAX_HOST_DEVICES} devices");
        return Err(Refusal::invalid("host_path", reason));
    }
    let metadata = std::fs::metadata(host).map_err(failed)?;
    let kind = match metadata.file_type() {
        kind if kind.is_char_device() => LinuxDeviceType::C,
        kind if kind.is_block_device() => LinuxDeviceType::B,
        kind if kind.is_dir() => {
            for entry in std::fs::read_dir(host).map_err(failed)?.flatten() {
                let found = entry.file_type().is_ok_and(|kind| {
                    kind.is_char_device() || kind.is_block_device() || kind.is_dir()
                });
                if found {
                    let (from, to) = (entry.path(), target.join(entry.file_name()));
                    add_of_host(devices, &from, &to, permissions)?;
                }
            }
            return Ok(());
        }
        _ => {
            let reason = format!("{} is not a device", host.display());
            return Err(Refusal::invalid("host_path", reason));
        }
    };
    let (major, minor) = numbers(metadata.rdev());
    let node = LinuxDeviceBuilder::default()
        .path(target)
        .typ(kind)
        .major(major)
        .minor(minor)
        .file_mode(metadata.mode() & 0o7777)
        .uid(metadata.uid())
        .gid(metadata.gid());
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(kind)
        .major(major)
        .minor(minor)
        .access(permissions);
    devices.nodes.push(node.build().map_err(internal)?);
    devices.rules.push(rule.build().map_err(internal)?);
    Ok(())
}

/// Of a device, as glibc packs them (makedev(3)).
fn numbers(device: u64) -> (i64, i64) {
    let major = ((device >> 8) & 0xfff) | ((device >> 32) & 0xffff_f000);
    let minor = (device & 0xff) | ((device >> 12) & 0xffff_ff00);
    (major as i64, minor as i64)
}

/// Path in the container, and permissions.
fn target_of(device: &v1::Device) -> Result<(String, &str), Refusal> {
    if device.host_path.is_empty() {
        return Err(Refusal::invalid("host_path", "empty"));
    }
    let target = match device.container_path.as_str() {
        "" => &device.host_path,
        given => given,
    };
    let target = container_path(target)?;
    let permissions = match device.permissions.as_str() {
        "" => ANY_ACCESS,
        given if given.bytes().all(|letter| ANY_ACCESS.as_bytes().contains(&letter)) => given,
        other => {
            return Err(Refusal::invalid("permissions", format!("{other:?} is not of r, w and m")));
        }
    };
    Ok((target, permissions))
}

fn add(devices: &mut Devices, device: &v1::Device) -> Result<(), Refusal> {
    let (target, permissions) = target_of(device)?;
    if let Some(known) = GUEST_DEVICES.iter().find(|known| known.path == device.host_path) {
        if !target.starts_with("/dev/") {
            return Err(Refusal::unsupported(
                "container_path",
                format!("{target}: a device node of the guest stands below /dev"),
            ));
        }
        if !known.default || target != known.path {
            devices.nodes.push(node(known, &target)?);
        }
        devices.rules.push(rule(known, permissions)?);
        return Ok(());
    }
    let host_path = Path::new(&device.host_path)
        .canonicalize()
        .map_err(|error| Refusal::invalid("host_path", format!("{}: {error}", device.host_path)))?;
    let kind = host_path
        .symlink_metadata()
        .map_err(|error| Refusal::invalid("host_path", format!("{}: {error}", device.host_path)))?
        .file_type();
    if kind.is_block_device() {
        let permissions = permissions.to_string();
        devices.blocks.push(BlockDevice { host_path, container_path: target, permissions });
        return Ok(());
    }
    let reason = if kind.is_char_device() {
        "is a character device of the host, which does not reach into a pod's VM"
    } else if kind.is_dir() {
        "is a folder: name each block device in it"
    } else {
        "is not a device"
    };
    Err(Refusal::unsupported("host_path", format!("{} {reason}", device.host_path)))
}

fn node(known: &GuestDevice, path: &str) -> Result<LinuxDevice, Refusal> {
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(LinuxDeviceType::C)
        .major(known.major)
        .minor(known.minor)
        .file_mode(EVERYBODY)
        .uid(0u32)
        .gid(0u32)
        .build()
        .map_err(internal)
}

fn rule(known: &GuestDevice, permissions: &str) -> Result<LinuxDeviceCgroup, Refusal> {
    LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::C)
        .major(known.major)
        .minor(known.minor)
        .access(permissions)
        .build()
        .map_err(internal)
}

fn internal(error: oci_spec::OciSpecError) -> Refusal {
    Refusal::invalid("devices", error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(host: &str, container: &str, permissions: &str) -> v1::Device {
        v1::Device {
            host_path: host.into(),
            container_path: container.into(),
            permissions: permissions.into(),
        }
    }

    fn of_vm(requested: &[v1::Device]) -> Result<Devices, Refusal> {
        devices(requested, &[])
    }

    #[test]
    fn character_devices_are_those_of_the_guest() {
        let found =
            of_vm(&[device("/dev/fuse", "", "rw"), device("/dev/null", "", "rwm")]).unwrap();
        assert_eq!(found.nodes.len(), 1, "each container has a null device anyway");
        let fuse = &found.nodes[0];
        assert_eq!((fuse.path(), fuse.major(), fuse.minor()), (&"/dev/fuse".into(), 10, 229));
        assert_eq!(found.rules[0].access().as_deref(), Some("rw"));
        let elsewhere = of_vm(&[device("/dev/null", "/dev/hole", "")]).unwrap();
        assert_eq!(elsewhere.nodes[0].path(), Path::new("/dev/hole"));
        assert_eq!(elsewhere.rules[0].access().as_deref(), Some("rwm"));
    }

    #[test]
    fn a_mount_of_a_guest_device_is_a_node_without_permission() {
        let mount = |host: &str, container: &str| v1::Mount {
            host_path: host.into(),
            container_path: container.into(),
            ..Default::default()
        };
        let mounts = [
            mount("/dev/net/tun", "/dev/net/tun"),
            mount("/dev/null", "/etc/masked"),
            mount("/etc/hosts", "/dev/x"),
        ];
        let found = devices(&[], &mounts).unwrap();
        let nodes: Vec<_> = found.nodes.iter().map(|n| (n.major(), n.minor())).collect();
        assert_eq!((nodes, found.rules), (vec![(10, 200)], Vec::new()));
    }

    #[test]
    fn a_pod_without_a_vm_has_the_hosts_devices() {
        let found = of_host(&[device("/dev/null", "/dev/hole", "r")]).unwrap();
        let node = &found.nodes[0];
        assert_eq!((node.path(), node.major(), node.minor()), (&"/dev/hole".into(), 1, 3));
        assert_eq!(found.rules[0].access().as_deref(), Some("r"));
        assert!(found.blocks.is_empty());
        let all = of_host(&[device("/dev", "", "")]).unwrap();
        assert!(all.nodes.iter().any(|node| node.path() == Path::new("/dev/null")));
        for (device, field) in [
            (device("/etc/passwd", "/dev/x", "r"), "devices[0].host_path"),
            (device("/dev/null", "/x", "r"), "devices[0].container_path"),
            (device("/dev/null", "", "x"), "devices[0].permissions"),
        ] {
            let text = of_host(&[device]).unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
        // 259:300 as stat(2) packs it.
        assert_eq!(numbers(0x11_032c), (259, 300));
    }

    #[test]
    fn other_host_paths_are_rejected_with_the_field() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let file = file.to_string_lossy();
        let table = [
            (device("", "/dev/x", "r"), "devices[0].host_path"),
            (device("/dev/missing-device", "/dev/x", "r"), "devices[0].host_path"),
            (device(&file, "/dev/x", "r"), "devices[0].host_path"),
            (device("/dev", "/dev/x", "r"), "devices[0].host_path"),
            (device("/dev/ptmx", "/dev/x", "r"), "devices[0].host_path"),
            (device("/dev/fuse", "/dev/fuse", "rx"), "devices[0].permissions"),
            (device("/dev/fuse", "/x/../y", "r"), "devices[0].container_path"),
            (device("/dev/fuse", "/x", "r"), "devices[0].container_path"),
        ];
        for (device, field) in table {
            let text = of_vm(&[device]).unwrap_err().to_string();
            assert!(text.starts_with(field), "{text}");
        }
        assert!(of_vm(&vec![device("/dev/fuse", "", ""); MAX_DEVICES + 1]).is_err());
    }
}
