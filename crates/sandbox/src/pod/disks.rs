//! Disks and volumes of a pod's containers, host and guest side together.

use std::fs::File;
use std::path::Path;

use agent_api::v1;

use super::handle::Handle;
use crate::error::Error;
use crate::guest::Guest;
use crate::host::blocking;
use crate::host::volumes::{self, Limits};
use crate::policy::ContainerPhase;
use crate::vmm::serial;

/// The disk of an image: one a pod, shared by its containers.
pub(super) fn image_serial(image: &Path) -> String {
    serial('e', image.as_os_str().as_encoded_bytes())
}

pub(super) fn scratch_serial(container: &str) -> String {
    serial('s', container.as_bytes())
}

/// Plugs both disks of a container and waits until the guest sees them.
pub(super) async fn plug(
    handle: &Handle,
    image: &Path,
    container: &str,
    scratch: Option<File>,
) -> Result<(), Error> {
    let _one_at_a_time = handle.plugs.lock().await;
    let file = {
        let image = image.to_owned();
        blocking(move || {
            File::open(&image).map_err(|e| Error::io(format!("open image {}", image.display()), e))
        })
        .await?
    };
    let image = image_serial(image);
    handle.vmm.add_disk(&image, file, true).await?;
    let mut serials = vec![image];
    if let Some(scratch) = scratch {
        let serial = scratch_serial(container);
        handle.vmm.add_disk(&serial, scratch, false).await?;
        serials.push(serial);
    }
    let request = v1::RescanDevicesRequest { disk_serials: serials, macs: Vec::new() };
    let call = handle
        .guest
        .call("find the new disks", |mut c| async move { c.rescan_devices(request).await });
    call.await.map(drop)
}

/// Pulls a container's scratch disk, and its image's disk unless another container uses it. Goes
/// on past failures; the VM's end frees what is left.
pub(super) async fn unplug(handle: &Handle, image: &Path, container: &str) -> Result<(), Error> {
    let _one_at_a_time = handle.plugs.lock().await;
    let scratch = pull(handle, scratch_serial(container)).await;
    let pod = handle.pod();
    let mut others = pod.containers.values().filter(|c| c.id != container);
    if others.any(|c| c.spec.rootfs.image == image && c.phase != ContainerPhase::Removing) {
        return scratch;
    }
    let shared = pull(handle, image_serial(image)).await;
    scratch.and(shared)
}

async fn pull(handle: &Handle, serial: String) -> Result<(), Error> {
    let request = v1::ReleaseDeviceRequest { disk_serial: serial.clone(), mac: String::new() };
    let released =
        handle.guest.call("release a disk", |mut c| async move { c.release_device(request).await });
    match released.await {
        Ok(_) => {}
        // The guest has never seen it.
        Err(Error::FailedPrecondition { .. }) if !is_plugged(handle, &serial).await => {
            return Ok(());
        }
        Err(error) => return Err(error),
    }
    handle.vmm.remove_device(&serial).await
}

async fn is_plugged(handle: &Handle, serial: &str) -> bool {
    match handle.vmm.status().await {
        Ok(status) => status.devices.iter().any(|d| d.id == serial),
        Err(_) => true,
    }
}

/// Name of a container's n-th volume in the guest; the guest frees those that begin with a
/// container's id together with it.
pub(super) fn volume_id(container: &str, n: usize) -> String {
    format!("{container}.{n}")
}

/// Writes a volume that is already in memory.
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

/// Copies a file or folder of the host into the guest, piece by piece.
pub(super) async fn copy_volume(handle: &Handle, id: &str, source: &Path) -> Result<(), Error> {
    let config = &handle.node.config;
    let limits = Limits { bytes: config.volume_bytes, files: config.volume_files };
    // Blocks of the tmpfs and its inodes' share come on top of the content.
    let size_limit = 2 * limits.bytes;
    let (sender, mut batches) = tokio::sync::mpsc::channel(1);
    let source = source.to_owned();
    let reader = tokio::task::spawn_blocking(move || {
        volumes::read(&source, limits, &mut |files| {
            let gone = |_| Error::Cancelled { what: "copy of a volume" };
            sender.blocking_send(files).map_err(gone)
        })
    });
    while let Some(files) = batches.recv().await {
        send(&handle.guest, id, files, size_limit, true).await?;
    }
    reader.await.map_err(|e| Error::Internal(e.into()))??;
    send(&handle.guest, id, Vec::new(), size_limit, false).await
}
