//! System calls that nix does not wrap, or wraps for the whole process instead of one thread.
#![allow(unsafe_code)] // raw system calls

use std::ffi::CStr;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;
use nix::fcntl::{OFlag, openat};
use nix::sys::stat::Mode;

use super::stat::{Stat, Time};

/// Mask of statx(2): the fields of stat(2), birth time, and mount id.
const STATX_MASK: u32 = libc::STATX_BASIC_STATS | libc::STATX_BTIME | libc::STATX_MNT_ID;

/// Opens one component of a path; symbolic links are not followed, whatever the flags.
pub(super) fn open_at(
    dir: BorrowedFd<'_>,
    name: &CStr,
    flags: i32,
    mode: u32,
) -> io::Result<OwnedFd> {
    let flags = OFlag::from_bits_retain(flags | libc::O_NOFOLLOW | libc::O_CLOEXEC);
    Ok(openat(dir, name, flags, Mode::from_bits_truncate(mode))?)
}

/// The attributes of `name` in `dir`; symbolic links are not followed, automounts not triggered.
pub(super) fn stat_at(dir: BorrowedFd<'_>, name: &CStr) -> io::Result<Stat> {
    statx(dir, name, libc::AT_SYMLINK_NOFOLLOW | libc::AT_NO_AUTOMOUNT)
}

/// The attributes of the file of `fd`.
pub(super) fn stat_of(fd: BorrowedFd<'_>) -> io::Result<Stat> {
    statx(fd, c"", libc::AT_EMPTY_PATH)
}

fn statx(dir: BorrowedFd<'_>, name: &CStr, flags: i32) -> io::Result<Stat> {
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: `name` is NUL-terminated and outlives the call; the kernel writes one record into
    // `found`, which has its size.
    let done = unsafe {
        libc::statx(dir.as_raw_fd(), name.as_ptr(), flags, STATX_MASK, found.as_mut_ptr())
    };
    Errno::result(done)?;
    // SAFETY: initialized with zeroes, then written by the kernel: integers only, every bit pattern is
    // valid.
    let found = unsafe { found.assume_init() };
    let time = |stamp: libc::statx_timestamp| Time { seconds: stamp.tv_sec, nanos: stamp.tv_nsec };
    Ok(Stat {
        dev: libc::makedev(found.stx_dev_major, found.stx_dev_minor),
        ino: found.stx_ino,
        mode: u32::from(found.stx_mode),
        nlink: found.stx_nlink,
        uid: found.stx_uid,
        gid: found.stx_gid,
        rdev: libc::makedev(found.stx_rdev_major, found.stx_rdev_minor),
        size: found.stx_size,
        blocks: found.stx_blocks,
        blksize: found.stx_blksize,
        atime: time(found.stx_atime),
        mtime: time(found.stx_mtime),
        ctime: time(found.stx_ctime),
        btime: (found.stx_mask & libc::STATX_BTIME != 0).then(|| time(found.stx_btime)),
        mount: found.stx_mnt_id,
    })
}

/// Reads directory entries (`struct linux_dirent64`); returns the number of bytes read.
pub(super) fn read_entries(dir: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the kernel writes at most `buffer.len()` bytes into `buffer`.
    let got = unsafe {
        libc::syscall(libc::SYS_getdents64, dir.as_raw_fd(), buffer.as_mut_ptr(), buffer.len())
    };
    Ok(Errno::result(got)? as usize)
}

/// Copies at most `length` bytes between two files at the given offsets; returns the number of
/// bytes.
pub(super) fn copy_range(
    (from, mut from_offset): (BorrowedFd<'_>, i64),
    (to, mut to_offset): (BorrowedFd<'_>, i64),
    length: usize,
) -> io::Result<usize> {
    let (from, to) = (from.as_raw_fd(), to.as_raw_fd());
    // SAFETY: the kernel reads and writes one integer through each of both pointers, which point to
    // local variables.
    let copied = unsafe {
        libc::copy_file_range(from, &raw mut from_offset, to, &raw mut to_offset, length, 0)
    };
    Ok(Errno::result(copied)? as usize)
}

/// xattr system calls take a path: `path` is relative to the working directory, which is the mount
/// of /proc/self/fd. With an empty `value` the size of the attribute is returned.
pub(super) fn get_xattr(path: &CStr, name: &CStr, value: &mut [u8]) -> io::Result<usize> {
    // SAFETY: both strings are NUL-terminated and outlive the call; the kernel writes at most
    // `value.len()` bytes into `value`.
    let got = unsafe {
        libc::getxattr(path.as_ptr(), name.as_ptr(), value.as_mut_ptr().cast(), value.len())
    };
    Ok(Errno::result(got)? as usize)
}

pub(super) fn list_xattrs(path: &CStr, names: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `path` is NUL-terminated and outlives the call; the kernel writes at most
    // `names.len()` bytes into `names`.
    let got = unsafe { libc::listxattr(path.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    Ok(Errno::result(got)? as usize)
}

pub(super) fn set_xattr(path: &CStr, name: &CStr, value: &[u8], flags: i32) -> io::Result<()> {
    // SAFETY: both strings are NUL-terminated, `value` is readable for its length; no memory is
    // written.
    let done = unsafe {
        libc::setxattr(path.as_ptr(), name.as_ptr(), value.as_ptr().cast(), value.len(), flags)
    };
    Ok(Errno::result(done).map(drop)?)
}

pub(super) fn remove_xattr(path: &CStr, name: &CStr) -> io::Result<()> {
    // SAFETY: both strings are NUL-terminated and outlive the call; no memory is written.
    let done = unsafe { libc::removexattr(path.as_ptr(), name.as_ptr()) };
    Ok(Errno::result(done).map(drop)?)
}

/// "Leave this id as it is" of setresuid(2) and setresgid(2).
const KEEP: libc::c_long = -1;

/// Sets the effective user id of the calling thread only; the C library's wrapper changes all
/// threads.
pub(super) fn set_effective_uid(uid: u32) -> io::Result<()> {
    // SAFETY: takes three integers and accesses no memory.
    let done = unsafe { libc::syscall(libc::SYS_setresuid, KEEP, uid, KEEP) };
    Ok(Errno::result(done).map(drop)?)
}

/// Sets the effective group id of the calling thread only.
pub(super) fn set_effective_gid(gid: u32) -> io::Result<()> {
    // SAFETY: takes three integers and accesses no memory.
    let done = unsafe { libc::syscall(libc::SYS_setresgid, KEEP, gid, KEEP) };
    Ok(Errno::result(done).map(drop)?)
}

/// Sets the supplementary groups of the calling thread only.
pub(super) fn set_groups(groups: &[u32]) -> io::Result<()> {
    // SAFETY: `groups` is readable for its length; no memory is written.
    let done = unsafe { libc::syscall(libc::SYS_setgroups, groups.len(), groups.as_ptr()) };
    Ok(Errno::result(done).map(drop)?)
}

/// fstatvfs(3) with the C library's structure, which the `virtiofsd` crate uses.
pub(super) fn statvfs(fd: BorrowedFd<'_>) -> io::Result<libc::statvfs64> {
    let mut found = MaybeUninit::<libc::statvfs64>::zeroed();
    // SAFETY: the C library writes one record into `found`, which has its size.
    let done = unsafe { libc::fstatvfs64(fd.as_raw_fd(), found.as_mut_ptr()) };
    Errno::result(done)?;
    // SAFETY: initialized with zeroes, then written by the kernel: integers only, every bit pattern is
    // valid.
    Ok(unsafe { found.assume_init() })
}
