//! emptyDirs of a pod: directories of the scratch disk, each with a project quota, or tmpfs. Each
//! is a shared mount at `<base>/empty-dirs/<id>`, so that mounts propagate between containers with
//! such a propagation. They exist until the VM ends.

use std::collections::HashMap;
use std::fs::{self, DirBuilder};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use agent_api::v1;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::stat::{Mode, fchmod, mkdirat};
use nix::unistd::{Gid, Uid, fchown};

use super::quota::Limits;
use super::scratch::{Purpose, Scratch, ScratchDir, file_system_usage};
use super::volumes::{open_dir, relative, write_file};
use crate::error::{Context, Error, Result};

/// Maximum emptyDirs of a pod; each is a mount, and mounts slow down every container start.
const MAX: usize = 1024;
const PERMISSIONS: u32 = 0o7777;

#[derive(Debug)]
pub struct EmptyDirs {
    base: PathBuf,
    dirs: HashMap<String, EmptyDir>,
}

#[derive(Debug)]
struct EmptyDir {
    /// Directory of the scratch disk; None for a tmpfs.
    dir: Option<ScratchDir>,
    /// The initial content is complete.
    ready: bool,
}

/// Owner and mode of created directories.
#[derive(Debug, Clone, Copy)]
pub struct Ownership {
    pub uid: u32,
    pub gid: u32,
    pub mode: u32,
}

impl Ownership {
    fn apply(self, dir: &OwnedFd) -> nix::Result<()> {
        fchown(dir, Some(Uid::from_raw(self.uid)), Some(Gid::from_raw(self.gid)))?;
        // Mode after owner: chown(2) clears set-id bits.
        fchmod(dir, Mode::from_bits_truncate(self.mode & PERMISSIONS))
    }
}

impl EmptyDirs {
    pub fn new(base: PathBuf) -> Self {
        Self { base, dirs: HashMap::new() }
    }

    /// Creates an emptyDir and writes its initial content, in one or several requests. Returns
    /// whether it is complete. Blocks.
    pub fn prepare(
        &mut self,
        scratch: &mut Scratch,
        request: &v1::PrepareEmptyDirRequest,
    ) -> Result<bool> {
        let id = &request.volume_id;
        crate::ids::check("volume_id", id)?;
        match self.dirs.get(id) {
            Some(dir) if dir.ready => return Ok(true),
            Some(_) if !request.begin => {}
            None if !request.begin => {
                return Err(Error::NotFound { what: "begun emptyDir", id: id.clone() });
            }
            _ => self.begin(scratch, request)?,
        }
        let path = self.base.join(id);
        for file in &request.files {
            write_file(&path, file, (file.uid, file.gid), false)?;
        }
        if request.done {
            let what = || format!("set the owner of emptyDir {id}");
            let root = open_readable(&path).context(what)?;
            let made = Ownership { uid: request.uid, gid: request.gid, mode: request.mode };
            made.apply(&root).context(what)?;
            if let Some(dir) = self.dirs.get_mut(id) {
                dir.ready = true;
            }
        }
        Ok(request.done)
    }

    /// Creates the emptyDir; replaces an incomplete one.
    fn begin(&mut self, scratch: &mut Scratch, request: &v1::PrepareEmptyDirRequest) -> Result<()> {
        let id = &request.volume_id;
        let path = self.base.join(id);
        let what = || format!("create emptyDir {id}");
        if let Some(old) = self.dirs.remove(id) {
            match umount2(&path, MntFlags::MNT_DETACH) {
                Ok(()) | Err(Errno::EINVAL) => {}
                Err(error) => return Err(error).context(what),
            }
            if let Some(dir) = &old.dir {
                scratch.discard(dir)?;
            }
        }
        if self.dirs.len() >= MAX {
            return Err(Error::Exhausted { what: "emptyDirs of a pod", limit: MAX as u64 });
        }
        DirBuilder::new().recursive(true).mode(0o700).create(&path).context(what)?;
        let dir = if request.memory {
            // Without a size limit tmpfs takes up to half of the guest's memory.
            let size = match request.size_limit {
                0 => String::new(),
                bytes => format!(",size={bytes}"),
            };
            let data = format!("mode=0700{size}");
            let no_flags = MsFlags::empty();
            mount(Some("emptydir"), &path, Some("tmpfs"), no_flags, Some(data.as_str()))
                .context(what)?;
            None
        } else {
            let limits = Limits { bytes: request.size_limit, inodes: 0 };
            let dir = scratch.make(Purpose::Volume, limits)?;
            let bind = MsFlags::MS_BIND;
            mount(Some(dir.path()), &path, None::<&str>, bind, None::<&str>).context(what)?;
            Some(dir)
        };
        self.dirs.insert(id.clone(), EmptyDir { dir, ready: false });
        mount(None::<&str>, &path, None::<&str>, MsFlags::MS_SHARED, None::<&str>).context(what)
    }

    /// The mount point of a complete emptyDir.
    pub fn ready(&self, id: &str) -> Result<PathBuf> {
        if !self.dirs.get(id).is_some_and(|dir| dir.ready) {
            return Err(Error::NotFound { what: "emptyDir", id: id.to_owned() });
        }
        Ok(self.base.join(id))
    }

    /// All emptyDirs, to be measured without the lock.
    pub fn list(&self) -> Vec<EmptyDirHandle> {
        let measured = |(id, dir): (&String, &EmptyDir)| EmptyDirHandle {
            id: id.clone(),
            dir: dir.dir.clone(),
            path: self.base.join(id),
        };
        self.dirs.iter().map(measured).collect()
    }
}

/// An emptyDir to measure.
#[derive(Debug)]
pub struct EmptyDirHandle {
    pub id: String,
    dir: Option<ScratchDir>,
    path: PathBuf,
}

impl EmptyDirHandle {
    /// May block: a container may have mounted a file system over it.
    pub fn usage(&self) -> v1::FsUsage {
        match &self.dir {
            Some(dir) => dir.usage(),
            None => file_system_usage(&self.path),
        }
    }
}

/// Returns an O_PATH descriptor of the emptyDir at `root`, or of `sub_path` in it; missing
/// directories are created. May block: a container may have mounted a file system in it.
pub fn open(root: &Path, sub_path: &str, made: Ownership) -> Result<OwnedFd> {
    let place = open_dir(root)?;
    if sub_path.is_empty() {
        return Ok(place);
    }
    let path = relative(sub_path)?;
    let what = || format!("open {sub_path:?} in emptyDir {}", root.display());
    match beneath(&place, path, OFlag::O_PATH) {
        Err(Errno::ENOENT) => make_dirs(&place, path, made).context(what),
        found => found.context(what),
    }
}

/// Opens a path below `root`. Symlinks are followed, but not out of the volume.
fn beneath(root: &OwnedFd, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root.as_fd(), path, how)
}

fn make_dirs(root: &OwnedFd, path: &Path, made: Ownership) -> nix::Result<OwnedFd> {
    let mut done = PathBuf::from(".");
    let mut at = beneath(root, &done, OFlag::O_PATH | OFlag::O_DIRECTORY)?;
    for part in path.components() {
        let name = part.as_os_str();
        done.push(name);
        at = match beneath(root, &done, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Err(Errno::ENOENT) => {
                mkdirat(&at, name, Mode::S_IRWXU)?;
                let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW;
                let dir = beneath(&at, Path::new(name), flags)?;
                made.apply(&dir)?;
                dir
            }
            found => found?,
        };
    }
    // Callers expect an O_PATH descriptor.
    beneath(&at, Path::new("."), OFlag::O_PATH)
}

fn open_readable(path: &Path) -> std::io::Result<OwnedFd> {
    fs::File::open(path).map(OwnedFd::from)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{MetadataExt, symlink};

    use super::*;

    /// An emptyDir without its mount; mounts are tested as root.
    fn ready(dir: &Path) -> EmptyDirs {
        fs::create_dir(dir.join("v")).unwrap();
        let mut dirs = EmptyDirs::new(dir.to_owned());
        dirs.dirs.insert("v".into(), EmptyDir { dir: None, ready: true });
        dirs
    }

    fn made() -> Ownership {
        let me = (nix::unistd::getuid().as_raw(), nix::unistd::getgid().as_raw());
        Ownership { uid: me.0, gid: me.1, mode: 0o2770 }
    }

    #[test]
    fn missing_directories_of_a_sub_path_are_created_with_the_given_owner_and_mode() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = ready(dir.path());
        fs::create_dir(dir.path().join("v/a")).unwrap();
        symlink("a", dir.path().join("v/link")).unwrap();
        let mode = |path: &str| fs::metadata(dir.path().join(path)).unwrap().mode() & 0o7777;
        let before = mode("v/a");
        open(&dirs.ready("v").unwrap(), "link/b/c", made()).unwrap();
        assert_eq!((mode("v/a"), mode("v/a/b"), mode("v/a/b/c")), (before, 0o2770, 0o2770));
        fs::write(dir.path().join("v/file"), "x").unwrap();
        open(&dirs.ready("v").unwrap(), "file", made()).unwrap();
        open(&dirs.ready("v").unwrap(), "", made()).unwrap();
    }

    #[test]
    fn no_sub_path_leaves_an_empty_dir() {
        let dir = tempfile::tempdir().unwrap();
        let dirs = ready(dir.path());
        symlink("..", dir.path().join("v/up")).unwrap();
        symlink(dir.path(), dir.path().join("v/absolute")).unwrap();
        symlink("nowhere", dir.path().join("v/dangling")).unwrap();
        for path in ["../v", "/", "up", "up/x", "absolute", "absolute/x", "dangling/x"] {
            assert!(open(&dirs.ready("v").unwrap(), path, made()).is_err(), "{path}");
        }
        assert!(!dir.path().join("x").exists());
        assert!(dirs.ready("w").is_err());
    }
}
