//! Disks and network interfaces, identified by values of the host: a disk by its virtio-blk serial
//! (virtio 1.2, 5.2.6.1), a NIC by its MAC address. Hot-plug uses the PCI bus' sysfs files, without
//! firmware.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use nix::errno::Errno;
use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

use crate::error::{Context, Error, Result};

/// Maximum length of a virtio-blk serial, bytes.
const MAX_SERIAL: usize = 20;
/// Time for a driver to bind a plugged device.
const PLUG_DEADLINE: Duration = Duration::from_secs(10);

fn entries(dir: &str) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries.flatten().map(|entry| entry.path()).collect()
}

fn attribute(path: PathBuf) -> Option<String> {
    Some(fs::read_to_string(path).ok()?.trim().to_owned())
}

/// sysfs directory of the disk with this serial.
fn disk(serial: &str) -> Option<PathBuf> {
    entries("/sys/block").into_iter().find(|path| serial_of(path).as_deref() == Some(serial))
}

/// Cache of serials: by sysfs path, with the disk's sequence number (`diskseq`), as device names
/// are reused.
static SERIALS: Mutex<BTreeMap<PathBuf, (String, String)>> = Mutex::new(BTreeMap::new());

/// The serial of a disk. Cached, as each read of the attribute is a request to the device, for
/// every disk of the pod in each lookup.
fn serial_of(path: &Path) -> Option<String> {
    // Linux before 5.15 has no diskseq.
    let Some(number) = attribute(path.join("diskseq")) else {
        return attribute(path.join("serial"));
    };
    let mut known = SERIALS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((of, serial)) = known.get(path)
        && *of == number
    {
        return Some(serial.clone());
    }
    let serial = attribute(path.join("serial"))?;
    if !serial.is_empty() {
        // Drops entries of removed disks.
        known.retain(|path, _| path.exists());
        known.insert(path.to_owned(), (number, serial.clone()));
    }
    Some(serial)
}

fn node(sys: &Path) -> Option<PathBuf> {
    let path = Path::new("/dev").join(sys.file_name()?);
    path.exists().then_some(path)
}

/// Device node of the disk with this serial.
pub fn disk_node(serial: &str) -> Result<PathBuf> {
    check_serial(serial)?;
    disk(serial)
        .and_then(|sys| node(&sys))
        .ok_or_else(|| Error::NotFound { what: "disk", id: serial.to_owned() })
}

fn check_serial(serial: &str) -> Result<()> {
    let plain = serial.chars().all(|c| c.is_ascii_alphanumeric() || "_-.".contains(c));
    if serial.is_empty() || serial.len() > MAX_SERIAL || !plain || serial.starts_with('.') {
        return Err(Error::invalid("disk serial", format!("{serial:?} is not a valid serial")));
    }
    Ok(())
}

/// Whether an interface is a device (NIC), not a virtual interface.
pub fn is_nic(name: &str) -> bool {
    !name.contains('/') && Path::new("/sys/class/net").join(name).join("device").exists()
}

/// Name of the interface with this MAC address.
pub fn interface(mac: &str) -> Option<String> {
    entries("/sys/class/net").into_iter().find_map(|path| {
        let address = attribute(path.join("address"))?;
        // A bridge or VLAN of a container may have the same address, but has no device.
        let found = address.eq_ignore_ascii_case(mac) && path.join("device").exists();
        found.then(|| path.file_name().map(|name| name.to_string_lossy().into_owned()))?
    })
}

fn missing(serials: &[String], macs: &[String]) -> Option<String> {
    let disk = serials.iter().find(|serial| disk(serial).and_then(|sys| node(&sys)).is_none());
    let nic = || macs.iter().find(|mac| interface(mac).is_none());
    disk.or_else(nic).cloned()
}

/// Rescans the PCI bus for plugged devices. Blocks while drivers probe.
pub fn rescan_bus() -> std::io::Result<()> {
    fs::write("/sys/bus/pci/rescan", "1")
}

/// Same on a blocking thread: probing takes milliseconds for each device.
pub async fn rescan_pci() -> Result<()> {
    tokio::task::spawn_blocking(|| rescan_bus().context(|| "rescan the PCI bus".to_owned()))
        .await
        .map_err(|error| Error::Helper { operation: "rescan", reason: error.to_string() })?
}

/// Waits for disks and NICs; rescans the PCI bus first if one is missing.
pub async fn rescan(serials: &[String], macs: &[String]) -> Result<()> {
    for serial in serials {
        check_serial(serial)?;
    }
    if missing(serials, macs).is_none() {
        return Ok(());
    }
    rescan_pci().await?;
    let deadline = tokio::time::Instant::now() + PLUG_DEADLINE;
    let mut pause = Duration::from_millis(1);
    while let Some(name) = missing(serials, macs) {
        if tokio::time::Instant::now() > deadline {
            return Err(Error::Deadline {
                operation: format!("wait for device {name:?}"),
                after: PLUG_DEADLINE,
            });
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(Duration::from_millis(50));
    }
    Ok(())
}

/// The PCI function of a sysfs device.
fn pci_function(device: &Path) -> Result<PathBuf> {
    let real = fs::canonicalize(device).context(|| format!("resolve {}", device.display()))?;
    real.ancestors()
        .find(|path| path.join("subsystem").read_link().is_ok_and(|bus| bus.ends_with("bus/pci")))
        .map(Path::to_owned)
        .ok_or_else(|| Error::Precondition(format!("{} is not on PCI", device.display())))
}

async fn remove(function: PathBuf) -> Result<()> {
    tokio::task::spawn_blocking(move || {
        fs::write(function.join("remove"), "1").context(|| format!("detach {}", function.display()))
    })
    .await
    .map_err(|error| Error::Helper { operation: "detach", reason: error.to_string() })?
}

/// Removes a disk's PCI function; success if the disk does not exist.
pub async fn release_disk(serial: &str) -> Result<()> {
    check_serial(serial)?;
    let Some(sys) = disk(serial) else { return Ok(()) };
    if let Some(node) = node(&sys) {
        // O_EXCL on a block device fails while it is mounted.
        let flags = OFlag::O_RDONLY | OFlag::O_EXCL | OFlag::O_CLOEXEC;
        match open(&node, flags, Mode::empty()) {
            Err(Errno::EBUSY) => {
                return Err(Error::Precondition(format!("disk {serial:?} is in use")));
            }
            Err(error) => return Err(error).context(|| format!("open {}", node.display())),
            Ok(_) => {}
        }
    }
    remove(pci_function(&sys.join("device"))?).await
}

/// Removes a NIC's PCI function; success if it does not exist.
pub async fn release_nic(mac: &str) -> Result<()> {
    let Some(name) = interface(mac) else { return Ok(()) };
    remove(pci_function(&Path::new("/sys/class/net").join(name).join("device"))?).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_serial_is_read_once_for_each_disk_and_anew_for_a_reused_name() {
        let dir = tempfile::tempdir().unwrap();
        let disk = dir.path().join("vda");
        fs::create_dir(&disk).unwrap();
        let write = |name: &str, text: &str| fs::write(disk.join(name), text).unwrap();
        assert_eq!(serial_of(&disk), None);
        write("diskseq", "1\n");
        write("serial", "a\n");
        assert_eq!(serial_of(&disk).as_deref(), Some("a"));
        write("serial", "b\n");
        assert_eq!(serial_of(&disk).as_deref(), Some("a"), "the cached value is used");
        write("diskseq", "2\n");
        assert_eq!(serial_of(&disk).as_deref(), Some("b"));
    }

    #[test]
    fn a_serial_is_not_a_path() {
        assert!(check_serial("img-0123456789").is_ok());
        for bad in ["", "../x", "a/b", "012345678901234567890", ".", "a b", "a,b"] {
            assert!(check_serial(bad).is_err(), "{bad:?}");
        }
    }
}
