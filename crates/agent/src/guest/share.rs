//! The pod's share: one virtio-fs device with all host volumes as top-level entries, mounted at the
//! first use until the pod ends.
//!
//! It is one file system whatever the host has mounted inside a volume: two volumes with the same
//! host file have the same inode here.

use std::fs::{self, File};
use std::io::Write as _;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
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
/// Most that the kernel reads ahead from the share, KiB. Its default is 128, so that a request, which can
/// have 1024, has 128 at most. A page fault of a mapping reads as much around it, hence not more.
const READ_AHEAD: u32 = 512;
/// Where the kernel has the settings of each file system, by device number.
const FILE_SYSTEMS: &str = "/sys/class/bdi";

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
            Source::Device => {
                mount_device(&self.at).context(what)?;
                if let Err(error) = set_read_ahead(Path::new(FILE_SYSTEMS), &self.at) {
                    tracing::warn!(%error, "the share keeps the kernel's read-ahead");
                }
            }
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

fn set_read_ahead(settings: &Path, at: &Path) -> Result<()> {
    let device = fs::metadata(at).context(|| format!("stat {}", at.display()))?.dev();
    let device = format!("{}:{}", libc::major(device), libc::minor(device));
    let setting = settings.join(device).join("read_ahead_kb");
    let write = |file: &mut File| file.write_all(READ_AHEAD.to_string().as_bytes());
    // Without O_CREAT: a kernel without the setting is an error.
    let written = File::options().write(true).open(&setting).and_then(|mut file| write(&mut file));
    written.context(|| format!("write {}", setting.display()))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_read_ahead_is_set_for_the_device_of_the_share_only() {
        let (settings, share) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        assert!(set_read_ahead(settings.path(), share.path()).is_err(), "no such setting");
        let device = fs::metadata(share.path()).unwrap().dev();
        let device = format!("{}:{}", libc::major(device), libc::minor(device));
        for name in [device.as_str(), "9:99"] {
            fs::create_dir(settings.path().join(name)).unwrap();
            fs::write(settings.path().join(name).join("read_ahead_kb"), "128").unwrap();
        }
        set_read_ahead(settings.path(), share.path()).unwrap();
        let of = |name: &str| fs::read_to_string(settings.path().join(name).join("read_ahead_kb"));
        assert_eq!((of(&device).unwrap(), of("9:99").unwrap()), ("512".into(), "128".into()));
    }
}
