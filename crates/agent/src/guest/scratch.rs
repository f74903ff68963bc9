//! The pod's scratch disk: ext4 with project quotas, mounted at `<base>/scratch` at its first use.
//! Each writable layer and each emptyDir is a folder of it with a project of its own:
//! ```text
//! containers/<project>   a container's writable layer
//! volumes/<project>      an emptyDir
//! trash/<n>              removed, deleted by and by
//! ```
//! Nothing on it outlives the VM.

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
use crate::error::{Doing, Error, Result};

/// Nothing has to survive a crash: no barriers. What is deleted is given back to the host. Inode
/// tables are holes of the host's file, which read as zeros: nobody has to write them.
const OPTIONS: &str = "prjquota,discard,nobarrier,noinit_itable";
/// Says what a guest kernel of the operator's own lacks.
const NO_QUOTAS: &str = "the guest kernel has no project quotas, which the scratch disk needs: \
     CONFIG_QUOTA and CONFIG_QFMT_V2, or the module quota_v2 loaded";
const CONTAINERS: &str = "containers";
const VOLUMES: &str = "volumes";
const TRASH: &str = "trash";

/// Where it comes from.
#[derive(Debug, Clone)]
pub enum Source {
    /// The disk with agent-api's serial.
    Device,
    /// A folder instead of it, without quotas: for tests without a VM.
    Folder(PathBuf),
}

/// What a folder is made for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    Container,
    Volume,
}

/// A folder of the scratch disk.
#[derive(Debug, Clone)]
pub struct Folder {
    path: PathBuf,
    project: u32,
    /// The disk's root, for calls about its quotas; none: it has no quotas.
    disk: Option<Arc<OwnedFd>>,
}

impl Folder {
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

/// What a whole file system holds and can hold.
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
    /// Projects and names of trash are given once. Project 0 is that of everything else.
    last: u32,
}

impl Scratch {
    pub fn new(source: Source, at: PathBuf) -> Self {
        Self { source, at, mounted: false, disk: None, last: 0 }
    }

    fn number(&mut self) -> Result<u32> {
        self.last = self.last.checked_add(1).ok_or(Error::Exhausted {
            what: "folders of the scratch disk in a pod's life",
            limit: u32::MAX.into(),
        })?;
        Ok(self.last)
    }

    /// Mounts it unless it is mounted. Blocks.
    fn mount(&mut self) -> Result<()> {
        if self.mounted {
            return Ok(());
        }
        let what = || format!("mount the scratch disk at {}", self.at.display());
        fs::create_dir_all(&self.at).doing(what)?;
        match &self.source {
            Source::Folder(folder) => {
                fs::create_dir_all(folder).doing(what)?;
                mount(Some(folder), &self.at, None::<&str>, MsFlags::MS_BIND, None::<&str>)
                    .doing(what)?;
            }
            Source::Device => {
                let node = devices::disk_node(SCRATCH_SERIAL)?;
                let (kind, data) = (Some("ext4"), Some(OPTIONS));
                match mount(Some(&node), &self.at, kind, MsFlags::empty(), data) {
                    // ext4 answers so where find_quota_format() knows no vfsv1 (fs/quota/dquot.c).
                    Err(Errno::ESRCH) => return Err(Error::Precondition(NO_QUOTAS.to_owned())),
                    outcome => outcome.doing(what)?,
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
                .doing(|| format!("make {}", path.display()))?;
        }
        Ok(())
    }

    /// Makes an empty folder (0755, root's). Blocks.
    pub fn make(&mut self, purpose: Purpose, limits: Limits) -> Result<Folder> {
        self.mount()?;
        let project = self.number()?;
        let parent = match purpose {
            Purpose::Container => CONTAINERS,
            Purpose::Volume => VOLUMES,
        };
        let path = self.at.join(parent).join(project.to_string());
        let what = || format!("make {}", path.display());
        fs::create_dir(&path).doing(what)?;
        let folder = Folder { path: path.clone(), project, disk: self.disk.clone() };
        if let Some(disk) = &folder.disk {
            let quota = || format!("set the quota of {}", path.display());
            let joined = open_dir_to_read(&path)
                .and_then(|dir| quota::join(dir.as_fd(), project))
                .and_then(|()| quota::limit(disk, project, limits));
            if let Err(error) = joined {
                let _ = fs::remove_dir(&path);
                return Err(error).doing(quota);
            }
        }
        Ok(folder)
    }

    /// Takes a folder out of use at once; its files are deleted by [`Self::trash`]. Blocks.
    pub fn discard(&mut self, folder: &Folder) -> Result<()> {
        let what = || format!("discard {}", folder.path.display());
        let name = self.number()?.to_string();
        match fs::rename(&folder.path, self.at.join(TRASH).join(name)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).doing(what);
            }
            _ => {}
        }
        if let Some(disk) = &folder.disk {
            // Without limits the project's record goes with its last file.
            quota::limit(disk, folder.project, Limits::default()).doing(what)?;
        }
        Ok(())
    }

    /// What is to be emptied, if anything ever was discarded.
    pub fn trash(&self) -> Option<PathBuf> {
        self.mounted.then(|| self.at.join(TRASH))
    }
}

/// Deletes what was discarded. Blocks as long as that takes.
pub fn empty_trash(trash: &Path) {
    if let Err(error) = remove::everything_in(trash) {
        tracing::warn!(%error, "discarded files stay on the scratch disk");
    }
}

fn open_dir_to_read(path: &Path) -> std::io::Result<fs::File> {
    // The ioctls refuse O_PATH.
    fs::File::open(path)
}
