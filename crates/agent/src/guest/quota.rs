//! Project quotas of ext4: a directory tree with a project id of its own, with usage and limits
//! (fs/quota, Documentation/filesystems/quota.rst; `struct fsxattr` of uapi/linux/fs.h;
//! quotactl_fd(2), Linux 5.14).
//!
//! Processes with CAP_SYS_RESOURCE are exempt from limits, but overlayfs writes without that
//! capability.
#![allow(unsafe_code)] // neither the ioctls nor quotactl_fd have safe wrappers

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// Files created in the directory inherit its project id.
const FS_XFLAG_PROJINHERIT: u32 = 0x200;
/// uapi/linux/quota.h
const Q_GETQUOTA: u32 = 0x80_0007;
const Q_SETQUOTA: u32 = 0x80_0008;
const PRJQUOTA: u32 = 2;
const QIF_LIMITS: u32 = 0b101;
/// Unit of `dqb_bhardlimit`, bytes.
const QUOTA_BLOCK: u64 = 1024;

/// `struct fsxattr`.
#[repr(C)]
#[derive(Debug, Default)]
struct FsXattr {
    xflags: u32,
    extsize: u32,
    nextents: u32,
    projid: u32,
    cowextsize: u32,
    pad: [u8; 8],
}
const _: () = assert!(size_of::<FsXattr>() == 28);

/// `struct if_dqblk`.
#[repr(C)]
#[derive(Debug, Default)]
struct Block {
    hard_blocks: u64,
    soft_blocks: u64,
    space: u64,
    hard_inodes: u64,
    soft_inodes: u64,
    inodes: u64,
    block_time: u64,
    inode_time: u64,
    valid: u32,
}
const _: () = assert!(size_of::<Block>() == 72);

mod ioctl {
    nix::ioctl_read!(get, b'X', 31, super::FsXattr);
    nix::ioctl_write_ptr!(set, b'X', 32, super::FsXattr);
}

/// Limits of a project; 0 means no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub bytes: u64,
    pub inodes: u64,
}

/// Usage and limits of a project.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
    pub limits: Limits,
}

/// Sets the project id of an empty directory.
pub fn join(dir: BorrowedFd<'_>, project: u32) -> io::Result<()> {
    let mut attributes = FsXattr::default();
    // SAFETY: the kernel writes one `struct fsxattr`, whose size is asserted above, to a value that
    // lives until the call returns.
    unsafe { ioctl::get(dir.as_raw_fd(), &raw mut attributes) }?;
    attributes.projid = project;
    attributes.xflags |= FS_XFLAG_PROJINHERIT;
    // SAFETY: the kernel reads one `struct fsxattr` from a value that lives until the call returns.
    unsafe { ioctl::set(dir.as_raw_fd(), &raw const attributes) }?;
    Ok(())
}

/// Sets the limits of a project. `file` is any file of the file system.
pub fn limit(file: impl AsFd, project: u32, limits: Limits) -> io::Result<()> {
    let mut block = Block {
        hard_blocks: limits.bytes.div_ceil(QUOTA_BLOCK),
        hard_inodes: limits.inodes,
        valid: QIF_LIMITS,
        ..Block::default()
    };
    quotactl(file.as_fd(), Q_SETQUOTA, project, &mut block)
}

pub fn usage(file: impl AsFd, project: u32) -> io::Result<Usage> {
    let mut block = Block::default();
    quotactl(file.as_fd(), Q_GETQUOTA, project, &mut block)?;
    let limits =
        Limits { bytes: block.hard_blocks.saturating_mul(QUOTA_BLOCK), inodes: block.hard_inodes };
    Ok(Usage { bytes: block.space, inodes: block.inodes, limits })
}

fn quotactl(file: BorrowedFd<'_>, command: u32, project: u32, block: &mut Block) -> io::Result<()> {
    let command = command << 8 | PRJQUOTA;
    let block: *mut Block = block;
    // SAFETY: both commands take a `struct if_dqblk` (size asserted above), which the kernel reads
    // or writes; the exclusive reference outlives the call, as does the borrowed descriptor.
    let done = unsafe {
        libc::syscall(
            libc::SYS_quotactl_fd,
            libc::c_long::from(file.as_raw_fd()),
            libc::c_long::from(command),
            libc::c_long::from(project),
            block,
        )
    };
    if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}
