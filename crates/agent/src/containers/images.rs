//! EROFS images on disks, mounted once at `<base>/images/<serial>` whatever the number of
//! containers that stand on one or have it as a volume.

use std::collections::HashMap;
use std::fs;
use std::path::PathBuf;

use nix::mount::MsFlags;

use super::rootfs::{blocking, mount_at, unmount};
use crate::agent::Agent;
use crate::error::{Error, Result};
use crate::guest::devices;

/// How many uses each mounted image has, by serial.
#[derive(Debug, Default)]
pub struct Images(HashMap<String, usize>);

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

pub async fn take(agent: &Agent, serial: &str) -> Result<Image> {
    if let Some(folder) = serial.strip_prefix("dir:") {
        if !agent.config.folders_as_disks {
            return Err(Error::invalid("disk serial", "names a folder, not a disk"));
        }
        return Ok(Image { serial: None, path: PathBuf::from(folder) });
    }
    let node = devices::disk_node(serial)?;
    let target = agent.config.base.join("images").join(serial);
    let mut images = agent.images.lock().await;
    let users = images.0.entry(serial.to_owned()).or_insert(0);
    if *users == 0 {
        let at = target.clone();
        let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
        let result = blocking(move || mount_at(&node, &at, "erofs", flags, "")).await;
        if let Err(error) = result {
            images.0.remove(serial);
            let _ = fs::remove_dir(&target);
            return Err(error);
        }
    }
    *users += 1;
    Ok(Image { serial: Some(serial.to_owned()), path: target })
}

pub async fn release(agent: &Agent, image: Image) -> Result<()> {
    let Some(serial) = image.serial else { return Ok(()) };
    let mut images = agent.images.lock().await;
    let Some(users) = images.0.get_mut(&serial) else { return Ok(()) };
    *users -= 1;
    if *users > 0 {
        return Ok(());
    }
    images.0.remove(&serial);
    unmount(&image.path).await?;
    let _ = fs::remove_dir(&image.path);
    Ok(())
}
