//! The pod's share: the folder of the host's volumes, a virtio-fs device that is mounted at first
//! use and stays until the pod ends. Its top-level entries are the volumes.
//!
//! All of it is one file system, whatever the host has mounted inside a volume: two volumes that lead
//! to one file of the host lead to one inode here.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use agent_api::SHARE_TAG;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MsFlags, mount};

use super::devices;
use super::volumes::{open_dir, relative};
use crate::error::{Doing, Error, Result};

/// From the plugging of the device until its driver has found it.
const TAG_DEADLINE: Duration = Duration::from_secs(10);
/// Where the share comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// The virtio-fs device with agent-api's tag.
    Device,
    /// A folder instead of it, for tests without a VM.
    Folder(PathBuf),
}

#[derive(Debug)]
pub struct Share {
    source: Source,
    at: PathBuf,
    mounted: bool,
}

impl Share {
    pub fn new(source: Source, at: PathBuf) -> Self {
        Self { source, at, mounted: false }
    }

    /// Mounts it unless it is mounted. Blocks.
    pub fn mount(&mut self) -> Result<()> {
        if self.mounted {
            return Ok(());
        }
        let what = || format!("mount the pod's share at {}", self.at.display());
        fs::create_dir_all(&self.at).doing(what)?;
        match &self.source {
            Source::Folder(folder) => {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
                mount(Some(folder), &self.at, None::<&str>, flags, None::<&str>).doing(what)?;
            }
            Source::Device => mount_device(&self.at).doing(what)?,
        }
        // Slaves of it, in containers, see what is mounted in it later.
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(None::<&str>, &self.at, None::<&str>, flags, None::<&str>).doing(what)?;
        self.mounted = true;
        Ok(())
    }

    /// Where it is mounted.
    pub fn place(&self) -> &Path {
        &self.at
    }
}

/// An entry of the share mounted at `at`, or what `sub_path` names in it: an O_PATH descriptor. May
/// block for as long as the host, or a file system that a container has mounted in it, does.
pub fn open(at: &Path, id: &str, sub_path: &str) -> Result<OwnedFd> {
    crate::ids::check("volume id", id)?;
    let share = open_dir(at)?;
    let mut path = PathBuf::from(id);
    if !sub_path.is_empty() {
        path.push(relative(sub_path)?);
    }
    let what = || format!("open {} of the pod's share", path.display());
    match enter(&share, &path) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            let id = path.display().to_string();
            Err(Error::NotFound { what: "entry of the pod's share", id })
        }
        result => result.doing(what),
    }
}

fn enter(dir: &OwnedFd, path: &Path) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(dir.as_fd(), path, how)
}

fn mount_device(at: &Path) -> std::io::Result<()> {
    let deadline = Instant::now() + TAG_DEADLINE;
    let mut pause = Duration::from_millis(1);
    let mut rescanned = false;
    loop {
        let no_flags = MsFlags::empty();
        match mount(Some(SHARE_TAG), at, Some("virtiofs"), no_flags, None::<&str>) {
            Ok(()) => return Ok(()),
            // No device with this tag (yet).
            Err(Errno::EINVAL | Errno::ENOENT) if Instant::now() < deadline => {
                if !rescanned {
                    devices::rescan_bus()?;
                    rescanned = true;
                    continue;
                }
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(50));
            }
            Err(error) => return Err(error.into()),
        }
    }
}
