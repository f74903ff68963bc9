//! Device nodes of a container beyond the defaults: block volumes, and all devices of the guest for
//! a privileged container.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_api::v1;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
    LinuxResources,
};

use crate::error::{Context, Error, Result};
use crate::guest::devices;

/// Maximum nodes of a privileged container; a guest has a few dozen.
const MAX_NODES: usize = 4096;
/// Maximum block volumes of one container.
const MAX_BLOCK_DEVICES: usize = 64;
/// Mode and group of a block device's node, as udev sets them: root:disk.
const BLOCK_MODE: u32 = 0o660;
const DISK_GROUP: u32 = 6;
/// Loop device nodes that a privileged container gets even if they do not exist yet. The kernel
/// creates loop devices on demand (LOOP_CTL_GET_FREE), but their nodes appear in the guest's
/// devtmpfs only; `losetup` and `mount -o loop` open them in the container's /dev.
const LOOP_NODES: i64 = 32;
const LOOP_MAJOR: i64 = 7;
/// Entries of `/dev` that belong to each container, or are not devices.
const EXCLUDED: [&str; 7] = ["pts", "shm", "fd", "mqueue", "console", "ptmx", "tty"];

/// Whether the rules allow all devices, as for a privileged container.
pub fn allows_all(resources: &LinuxResources) -> bool {
    resources.devices().iter().flatten().any(|rule| {
        rule.allow()
            && matches!(rule.typ(), None | Some(LinuxDeviceType::A))
            && rule.major().is_none_or(|major| major < 0)
            && rule.minor().is_none_or(|minor| minor < 0)
            && rule.access().as_deref().is_none_or(|access| access == "rwm")
    })
}

fn node(path: PathBuf, meta: &fs::Metadata) -> Option<LinuxDevice> {
    let kind = if meta.file_type().is_block_device() {
        LinuxDeviceType::B
    } else if meta.file_type().is_char_device() {
        LinuxDeviceType::C
    } else {
        return None;
    };
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(kind)
        .major(i64::from(nix::sys::stat::major(meta.rdev()) as u32))
        .minor(i64::from(nix::sys::stat::minor(meta.rdev()) as u32))
        .file_mode(meta.mode() & 0o7777)
        .uid(meta.uid())
        .gid(meta.gid())
        .build()
        .ok()
}

/// All devices of the guest, and nodes of loop devices that do not exist yet.
pub fn all_with_loops() -> Vec<LinuxDevice> {
    let mut found = all();
    found.extend(missing_loop_nodes(&found));
    found
}

fn missing_loop_nodes(found: &[LinuxDevice]) -> Vec<LinuxDevice> {
    let has = |path: &Path| found.iter().any(|node| node.path() == path);
    if !has(Path::new("/dev/loop-control")) {
        return Vec::new();
    }
    let path = |minor: i64| PathBuf::from(format!("/dev/loop{minor}"));
    let missing = (0..LOOP_NODES).map(|minor| (path(minor), minor)).filter(|(path, _)| !has(path));
    missing.filter_map(|(path, minor)| loop_node(path, minor)).collect()
}

fn loop_node(path: PathBuf, minor: i64) -> Option<LinuxDevice> {
    LinuxDeviceBuilder::default()
        .path(path)
        .typ(LinuxDeviceType::B)
        .major(LOOP_MAJOR)
        .minor(minor)
        .file_mode(BLOCK_MODE)
        .uid(0u32)
        .gid(DISK_GROUP)
        .build()
        .ok()
}

/// All existing devices.
pub fn all() -> Vec<LinuxDevice> {
    let mut found = Vec::new();
    let mut dirs = vec![PathBuf::from("/dev")];
    while let Some(dir) = dirs.pop() {
        let Ok(entries) = fs::read_dir(&dir) else { continue };
        for entry in entries.flatten() {
            let own = EXCLUDED.iter().any(|name| entry.file_name() == *name);
            let Ok(meta) = entry.metadata() else { continue };
            if (own && dir == Path::new("/dev")) || found.len() >= MAX_NODES {
                continue;
            }
            if meta.is_dir() {
                dirs.push(entry.path());
            } else {
                found.extend(node(entry.path(), &meta));
            }
        }
    }
    found
}

/// A block volume: its node, and the rule that allows it.
#[derive(Debug)]
pub struct BlockVolume {
    pub node: LinuxDevice,
    pub rule: LinuxDeviceCgroup,
}

/// Finds the disks of block volumes by serial.
pub fn block_volumes(wanted: &[v1::BlockDevice]) -> Result<Vec<BlockVolume>> {
    if wanted.len() > MAX_BLOCK_DEVICES {
        return Err(Error::Exhausted {
            what: "block devices of a container",
            limit: MAX_BLOCK_DEVICES as u64,
        });
    }
    wanted.iter().map(block_volume).collect()
}

fn block_volume(wanted: &v1::BlockDevice) -> Result<BlockVolume> {
    let bad = |error: oci_spec::OciSpecError| Error::invalid("block_devices", error.to_string());
    super::mounts::check_destination(Path::new(&wanted.path))?;
    let access = wanted.permissions.as_str();
    if access.is_empty() || !access.chars().all(|letter| "rwm".contains(letter)) {
        return Err(Error::invalid(
            "block_devices.permissions",
            format!("{access:?} is not made of r, w and m"),
        ));
    }
    let source = devices::disk_node(&wanted.disk_serial)?;
    let meta = fs::metadata(&source).context(|| format!("stat {}", source.display()))?;
    let mut node = node(PathBuf::from(&wanted.path), &meta)
        .ok_or_else(|| Error::Precondition(format!("{} is not a device", source.display())))?;
    node.set_file_mode(Some(BLOCK_MODE));
    node.set_uid(Some(0));
    node.set_gid(Some(DISK_GROUP));
    let rule = LinuxDeviceCgroupBuilder::default()
        .allow(true)
        .typ(LinuxDeviceType::B)
        .major(node.major())
        .minor(node.minor())
        .access(access)
        .build()
        .map_err(bad)?;
    Ok(BlockVolume { node, rule })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resources(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn only_a_rule_that_allows_all_devices_means_privileged() {
        assert!(allows_all(&resources(r#"{"devices":[{"allow":true,"access":"rwm"}]}"#)));
        for json in [
            r#"{"devices":[{"allow":false,"access":"rwm"}]}"#,
            r#"{"devices":[{"allow":true,"access":"r"}]}"#,
            r#"{"devices":[{"allow":true,"type":"c","access":"rwm"}]}"#,
            r#"{"devices":[{"allow":true,"major":1,"access":"rwm"}]}"#,
            "{}",
        ] {
            assert!(!allows_all(&resources(json)), "{json}");
        }
    }

    #[test]
    fn missing_loop_devices_get_nodes_if_the_kernel_has_loop_control() {
        let control: LinuxDevice = serde_json::from_str(
            r#"{"path":"/dev/loop-control","type":"c","major":10,"minor":237}"#,
        )
        .unwrap();
        assert!(missing_loop_nodes(&[]).is_empty());
        let there = loop_node("/dev/loop3".into(), 3).unwrap();
        let made = missing_loop_nodes(&[control, there]);
        assert_eq!(made.len(), LOOP_NODES as usize - 1);
        assert!(made.iter().all(|node| (node.major(), node.typ()) == (7, LinuxDeviceType::B)));
        assert!(!made.iter().any(|node| node.minor() == 3));
    }

    #[test]
    fn devices_of_the_guest_are_listed_without_terminals() {
        let all = all();
        let null = all.iter().find(|node| node.path() == Path::new("/dev/null")).unwrap();
        assert_eq!((null.major(), null.minor()), (1, 3));
        assert!(!all.iter().any(|node| node.path().starts_with("/dev/pts")));
    }
}
