//! System calls that nix does not wrap: mounts as file descriptors (open_tree(2), move_mount(2),
//! mount_setattr(2)), capabilities (capset(2)), pidfd_open(2).
#![allow(unsafe_code)] // raw system calls

use std::ffi::CStr;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::Path;

use nix::errno::Errno;
use nix::fcntl::{AT_FDCWD, OFlag, OpenHow, ResolveFlag, openat2};

/// A detached copy of the mount at `path` without mounts below it; its root is `path`, and `..`
/// does not lead out of it.
pub(crate) fn clone_mount(path: &CStr) -> nix::Result<OwnedFd> {
    let flags = libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC;
    // SAFETY: `path` is NUL-terminated and outlives the call, which writes no memory.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just created this file descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Like [`clone_mount`], with root `place`.
pub(crate) fn copy_mount(place: BorrowedFd<'_>) -> nix::Result<OwnedFd> {
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_EMPTY_PATH as libc::c_uint;
    // SAFETY: the path is NUL-terminated and static; no memory is written.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, place.as_raw_fd(), c"".as_ptr(), flags) };
    let fd = Errno::result(fd)?;
    // SAFETY: the kernel has just created this file descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Makes a mount private (no propagation), nosuid, nodev and noexec.
pub(crate) fn make_private(tree: BorrowedFd<'_>) -> nix::Result<()> {
    let set = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    set_attributes(tree, set, 0, libc::MS_PRIVATE, 0)
}

/// Makes the mount with this root read-only or writable. Fails with EBUSY while files in it are
/// open for writing.
pub(crate) fn protect(root: BorrowedFd<'_>, read_only: bool) -> nix::Result<()> {
    let (set, clear) =
        if read_only { (libc::MOUNT_ATTR_RDONLY, 0) } else { (0, libc::MOUNT_ATTR_RDONLY) };
    set_attributes(root, set, clear, 0, 0)
}

/// Makes the mount and all mounts below it read-only.
pub(crate) fn protect_all(root: BorrowedFd<'_>) -> nix::Result<()> {
    set_attributes(root, libc::MOUNT_ATTR_RDONLY, 0, 0, libc::AT_RECURSIVE)
}

fn set_attributes(
    root: BorrowedFd<'_>,
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    at_flags: libc::c_int,
) -> nix::Result<()> {
    let attributes = libc::mount_attr { attr_set, attr_clr, propagation, userns_fd: 0 };
    // SAFETY: the path is NUL-terminated and static, `attributes` is readable for the given length;
    // no memory is written.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            root.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | at_flags,
            std::ptr::from_ref(&attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    Errno::result(done).map(drop)
}

/// Mounts the detached `tree` on `place`.
pub(crate) fn attach_at(tree: BorrowedFd<'_>, place: BorrowedFd<'_>) -> nix::Result<()> {
    let flags = libc::MOVE_MOUNT_F_EMPTY_PATH | libc::MOVE_MOUNT_T_EMPTY_PATH;
    // SAFETY: both paths are NUL-terminated and static; no memory is written.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            place.as_raw_fd(),
            c"".as_ptr(),
            flags,
        )
    };
    Errno::result(done).map(drop)
}

/// Opens `path` (O_PATH) below the working directory, across mounts but without symbolic links.
pub(crate) fn open_beneath(path: &Path) -> nix::Result<OwnedFd> {
    let resolve = ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS;
    let how = OpenHow::new().flags(OFlag::O_PATH | OFlag::O_CLOEXEC).resolve(resolve);
    openat2(AT_FDCWD, path, how)
}

/// The id of the mount of `place`, as in /proc/self/mountinfo.
pub(crate) fn mount_id(place: BorrowedFd<'_>) -> nix::Result<u64> {
    let flags = libc::AT_EMPTY_PATH | libc::AT_STATX_DONT_SYNC;
    let mut found = MaybeUninit::<libc::statx>::zeroed();
    // SAFETY: the path is NUL-terminated and static; the kernel writes one record into `found`.
    let done = unsafe {
        let mask = libc::STATX_MNT_ID;
        libc::statx(place.as_raw_fd(), c"".as_ptr(), flags, mask, found.as_mut_ptr())
    };
    Errno::result(done)?;
    // SAFETY: initialized with zeroes, then written by the kernel: integers only, for which every
    // bit pattern is valid.
    let found = unsafe { found.assume_init() };
    match found.stx_mask & libc::STATX_MNT_ID {
        0 => Err(Errno::ENOSYS),
        _ => Ok(found.stx_mnt_id),
    }
}

/// Mounts the detached `tree` at `target`; a symbolic link as its last component is not followed.
pub(crate) fn attach_mount(tree: BorrowedFd<'_>, target: &CStr) -> nix::Result<()> {
    // SAFETY: both strings are NUL-terminated and outlive the call, which writes no memory.
    let done = unsafe {
        libc::syscall(
            libc::SYS_move_mount,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_FDCWD,
            target.as_ptr(),
            libc::MOVE_MOUNT_F_EMPTY_PATH,
        )
    };
    Errno::result(done).map(drop)
}

/// `struct __user_cap_header_struct`, version 3, for the calling thread.
const HEADER: [u32; 2] = [0x2008_0522, 0];

/// Sets the calling thread's effective and permitted capabilities to the bit mask `caps`.
pub(crate) fn set_capabilities(caps: u64) -> nix::Result<()> {
    set_effective_capabilities(caps, caps)
}

/// Sets the calling thread's effective and permitted capabilities.
pub(crate) fn set_effective_capabilities(effective: u64, permitted: u64) -> nix::Result<()> {
    let [low, high] =
        [0, 32].map(|shift| [(effective >> shift) as u32, (permitted >> shift) as u32]);
    let data = [[low[0], low[1], 0], [high[0], high[1], 0]];
    // SAFETY: version 3 reads a header of two words and two records of three words.
    let done = unsafe { libc::syscall(libc::SYS_capset, HEADER.as_ptr(), data.as_ptr()) };
    Errno::result(done).map(drop)
}

/// Drops all capabilities that are not in `caps` from the bounding set, and clears the ambient set.
pub(crate) fn limit_bounding_set(caps: u64) -> nix::Result<()> {
    for cap in (0..64u32).filter(|cap| caps & 1 << cap == 0) {
        // SAFETY: PR_CAPBSET_DROP takes a number and accesses no memory.
        match Errno::result(unsafe { libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0) }) {
            Ok(_) => {}
            // Above the kernel's last capability.
            Err(Errno::EINVAL) if cap > 0 => break,
            Err(e) => return Err(e),
        }
    }
    let clear = libc::PR_CAP_AMBIENT_CLEAR_ALL;
    // SAFETY: takes numbers only.
    Errno::result(unsafe { libc::prctl(libc::PR_CAP_AMBIENT, clear, 0, 0, 0) }).map(drop)
}

/// A pidfd, which becomes readable when the process exits.
pub fn pidfd_open(pid: nix::unistd::Pid) -> nix::Result<OwnedFd> {
    // SAFETY: pidfd_open takes two integers and accesses no memory.
    let fd = Errno::result(unsafe { libc::syscall(libc::SYS_pidfd_open, pid.as_raw(), 0) })?;
    // SAFETY: the kernel has just created this file descriptor; nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes ownership of an inherited file descriptor and sets close-on-exec.
pub fn adopt(fd: i32) -> nix::Result<OwnedFd> {
    // SAFETY: F_GETFD accesses no memory; it fails for a number that is not a file descriptor.
    Errno::result(unsafe { libc::fcntl(fd, libc::F_GETFD) })?;
    // SAFETY: it is open and was inherited from the parent process; nothing else owns it: `main`
    // calls this once for each number, before anything else.
    let owned = unsafe { OwnedFd::from_raw_fd(fd) };
    let cloexec = nix::fcntl::FcntlArg::F_SETFD(nix::fcntl::FdFlag::FD_CLOEXEC);
    nix::fcntl::fcntl(&owned, cloexec)?;
    Ok(owned)
}

/// fork(2); the process must be single-threaded.
pub fn fork() -> nix::Result<nix::unistd::ForkResult> {
    // SAFETY: the process has one thread (`main` has started none), so no lock can be held by a
    // thread that does not exist in the child.
    unsafe { nix::unistd::fork() }
}
