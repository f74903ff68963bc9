//! Disks and volumes of a pod's containers, host and guest side together.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::{FileTypeExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

use agent_api::v1;
use nix::fcntl::{FcntlArg, OFlag, fcntl};

use super::handle::Handle;
use crate::error::Error;
use crate::guest::Guest;
use crate::host::volumes::{self, Limits};
use crate::machine::Machine;
use crate::model::{BlockDevice, ContainerSpec, VolumeSource};
use crate::policy::ContainerPhase;
use crate::vmm::serial;

/// Serial of a container's scratch disk, in a pod without a shared scratch disk.
pub(super) fn scratch_serial(container: &str) -> String {
    serial('s', container.as_bytes())
}

/// Serial of a host's block device: one disk per pod and access mode, so that containers that share
/// it have one cache.
pub(super) fn device_serial(device: &BlockDevice) -> String {
    let kind = if is_written(device) { 'w' } else { 'r' };
    serial(kind, device.host_path.as_os_str().as_encoded_bytes())
}

fn is_written(device: &BlockDevice) -> bool {
    device.permissions.contains('w')
}

/// Images of a container: root file system and volumes.
fn images(spec: &ContainerSpec) -> impl Iterator<Item = &Path> {
    let volumes = spec.volumes.iter().filter_map(|v| match &v.source {
        VolumeSource::Image { image, .. } => Some(image.as_path()),
        _ => None,
    });
    // Empty: a host directory instead.
    let rootfs = Some(spec.rootfs.image.as_path()).filter(|image| !image.as_os_str().is_empty());
    rootfs.into_iter().chain(volumes)
}

/// Disks of a container that other containers may use too.
fn shared_serials(machine: &Machine, spec: &ContainerSpec) -> BTreeSet<String> {
    let images = images(spec).map(|image| machine.image(image));
    images.chain(spec.devices.iter().map(device_serial)).collect()
}

struct Disk {
    serial: String,
    file: File,
    read_only: bool,
}

/// Opens the files of those shared disks that are not plugged yet. Blocks.
fn open_shared(
    machine: &Machine,
    spec: &ContainerSpec,
    plugged: &BTreeSet<String>,
) -> Result<Vec<Disk>, Error> {
    let mut disks = Vec::new();
    for image in images(spec) {
        let serial = machine.image(image);
        if !plugged.contains(&serial) {
            let file = File::open(image);
            let file = file.map_err(|e| Error::io(format!("open image {}", image.display()), e))?;
            disks.push(Disk { serial, file, read_only: true });
        }
    }
    for device in &spec.devices {
        let serial = device_serial(device);
        if !plugged.contains(&serial) {
            let read_only = !is_written(device);
            let file = open_device(&device.host_path, read_only)?;
            disks.push(Disk { serial, file, read_only });
        }
    }
    Ok(disks)
}

fn open_device(path: &Path, read_only: bool) -> Result<File, Error> {
    let mut options = File::options();
    // O_NONBLOCK: the path may be a FIFO; it is checked below.
    options.read(true).write(!read_only).custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC);
    let failed = |e| Error::io(format!("open device {}", path.display()), e);
    let file = options.open(path).map_err(|e| match e.kind() {
        ErrorKind::NotFound => Error::invalid(format!("device {}: {e}", path.display())),
        _ => failed(e),
    })?;
    if !file.metadata().map_err(failed)?.file_type().is_block_device() {
        return Err(Error::Unsupported {
            message: format!(
                "{} is not a block device; only block devices of the host can be passed to a VM",
                path.display()
            ),
        });
    }
    clear_nonblock(&file).map_err(failed)?;
    Ok(file)
}

/// Clears O_NONBLOCK. Before Linux 6.5, io_uring fails with EAGAIN while it is set, on devices
/// without nowait support.
fn clear_nonblock(file: &File) -> io::Result<()> {
    let flags = OFlag::from_bits_retain(fcntl(file, FcntlArg::F_GETFL)?);
    fcntl(file, FcntlArg::F_SETFL(flags.difference(OFlag::O_NONBLOCK)))?;
    Ok(())
}

/// Plugs all disks of a container and waits until the guest has found them.
pub(super) async fn plug(
    handle: &Handle,
    container: &str,
    spec: &Arc<ContainerSpec>,
    scratch: Option<File>,
) -> Result<(), Error> {
    let Machine::Vm(vmm) = &handle.machine else { return Ok(()) };
    let mut plugged = handle.known_disks.lock().await;
    let wanted = shared_serials(&handle.machine, spec);
    let mut disks = if wanted.is_subset(&*plugged) {
        Vec::new()
    } else {
        let (machine, spec, plugged) = (handle.machine.clone(), spec.clone(), plugged.clone());
        let what = "open the container's images and devices";
        handle
            .lookups
            .run_with_limit(what, move || open_shared(&machine, &spec, &plugged))
            .await??
    };
    let own = scratch.map(|file| (scratch_serial(container), file));
    disks.extend(own.map(|(serial, file)| Disk { serial, file, read_only: false }));
    let mut serials = Vec::new();
    for Disk { serial, file, read_only } in disks {
        if !serials.contains(&serial) {
            vmm.add_disk(&serial, file, read_only).await?;
            serials.push(serial);
        }
    }
    if serials.is_empty() {
        return Ok(());
    }
    tokio::select! {
        found = rescan(handle, serials.clone()) => found?,
        () = handle.stopping.cancelled() => {
            return Err(Error::precondition("the pod was stopped"));
        }
    }
    plugged.extend(serials);
    Ok(())
}

/// Makes the guest rescan for disks.
async fn rescan(handle: &Handle, disk_serials: Vec<String>) -> Result<(), Error> {
    let request = v1::RescanDevicesRequest { disk_serials, macs: Vec::new() };
    let call = handle
        .guest
        .call("find the new disks", |mut c| async move { c.rescan_devices(request).await });
    call.await.map(drop)
}

/// Unplugs a container's scratch disk and those disks that no other container uses. Continues after
/// failures; the VM's end frees the rest.
pub(super) async fn unplug(
    handle: &Handle,
    container: &str,
    spec: &ContainerSpec,
) -> Result<(), Error> {
    let Machine::Vm(_) = &handle.machine else { return Ok(()) };
    let mut plugged = handle.known_disks.lock().await;
    let pod = handle.pod();
    let others = pod
        .containers
        .values()
        .filter(|c| c.id != container && c.phase != ContainerPhase::Removing)
        .flat_map(|c| shared_serials(&handle.machine, &c.spec));
    let kept: BTreeSet<String> = others.collect();
    let mut result = Ok(());
    let own = Some(scratch_serial(container)).filter(|_| !pod.has_scratch_disk());
    let shared = shared_serials(&handle.machine, spec);
    for serial in own.into_iter().chain(shared.into_iter().filter(|s| !kept.contains(s))) {
        plugged.remove(&serial);
        result = result.and(unplug_disk(handle, serial).await);
    }
    result
}

async fn unplug_disk(handle: &Handle, serial: String) -> Result<(), Error> {
    match release(handle, &serial).await {
        Ok(()) => {}
        // The guest has not found it.
        Err(Error::FailedPrecondition { .. }) if !is_plugged(handle, &serial).await => {
            return Ok(());
        }
        // Plugged, but the guest has not rescanned yet.
        Err(Error::FailedPrecondition { .. }) => {
            rescan(handle, vec![serial.clone()]).await?;
            release(handle, &serial).await?;
        }
        Err(error) => return Err(error),
    }
    handle.machine.vmm()?.remove_device(&serial).await
}

async fn release(handle: &Handle, serial: &str) -> Result<(), Error> {
    let request = v1::ReleaseDeviceRequest { disk_serial: serial.to_owned(), mac: String::new() };
    let released =
        handle.guest.call("release a disk", |mut c| async move { c.release_device(request).await });
    released.await.map(drop)
}

async fn is_plugged(handle: &Handle, serial: &str) -> bool {
    let Ok(vmm) = handle.machine.vmm() else { return false };
    match vmm.status().await {
        Ok(status) => status.devices.iter().any(|d| d.id == serial),
        Err(_) => true,
    }
}

/// Writes a volume from memory.
pub(super) async fn write_volume(
    guest: &Guest,
    id: &str,
    files: Vec<v1::VolumeFile>,
) -> Result<(), Error> {
    send(guest, id, files, 0, false).await
}

async fn send(
    guest: &Guest,
    id: &str,
    files: Vec<v1::VolumeFile>,
    size_limit: u64,
    more: bool,
) -> Result<(), Error> {
    let volume_id = id.to_owned();
    let request = v1::WriteVolumeRequest { volume_id, files, swap: false, size_limit, more };
    guest.call("write a volume", |mut c| async move { c.write_volume(request).await }).await?;
    Ok(())
}

/// Replaces a volume's content atomically by its `..data` link. An incomplete earlier swap is
/// aborted first.
pub(super) async fn swap_volume(
    guest: &Guest,
    id: &str,
    mut batches: Vec<Vec<v1::VolumeFile>>,
    size_limit: u64,
    incomplete: bool,
) -> Result<(), Error> {
    if incomplete {
        // A reserved name is refused, and the refusal aborts the pending swap.
        let path = "..".to_owned();
        let reserved = v1::VolumeFile { path, mode: libc::S_IFREG, ..Default::default() };
        match swap(guest, id, vec![reserved], size_limit, false).await {
            Ok(()) | Err(Error::InvalidArgument { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    let last = batches.pop().unwrap_or_default();
    for batch in batches {
        swap(guest, id, batch, size_limit, true).await?;
    }
    swap(guest, id, last, size_limit, false).await
}

async fn swap(
    guest: &Guest,
    id: &str,
    files: Vec<v1::VolumeFile>,
    size_limit: u64,
    more: bool,
) -> Result<(), Error> {
    let volume_id = id.to_owned();
    let request = v1::WriteVolumeRequest { volume_id, files, swap: true, size_limit, more };
    guest.call("replace a volume", |mut c| async move { c.write_volume(request).await }).await?;
    Ok(())
}

/// Copies a host file or directory into the guest, in batches.
pub(super) async fn copy_volume(handle: &Handle, id: &str, source: &Path) -> Result<(), Error> {
    let config = &handle.node.config;
    let limits = Limits { bytes: config.volume_bytes, files: config.volume_files };
    // tmpfs blocks and inodes need more than the content.
    let size_limit = 2 * limits.bytes;
    let mut copy = volumes::Copy::of(&handle.lookups, source.to_owned(), limits);
    while let Some(files) = copy.next().await? {
        send(&handle.guest, id, files, size_limit, true).await?;
    }
    send(&handle.guest, id, Vec::new(), size_limit, false).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clearing_nonblock_keeps_the_other_flags() {
        let mut options = File::options();
        options.read(true).write(true).custom_flags(libc::O_NONBLOCK | libc::O_APPEND);
        let file = options.open("/dev/null").unwrap();
        let flags = || OFlag::from_bits_retain(fcntl(&file, FcntlArg::F_GETFL).unwrap());
        assert!(flags().contains(OFlag::O_NONBLOCK));
        clear_nonblock(&file).unwrap();
        assert!(!flags().contains(OFlag::O_NONBLOCK));
        assert!(flags().contains(OFlag::O_RDWR | OFlag::O_APPEND));
    }

    #[test]
    fn a_device_that_is_not_a_block_device_is_refused() {
        let refused = open_device(Path::new("/dev/null"), true);
        assert!(matches!(refused, Err(Error::Unsupported { .. })));
    }
}
