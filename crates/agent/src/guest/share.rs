//! The pod's share: one virtio-fs device with all host volumes as top-level entries, mounted at the
//! first use until the pod ends.
//!
//! It is one file system whatever the host has mounted inside a volume: two volumes with the same
//! host file have the same inode here.

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
use crate::error::{Context, Error, Result};

/// Time from hot-plug to the driver's probe.
const TAG_DEADLINE: Duration = Duration::from_secs(10);
/// Source of the share.
#[derive(Debug, Clone)]
pub enum Source {
    /// The virtio-fs device with agent-api's tag.
    Device,
    /// A directory, for tests without a VM.
    Directory(PathBuf),
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

    /// Mounts the share if it is not mounted. Blocks.
    pub fn mount(&mut self) -> Result<()> {
        if self.mounted {
            return Ok(());
        }
        let what = || format!("mount the pod's share at {}", self.at.display());
        fs::create_dir_all(&self.at).context(what)?;
        match &self.source {
            Source::Directory(dir) => {
                let flags = MsFlags::MS_BIND | MsFlags::MS_REC;
                mount(Some(dir), &self.at, None::<&str>, flags, None::<&str>).context(what)?;
            }
            Source::Device => mount_device(&self.at).context(what)?,
        }
        // Shared, so that later mounts propagate to slave mounts in containers.
        let flags = MsFlags::MS_SHARED | MsFlags::MS_REC;
        mount(None::<&str>, &self.at, None::<&str>, flags, None::<&str>).context(what)?;
        self.mounted = true;
        Ok(())
    }

    /// The mount point.
    pub fn mount_point(&self) -> &Path {
        &self.at
    }
}

/// Returns an O_PATH descriptor of an entry of the share mounted at `at`, or of `sub_path` in it.
/// May block in the host's file system, or in one that a container has mounted there.
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
        result => result.context(what),
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
            // No device with this tag yet.
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
