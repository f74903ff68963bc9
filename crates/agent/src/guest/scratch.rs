//! The pod's scratch disk: ext4 with project quotas, mounted at `<base>/scratch` at its first use.
//! Each writable layer and each emptyDir is a directory with its own project id:
//! ```text
//! containers/<project>   a container's writable layer
//! volumes/<project>      an emptyDir
//! trash/<n>              discarded, deleted in the background
//! ```
//! The disk exists as long as the VM.

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::{SCRATCH_SERIAL, v1};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};

use super::quota::{self, Limits};
use super::volumes::open_dir;
use super::{devices, remove};
use crate::error::{Context, Error, Result};

/// No barriers, as nothing has to survive a crash. discard frees deleted blocks on the host.
/// noinit_itable: the inode tables are holes of the host's file, which read as zeros.
const OPTIONS: &str = "prjquota,discard,nobarrier,noinit_itable";
/// Error for a custom guest kernel without project quotas.
const NO_QUOTAS: &str = "the guest kernel does not support project quotas, which the scratch disk needs: \
     CONFIG_QUOTA and CONFIG_QFMT_V2, or the module quota_v2 loaded";
const CONTAINERS: &str = "containers";
const VOLUMES: &str = "volumes";
const TRASH: &str = "trash";

/// Source of the file system.
#[derive(Debug, Clone)]
pub enum Source {
    /// The disk with agent-api's serial.
    Device,
    /// A directory without quotas, for tests without a VM.
    Directory(PathBuf),
}

/// Use of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Container,
    Volume,
}

/// A directory of the scratch disk.
#[derive(Debug, Clone)]
pub struct ScratchDir {
    path: PathBuf,
    project: u32,
    /// Root of the disk, for quota calls; None without quotas.
    disk: Option<Arc<OwnedFd>>,
}

impl ScratchDir {
    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn usage(&self) -> v1::FsUsage {
        let whole = file_system_usage(&self.path);
        let Some(disk) = &self.disk else { return whole };
        let Ok(usage) = quota::usage(disk, self.project) else { return whole };
        let at_most = |limit: u64, whole: u64| if limit == 0 { whole } else { limit.min(whole) };
        v1::FsUsage {
            used_bytes: usage.bytes,
            inodes_used: usage.inodes,
            capacity: at_most(usage.limits.bytes, whole.capacity),
            inodes: at_most(usage.limits.inodes, whole.inodes),
        }
    }
}

/// Usage and size of a whole file system.
pub fn file_system_usage(path: &Path) -> v1::FsUsage {
    let Ok(stat) = nix::sys::statvfs::statvfs(path) else { return v1::FsUsage::default() };
    v1::FsUsage {
        used_bytes: (stat.blocks() - stat.blocks_free()) * stat.fragment_size(),
        inodes_used: stat.files() - stat.files_free(),
        capacity: stat.blocks() * stat.fragment_size(),
        inodes: stat.files(),
    }
}

#[derive(Debug)]
pub struct Scratch {
    source: Source,
    at: PathBuf,
    mounted: bool,
    disk: Option<Arc<OwnedFd>>,
    /// Last number given to a project or a trash entry; each is used once. Project 0 is the default
    /// of all other files.
    last: u32,
}

impl Scratch {
    pub fn new(source: Source, at: PathBuf) -> Self {
        Self { source, at, mounted: false, disk: None, last: 0 }
    }

    fn number(&mut self) -> Result<u32> {
        self.last = self.last.checked_add(1).ok_or(Error::Exhausted {
            what: "directories created on the scratch disk",
            limit: u32::MAX.into(),
        })?;
        Ok(self.last)
    }

    /// Mounts the disk if it is not mounted. Blocks.
    fn mount(&mut self) -> Result<()> {
        if self.mounted {
            return Ok(());
        }
        let what = || format!("mount the scratch disk at {}", self.at.display());
        fs::create_dir_all(&self.at).context(what)?;
        match &self.source {
            Source::Directory(dir) => {
                fs::create_dir_all(dir).context(what)?;
                mount(Some(dir), &self.at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                    .context(what)?;
            }
            Source::Device => {
                let node = devices::disk_node(SCRATCH_SERIAL)?;
                let (kind, data) = (Some("ext4"), Some(OPTIONS));
                match mount(Some(&node), &self.at, kind, MsFlags::empty(), data) {
                    // ext4 returns ESRCH if find_quota_format() has no vfsv1 (fs/quota/dquot.c).
                    Err(Errno::ESRCH) => return Err(Error::Precondition(NO_QUOTAS.to_owned())),
                    outcome => outcome.context(what)?,
                }
                self.disk = Some(Arc::new(open_dir(&self.at)?));
            }
        }
        self.mounted = true;
        for name in [CONTAINERS, VOLUMES, TRASH] {
            let path = self.at.join(name);
            fs::DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&path)
                .context(|| format!("create {}", path.display()))?;
        }
        Ok(())
    }

    /// Creates an empty directory (mode 0755, root:root) with limits. Blocks.
    pub fn make(&mut self, purpose: Purpose, limits: Limits) -> Result<ScratchDir> {
        self.mount()?;
        let project = self.number()?;
        let parent = match purpose {
            Purpose::Container => CONTAINERS,
            Purpose::Volume => VOLUMES,
        };
        let path = self.at.join(parent).join(project.to_string());
        let what = || format!("create {}", path.display());
        fs::create_dir(&path).context(what)?;
        let dir = ScratchDir { path: path.clone(), project, disk: self.disk.clone() };
        if let Some(disk) = &dir.disk {
            let quota = || format!("set the quota of {}", path.display());
            let joined = open_dir_to_read(&path)
                .and_then(|dir| quota::join(dir.as_fd(), project))
                .and_then(|()| quota::limit(disk, project, limits));
            if let Err(error) = joined {
                let _ = fs::remove_dir(&path);
                return Err(error).context(quota);
            }
        }
        Ok(dir)
    }

    /// Moves a directory to the trash. Blocks for the rename only.
    pub fn discard(&mut self, dir: &ScratchDir) -> Result<()> {
        let what = || format!("discard {}", dir.path.display());
        let name = self.number()?.to_string();
        match fs::rename(&dir.path, self.at.join(TRASH).join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).context(what);
            }
            _ => {}
        }
        if let Some(disk) = &dir.disk {
            // Without limits the kernel drops the project's record with its last file.
            quota::limit(disk, dir.project, Limits::default()).context(what)?;
        }
        Ok(())
    }

    /// Path of the trash, if the disk was mounted.
    pub fn trash(&self) -> Option<PathBuf> {
        self.mounted.then(|| self.at.join(TRASH))
    }
}

/// Deletes the trash. Blocks.
pub fn delete_trash(trash: &Path) {
    if let Err(error) = remove::remove_contents(trash) {
        tracing::warn!(%error, "cannot delete the trash of the scratch disk");
    }
}

fn open_dir_to_read(path: &Path) -> std::io::Result<fs::File> {
    // The ioctls fail on O_PATH descriptors.
    fs::File::open(path)
}
