//! EROFS images on disks, mounted once at `<base>/images/<serial>` whatever the number of
//! containers that stand on one or have it as a volume. In a pod without a VM they are files of the
//! host, behind loop devices.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use nix::mount::MsFlags;

use super::rootfs::{detach, mount_at, unmount};
use crate::agent::Agent;
use crate::error::{Doing, Error, Result};
use crate::guest::devices;
use crate::guest::loop_device::Loop;
use crate::lanes::{Lane, MOUNT, in_time};

/// Mounted images by serial.
#[derive(Debug, Default)]
pub struct Images(HashMap<String, Mounted>);

#[derive(Debug)]
struct Mounted {
    users: usize,
    path: PathBuf,
}

/// An image in use; has to be given back with [`release`].
#[derive(Debug)]
pub struct Image {
    /// None: a folder instead of a disk, in tests.
    serial: Option<String>,
    path: PathBuf,
}

impl Image {
    /// Where its content is.
    pub fn path(&self) -> &PathBuf {
        &self.path
    }
}

pub async fn take(agent: &Agent, lane: &Lane, serial: &str) -> Result<Image> {
    if let Some(folder) = serial.strip_prefix("dir:") {
        if !agent.config.folders_as_disks {
            return Err(Error::invalid("disk serial", "names a folder, not a disk"));
        }
        return Ok(Image { serial: None, path: PathBuf::from(folder) });
    }
    let mut images = in_time("wait for the images", MOUNT, agent.images.lock()).await?;
    if let Some(mounted) = images.0.get_mut(serial) {
        mounted.users += 1;
        return Ok(Image { serial: Some(serial.to_owned()), path: mounted.path.clone() });
    }
    let path = mount(agent, lane, serial).await?;
    images.0.insert(serial.to_owned(), Mounted { users: 1, path: path.clone() });
    Ok(Image { serial: Some(serial.to_owned()), path })
}

async fn mount(agent: &Agent, lane: &Lane, serial: &str) -> Result<PathBuf> {
    let folder = agent.config.base.join("images");
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    let (target, result) = if let Some(file) = serial.strip_prefix(agent_api::host_pod::FILE) {
        let mounts = agent.config.host()?.mounts.clone();
        let target = folder.join(agent.lock().number().to_string());
        let (file, at) = (PathBuf::from(file), target.clone());
        let work = move || {
            let image = mounts.open(&file)?;
            let device = Loop::of(&image)
                .doing(|| format!("set up a loop device for image {}", file.display()))?;
            mount_at(device.node(), &at, "erofs", flags, "")
        };
        let late = target.clone();
        let mounted = lane.run_or_undo("mount the image", MOUNT, work, move |()| detach(&late));
        (target, mounted.await)
    } else {
        agent.config.has_devices()?;
        let node = devices::disk_node(serial)?;
        let target = folder.join(serial);
        let (at, late) = (target.clone(), target.clone());
        let work = move || mount_at(&node, &at, "erofs", flags, "");
        let mounted = lane.run_or_undo("mount the image", MOUNT, work, move |()| detach(&late));
        (target, mounted.await)
    };
    match result {
        Ok(()) => Ok(target),
        Err(error) => {
            let _ = fs::remove_dir(&target);
            Err(error)
        }
    }
}

pub async fn release(agent: &Agent, lane: &Lane, image: Image) -> Result<()> {
    let Some(serial) = image.serial else { return Ok(()) };
    let mut images = in_time("wait for the images", MOUNT, agent.images.lock()).await?;
    let Some(mounted) = images.0.get_mut(&serial) else { return Ok(()) };
    mounted.users -= 1;
    if mounted.users > 0 {
        return Ok(());
    }
    images.0.remove(&serial);
    unmount(lane, &image.path).await?;
    let _ = fs::remove_dir(&image.path);
    Ok(())
}
