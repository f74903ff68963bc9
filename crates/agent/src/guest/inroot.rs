//! Paths inside a container's root file system, resolved with openat2(2) and RESOLVE_IN_ROOT, so
//! that no symlink, `..` or magic link of an image leads out of it.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, OpenHow, ResolveFlag, open, openat2, readlinkat};
use nix::sys::stat::{FchmodatFlags, Mode, SFlag, fchmodat, makedev, mkdirat, mknodat};
use nix::unistd::{Gid, Uid, UnlinkatFlags, fchown, fchownat, unlinkat};
use oci_spec::runtime::{LinuxDevice, LinuxDeviceType};

use crate::error::{Context, Result};

/// Maximum symlinks followed by `make_target`; the kernel's limit is 40.
const MAX_LINKS: usize = 16;

fn how(flags: OFlag) -> OpenHow {
    OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS)
}

/// The path without `..`, resolved lexically, relative to the root.
fn plain(path: &Path) -> PathBuf {
    let mut out = PathBuf::from(".");
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            Component::ParentDir if out != Path::new(".") => {
                out.pop();
            }
            _ => {}
        }
    }
    out
}

/// A root directory in which paths are resolved.
#[derive(Debug)]
pub struct Root {
    dir: OwnedFd,
    /// uid and gid of created files.
    owner: (u32, u32),
}

impl Root {
    pub fn open(path: &Path) -> Result<Self> {
        let flags = OFlag::O_PATH | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        open(path, flags, Mode::empty())
            .map(|dir| Self { dir, owner: (0, 0) })
            .context(|| format!("open root {}", path.display()))
    }

    /// Sets uid and gid of files created from now on; default 0:0.
    pub fn owned_by(self, owner: (u32, u32)) -> Self {
        Self { owner, ..self }
    }

    pub fn owner(&self) -> (u32, u32) {
        self.owner
    }

    fn set_owner(&self, parent: &OwnedFd, name: &OsStr) -> nix::Result<()> {
        let (uid, gid) = self.owner;
        if self.owner == (0, 0) {
            return Ok(());
        }
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        fchownat(parent, name, Some(uid), Some(gid), AtFlags::AT_SYMLINK_NOFOLLOW)
    }

    fn openat(&self, path: &Path, flags: OFlag) -> nix::Result<OwnedFd> {
        openat2(self.dir.as_fd(), path, how(flags))
    }

    /// An O_PATH descriptor, for mounts.
    pub fn open_path(&self, path: &Path) -> Result<OwnedFd> {
        self.openat(path, OFlag::O_PATH)
            .context(|| format!("open {} in the root file system", path.display()))
    }

    /// Up to `limit` bytes of a regular file; None if there is none.
    pub fn read(&self, path: &Path, limit: u64) -> Option<String> {
        // O_NONBLOCK: the path may be a FIFO.
        let fd = self.openat(path, OFlag::O_RDONLY | OFlag::O_NONBLOCK).ok()?;
        let file = File::from(fd);
        if !file.metadata().ok()?.is_file() {
            return None;
        }
        let mut bytes = Vec::new();
        file.take(limit).read_to_end(&mut bytes).ok()?;
        Some(String::from_utf8_lossy(&bytes).into_owned())
    }

    /// Creates a directory and its parents; existing ones are not changed.
    pub fn make_dirs(&self, path: &Path) -> Result<()> {
        let mut done = PathBuf::from(".");
        for component in path.components() {
            let Component::Normal(name) = component else { continue };
            self.make_dir(&done, name)?;
            done.push(name);
        }
        Ok(())
    }

    /// Creates a mount point, a file or a directory. For a dangling symlink (`/etc/resolv.conf` of
    /// many images) its target is created, inside the root.
    pub fn make_target(&self, path: &Path, directory: bool) -> Result<()> {
        let what = || format!("create mount point {}", path.display());
        let mut path = plain(path);
        for _ in 0..MAX_LINKS {
            match self.openat(&path, OFlag::O_PATH) {
                Ok(_) => return Ok(()),
                Err(Errno::ENOENT) => {}
                Err(error) => return Err(error).context(what),
            }
            let parent = path.parent().unwrap_or(Path::new(".")).to_owned();
            match self.openat(&path, OFlag::O_PATH | OFlag::O_NOFOLLOW) {
                Ok(link) => {
                    let target = readlinkat(&link, "").context(what)?;
                    path = plain(&parent.join(target));
                }
                Err(Errno::ENOENT) if directory => return self.make_dirs(&path),
                Err(Errno::ENOENT) => {
                    self.make_dirs(&parent)?;
                    let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL;
                    let how = how(flags).mode(Mode::from_bits_truncate(0o644));
                    let file = openat2(self.dir.as_fd(), &path, how).context(what)?;
                    let (uid, gid) = self.owner;
                    let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
                    return fchown(&file, Some(uid), Some(gid)).context(what);
                }
                Err(error) => return Err(error).context(what),
            }
        }
        Err(Errno::ELOOP).context(what)
    }

    fn make_dir(&self, parent: &Path, name: &OsStr) -> Result<()> {
        let what = || format!("create directory {} in the root file system", name.display());
        let path = parent.join(name);
        match self.openat(&path, OFlag::O_PATH | OFlag::O_DIRECTORY) {
            Ok(_) => return Ok(()),
            Err(Errno::ENOENT) => {}
            Err(error) => return Err(error).context(what),
        }
        let parent = self.openat(parent, OFlag::O_PATH | OFlag::O_DIRECTORY).context(what)?;
        match mkdirat(&parent, name, Mode::from_bits_truncate(0o755)) {
            Ok(()) => self.set_owner(&parent, name).context(what),
            // A dangling symlink: left to the process, which fails if it needs the directory.
            Err(Errno::EEXIST) => Ok(()),
            Err(error) => Err(error).context(what),
        }
    }

    /// Creates a device node; replaces a file of the image.
    pub fn make_node(&self, node: &LinuxDevice) -> Result<()> {
        let what = || format!("create device node {}", node.path().display());
        let path = plain(node.path());
        let parent = path.parent().unwrap_or(Path::new("."));
        let name = path.file_name().unwrap_or_default();
        self.make_dirs(parent)?;
        let parent = self.openat(parent, OFlag::O_PATH | OFlag::O_DIRECTORY).context(what)?;
        match unlinkat(&parent, name, UnlinkatFlags::NoRemoveDir) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(error) => return Err(error).context(what),
        }
        let kind = match node.typ() {
            LinuxDeviceType::B => SFlag::S_IFBLK,
            _ => SFlag::S_IFCHR,
        };
        let number = makedev(node.major().unsigned_abs(), node.minor().unsigned_abs());
        let mode = Mode::from_bits_truncate(node.file_mode().unwrap_or(0o600));
        mknodat(&parent, name, kind, mode, number).context(what)?;
        let (uid, gid) = (node.uid().map(Uid::from_raw), node.gid().map(Gid::from_raw));
        fchownat(&parent, name, uid, gid, AtFlags::AT_SYMLINK_NOFOLLOW).context(what)?;
        // mknod applied the umask.
        fchmodat(&parent, name, mode, FchmodatFlags::FollowSymlink).context(what)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn symlinks_of_an_image_do_not_leave_its_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(dir.path().join("secret"), "host").unwrap();
        symlink("../../secret", root.join("etc/passwd")).unwrap();
        symlink(dir.path().join("secret"), root.join("etc/group")).unwrap();
        symlink("/real", root.join("var")).unwrap();
        std::fs::create_dir(root.join("real")).unwrap();
        let opened = Root::open(&root).unwrap();
        assert_eq!(opened.read(Path::new("/etc/passwd"), 100), None);
        assert_eq!(opened.read(Path::new("/etc/group"), 100), None);
        opened.make_dirs(Path::new("/var/lib/../data")).unwrap();
        assert!(root.join("real/lib").is_dir());
        assert!(root.join("real/lib/data").is_dir() || root.join("real/data").is_dir());
    }

    #[test]
    fn a_mount_point_behind_a_dangling_symlink_is_created_inside_the_root() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        symlink("../run/resolve/stub.conf", root.join("etc/resolv.conf")).unwrap();
        symlink("/../../../outside", root.join("etc/hosts")).unwrap();
        symlink("loop", root.join("etc/loop")).unwrap();
        let opened = Root::open(&root).unwrap();
        opened.make_target(Path::new("/etc/resolv.conf"), false).unwrap();
        assert!(root.join("run/resolve/stub.conf").is_file());
        opened.make_target(Path::new("/etc/hosts"), false).unwrap();
        assert!(root.join("outside").is_file() && !dir.path().join("outside").exists());
        opened.make_target(Path::new("/data/x"), true).unwrap();
        opened.make_target(Path::new("/data/x"), true).unwrap();
        assert!(root.join("data/x").is_dir());
        assert!(opened.make_target(Path::new("/etc/loop"), false).is_err());
    }

    #[test]
    fn a_large_file_is_read_up_to_the_limit_only() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("big"), vec![b'x'; 1000]).unwrap();
        let root = Root::open(dir.path()).unwrap();
        assert_eq!(root.read(Path::new("big"), 10).unwrap().len(), 10);
    }
}
