//! Project quotas of ext4: a folder, with all that is made in it, counts as a project of its own and
//! may have limits (fs/quota, Documentation/filesystems/quota.rst; `struct fsxattr` of
//! uapi/linux/fs.h, quotactl_fd(2) since Linux 5.14).
//!
//! Processes with CAP_SYS_RESOURCE are not held to limits, but overlayfs writes without it.
#![allow(unsafe_code)] // neither the ioctls nor quotactl_fd have safe wrappers

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

/// What is made in the folder belongs to its project.
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

/// Of a project; 0: no limit.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    pub bytes: u64,
    pub inodes: u64,
}

/// What a project uses and may use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    pub bytes: u64,
    pub inodes: u64,
    pub limits: Limits,
}

/// Makes an empty folder a project's.
pub fn join(folder: BorrowedFd<'_>, project: u32) -> io::Result<()> {
    let mut attributes = FsXattr::default();
    // SAFETY: the kernel writes one `struct fsxattr`, whose size the assertion above holds, to a
    // value that lives until the call returns.
    unsafe { ioctl::get(folder.as_raw_fd(), &raw mut attributes) }?;
    attributes.projid = project;
    attributes.xflags |= FS_XFLAG_PROJINHERIT;
    // SAFETY: the kernel reads one `struct fsxattr` from a value that lives until the call returns.
    unsafe { ioctl::set(folder.as_raw_fd(), &raw const attributes) }?;
    Ok(())
}

/// `file` is anything on the file system.
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
    // SAFETY: both commands take a `struct if_dqblk` (its size is asserted above), which the kernel
    // reads or writes; the exclusive reference it comes from outlives the call. The descriptor is
    // borrowed for as long.
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
