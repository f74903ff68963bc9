//! Mount trees as descriptors: cloned, changed, then attached (open_tree(2), mount_setattr(2),
//! move_mount(2)), without a path that a container could change in between.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;

use libcontainer::syscall::SyscallError;
use libcontainer::syscall::linux::{
    AT_EMPTY_PATH, AT_RECURSIVE, MOUNT_ATTR_RDONLY, MOVE_MOUNT_F_EMPTY_PATH,
    MOVE_MOUNT_T_EMPTY_PATH, MountAttr,
};
use libcontainer::syscall::syscall::create_syscall;
use nix::fcntl::{OFlag, open};
use nix::mount::MsFlags;
use nix::sys::stat::Mode;

/// uapi/linux/mount.h
const MOUNT_ATTR_IDMAP: u64 = 0x0010_0000;
const OPEN_TREE_CLONE: u32 = 1;
const OPEN_TREE_CLOEXEC: u32 = libc::O_CLOEXEC as u32;

/// A cloned, detached mount tree; dropping it unmounts it.
#[derive(Debug)]
pub struct Tree(OwnedFd);

/// Scope of a change.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Top,
    All,
}

fn io_error(error: SyscallError) -> io::Error {
    match error {
        SyscallError::Nix(errno) => errno.into(),
        SyscallError::IO(error) => error,
        other => io::Error::other(other.to_string()),
    }
}

impl Tree {
    /// Clones the mount at `place` with all mounts below it.
    pub fn copy(place: BorrowedFd<'_>) -> io::Result<Self> {
        let flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | AT_EMPTY_PATH | AT_RECURSIVE;
        create_syscall().open_tree(place.as_raw_fd(), None, flags).map(Self).map_err(io_error)
    }

    fn set(&self, reach: Scope, attributes: &MountAttr) -> io::Result<()> {
        let flags = match reach {
            Scope::Top => AT_EMPTY_PATH,
            Scope::All => AT_EMPTY_PATH | AT_RECURSIVE,
        };
        let size = size_of::<MountAttr>();
        create_syscall()
            .mount_setattr(self.0.as_fd(), Path::new(""), flags, attributes, size)
            .map_err(io_error)
    }

    pub fn read_only(&self, reach: Scope) -> io::Result<()> {
        self.set(reach, &MountAttr { attr_set: MOUNT_ATTR_RDONLY, ..attributes() })
    }

    /// Makes the top mount writable.
    pub fn writable(&self) -> io::Result<()> {
        self.set(Scope::Top, &MountAttr { attr_clr: MOUNT_ATTR_RDONLY, ..attributes() })
    }

    /// Sets MS_PRIVATE, MS_SLAVE or MS_SHARED on all mounts of the tree.
    pub fn propagation(&self, kind: MsFlags) -> io::Result<()> {
        self.set(Scope::All, &MountAttr { propagation: kind.bits(), ..attributes() })
    }

    /// Makes the top mount id-mapped with the user namespace.
    pub fn map_ids(&self, userns: BorrowedFd<'_>) -> io::Result<()> {
        let userns_fd = u64::from(userns.as_raw_fd().unsigned_abs());
        self.set(Scope::Top, &MountAttr { attr_set: MOUNT_ATTR_IDMAP, userns_fd, ..attributes() })
    }

    pub fn attach(&self, target: &Path) -> io::Result<()> {
        self.attach_at(open(target, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?.as_fd())
    }

    pub fn attach_at(&self, target: BorrowedFd<'_>) -> io::Result<()> {
        let flags = MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH;
        create_syscall().move_mount(self.0.as_fd(), None, target, None, flags).map_err(io_error)
    }
}

fn attributes() -> MountAttr {
    MountAttr { attr_set: 0, attr_clr: 0, propagation: 0, userns_fd: 0 }
}
