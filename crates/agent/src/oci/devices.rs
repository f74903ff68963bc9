//! Device nodes of a container beyond the usual ones: block volumes, and for a privileged
//! container every device of the guest.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use agent_api::v1;
use oci_spec::runtime::{
    LinuxDevice, LinuxDeviceBuilder, LinuxDeviceCgroup, LinuxDeviceCgroupBuilder, LinuxDeviceType,
    LinuxResources,
};

use crate::error::{Doing, Error, Result};
use crate::guest::devices;

/// Nodes handed to a privileged container; a guest has a few dozen.
const MAX_NODES: usize = 4096;
/// Block volumes of one container.
const MAX_BLOCK_DEVICES: usize = 64;
/// Of a block device's node, as udev has it: root and the group of disks.
const BLOCK_MODE: u32 = 0o660;
const DISK_GROUP: u32 = 6;
/// Loop devices whose nodes a privileged container gets beside those that are there. The kernel makes
/// a loop device when /dev/loop-control is asked for a free one, and its node in the guest's own /dev
/// alone; `losetup` and `mount -o loop` then open the node in the container's.
const LOOP_NODES: i64 = 32;
const LOOP_MAJOR: i64 = 7;
/// What is a container's own in `/dev`, or no device of its.
const NOT_SHARED: [&str; 7] = ["pts", "shm", "fd", "mqueue", "console", "ptmx", "tty"];

/// Whether a container may use any device, which is what "privileged" comes to here.
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

/// All of the guest's, and loop devices to come.
pub fn all_of_guest() -> Vec<LinuxDevice> {
    let mut found = all();
    found.extend(loops_beside(&found));
    found
}

fn loops_beside(found: &[LinuxDevice]) -> Vec<LinuxDevice> {
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

/// All that there are.
pub fn all() -> Vec<LinuxDevice> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from("/dev")];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = fs::read_dir(&folder) else { continue };
        for entry in entries.flatten() {
            let own = NOT_SHARED.iter().any(|name| entry.file_name() == *name);
            let Ok(meta) = entry.metadata() else { continue };
            if (own && folder == Path::new("/dev")) || found.len() >= MAX_NODES {
                continue;
            }
            if meta.is_dir() {
                folders.push(entry.path());
            } else {
                found.extend(node(entry.path(), &meta));
            }
        }
    }
    found
}

/// A block volume: its node, and the rule that lets the container use it.
#[derive(Debug)]
pub struct BlockVolume {
    pub node: LinuxDevice,
    pub rule: LinuxDeviceCgroup,
}

/// Looks the disks up.
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
    let meta = fs::metadata(&source).doing(|| format!("look at {}", source.display()))?;
    let mut node = node(PathBuf::from(&wanted.path), &meta)
        .ok_or_else(|| Error::Precondition(format!("{} is no device", source.display())))?;
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
    fn only_a_rule_for_everything_means_privileged() {
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
    fn loop_devices_that_are_not_there_yet_have_nodes_where_the_kernel_has_any() {
        let control: LinuxDevice = serde_json::from_str(
            r#"{"path":"/dev/loop-control","type":"c","major":10,"minor":237}"#,
        )
        .unwrap();
        assert!(loops_beside(&[]).is_empty());
        let there = loop_node("/dev/loop3".into(), 3).unwrap();
        let made = loops_beside(&[control, there]);
        assert_eq!(made.len(), LOOP_NODES as usize - 1);
        assert!(made.iter().all(|node| (node.major(), node.typ()) == (7, LinuxDeviceType::B)));
        assert!(!made.iter().any(|node| node.minor() == 3));
    }

    #[test]
    fn the_guests_devices_are_found_without_those_of_terminals() {
        let all = all();
        let null = all.iter().find(|node| node.path() == Path::new("/dev/null")).unwrap();
        assert_eq!((null.major(), null.minor()), (1, 3));
        assert!(!all.iter().any(|node| node.path().starts_with("/dev/pts")));
    }
}
