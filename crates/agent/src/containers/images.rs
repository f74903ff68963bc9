//! EROFS images on disks. Each is mounted once at `<base>/images/<serial>` and shared by all
//! containers that use it as root file system or volume. In a pod without a VM they are host files
//! behind loop devices.

use std::fs;
use std::path::PathBuf;

use nix::mount::MsFlags;

use super::mounted_images::Mounted;
pub use super::mounted_images::{Image, Images};
use super::mounting::{detach, mount_at, unmount};
use crate::agent::Agent;
use crate::blocking::{MOUNT_TIMEOUT, Pool, with_timeout};
use crate::error::{Context, Error, Result};
use crate::guest::devices;
use crate::guest::loop_device::Loop;

pub async fn acquire(agent: &Agent, pool: &Pool, serial: &str) -> Result<Image> {
    if let Some(dir) = serial.strip_prefix("dir:") {
        if !agent.config.dirs_as_disks {
            return Err(Error::invalid("disk serial", "names a directory, not a disk"));
        }
        return Ok(Image { serial: None, path: PathBuf::from(dir) });
    }
    let mut images = with_timeout("lock the images", MOUNT_TIMEOUT, agent.images.lock()).await?;
    if let Some(mounted) = images.0.get_mut(serial) {
        mounted.users += 1;
        return Ok(Image { serial: Some(serial.to_owned()), path: mounted.path.clone() });
    }
    let path = mount(agent, pool, serial).await?;
    images.0.insert(serial.to_owned(), Mounted { users: 1, path: path.clone() });
    Ok(Image { serial: Some(serial.to_owned()), path })
}

async fn mount(agent: &Agent, pool: &Pool, serial: &str) -> Result<PathBuf> {
    let dir = agent.config.base.join("images");
    let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
    let (target, result) = if let Some(file) = serial.strip_prefix(agent_api::host_pod::FILE) {
        let mounts = agent.config.host()?.mounts.clone();
        let target = dir.join(agent.lock().allocate_number().to_string());
        let (file, at) = (PathBuf::from(file), target.clone());
        let work = move || {
            let image = mounts.open(&file)?;
            let device = Loop::of(&image)
                .context(|| format!("set up a loop device for image {}", file.display()))?;
            mount_at(device.node(), &at, "erofs", flags, "")
        };
        let late = target.clone();
        let mounted =
            pool.run_or_undo("mount the image", MOUNT_TIMEOUT, work, move |()| detach(&late));
        (target, mounted.await)
    } else {
        agent.config.require_vm()?;
        let node = devices::disk_node(serial)?;
        let target = dir.join(serial);
        let (at, late) = (target.clone(), target.clone());
        let work = move || mount_at(&node, &at, "erofs", flags, "");
        let mounted =
            pool.run_or_undo("mount the image", MOUNT_TIMEOUT, work, move |()| detach(&late));
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

pub async fn release(agent: &Agent, pool: &Pool, image: Image) -> Result<()> {
    let Some(serial) = image.serial else { return Ok(()) };
    let mut images = with_timeout("lock the images", MOUNT_TIMEOUT, agent.images.lock()).await?;
    let Some(mounted) = images.0.get_mut(&serial) else { return Ok(()) };
    mounted.users -= 1;
    if mounted.users > 0 {
        return Ok(());
    }
    images.0.remove(&serial);
    unmount(pool, &image.path).await?;
    let _ = fs::remove_dir(&image.path);
    Ok(())
}
