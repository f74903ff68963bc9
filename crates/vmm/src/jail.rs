//! The privileges that the VMM drops before it starts the guest: an empty root, an unprivileged
//! user, no capabilities, no core dumps, limited file descriptors.
//!
//! The launcher creates the namespaces (pid, ipc, uts, net, mount; see [`empty_root`]). System
//! calls are limited per thread: [`crate::seccomp`].
#![allow(unsafe_code)] // prctl and capget are not wrapped for capabilities

use std::fs;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::{Gid, Uid, chdir, geteuid, pivot_root, setgroups, setresgid, setresuid};
use vmm_api::JailConfig;

/// Most file descriptors: 64 vCPUs; up to 248 devices, of which a disk has 7 (the file, an io_uring
/// with its eventfd, a doorbell twice, two vectors), so about 1,750; and up to 1,024 vsock
/// connections.
/// Attack: a guest or a client makes the VMM open more and more of them.
const OPEN_FILES: u64 = 4096;
/// Stack size of threads, bytes; see [`reduce_memory_use`].
const STACK: &str = "262144";
/// Temporary mount point of the empty root: a directory that every system has.
const STAGE: &str = "/proc";

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("jail: cannot {step}")]
    Step { step: &'static str, source: Errno },
    #[error(
        "jail: cannot change to uid {uid} as uid {euid}; start the VMM as root or as uid {uid}"
    )]
    NotRoot { uid: u32, euid: u32 },
    #[error("jail: uid and gid must not be 0")]
    Root,
    #[error("jail: capabilities {left:#x} were not dropped")]
    Capabilities { left: u64 },
}

fn step(step: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |source| JailError::Step { step, source }
}

/// Drops all privileges. The process must be single-threaded: some of them are per thread.
pub fn enter(config: &JailConfig) -> Result<(), JailError> {
    let (uid, euid) = (config.uid, geteuid().as_raw());
    if uid == 0 || config.gid == 0 {
        return Err(JailError::Root);
    }
    if euid == 0 {
        empty_root()?;
        drop_bounding_set()?;
        setgroups(&[]).map_err(step("drop supplementary groups"))?;
        let gid = Gid::from_raw(config.gid);
        setresgid(gid, gid, gid).map_err(step("change the group"))?;
        let uid = Uid::from_raw(uid);
        setresuid(uid, uid, uid).map_err(step("change the user"))?;
    } else if euid != uid {
        return Err(JailError::NotRoot { uid, euid });
    }
    match capabilities() {
        Ok(0) => Ok(()),
        Ok(left) => Err(JailError::Capabilities { left }),
        Err(e) => Err(step("read capabilities")(e)),
    }
}

/// Limits that apply with and without a jail: no_new_privs, no core dumps (they would have tenant
/// data), RLIMIT_NOFILE. RLIMIT_FSIZE is unchanged, as disks may be of any size.
pub fn limits() -> Result<(), JailError> {
    nix::sys::prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;
    nix::sys::prctl::set_dumpable(false).map_err(step("clear the dumpable flag"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;
    let (_, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the limit of open files"))?;
    let files = hard.min(OPEN_FILES);
    setrlimit(Resource::RLIMIT_NOFILE, files, files).map_err(step("limit open files"))
}

/// Changes the root to an empty, read-only tmpfs and detaches the old root.
fn empty_root() -> Result<(), JailError> {
    // The launcher creates a mount namespace. Without it (started from a shell) one is created
    // here: the host's root must not be changed.
    let mine = fs::read_link("/proc/self/ns/mnt");
    let host = fs::read_link("/proc/1/ns/mnt");
    if mine.is_err() || mine.ok() == host.ok() {
        unshare(CloneFlags::CLONE_NEWNS).map_err(step("create a mount namespace"))?;
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(step("make mounts private"))?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
    mount(Some("none"), STAGE, Some("tmpfs"), flags, Some("size=4k,nr_inodes=2,mode=0555"))
        .map_err(step("mount an empty root"))?;
    chdir(STAGE).map_err(step("enter the empty root"))?;
    // Mounts the old root on top of the new one; it is detached next (pivot_root(2), NOTES).
    pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("detach the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    mount(none, "/", none, flags | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY, none)
        .map_err(step("make the root read-only"))
}

/// Without a bounding set, a set-user-id program cannot regain capabilities.
fn drop_bounding_set() -> Result<(), JailError> {
    for cap in 0..64 {
        // SAFETY: PR_CAPBSET_DROP takes a number and accesses no memory.
        let done = unsafe { libc::prctl(libc::PR_CAPBSET_DROP, cap, 0, 0, 0) };
        match Errno::result(done) {
            Ok(_) => {}
            // Above the kernel's last capability.
            Err(Errno::EINVAL) if cap > 0 => break,
            Err(e) => return Err(step("drop the capability bounding set")(e)),
        }
    }
    // SAFETY: as above; clears the ambient set.
    let done =
        unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    Errno::result(done).map(drop).map_err(step("clear ambient capabilities"))
}

/// The union of effective and permitted capabilities.
fn capabilities() -> Result<u64, Errno> {
    /// `struct __user_cap_header_struct` and `_data_struct`, version 3 (capget(2)).
    const VERSION_3: u32 = 0x2008_0522;
    let header = [VERSION_3, 0u32];
    let mut data = [[0u32; 3]; 2];
    // SAFETY: version 3 reads a header of two words and writes two records of three words.
    let done = unsafe { libc::syscall(libc::SYS_capget, header.as_ptr(), data.as_mut_ptr()) };
    Errno::result(done)?;
    let [low, high] = data;
    Ok(u64::from(high[0] | high[1]) << 32 | u64::from(low[0] | low[1]))
}

/// Reduces the memory use of the process; to be called first in `main`.
///
/// - One allocator arena: per-thread arenas would use more memory than their contents.
/// - Stacks of 256 KiB for threads of libraries: with transparent huge pages, the first touch of a
///   default stack of 2 MiB allocates all of it.
#[allow(clippy::disallowed_methods)] // the environment: no other thread can be reading it yet
pub fn reduce_memory_use() {
    // SAFETY: mallopt changes allocator parameters; no other thread exists yet.
    unsafe { libc::mallopt(libc::M_ARENA_MAX, 1) };
    // SAFETY: no other thread exists yet that could read the environment.
    unsafe { std::env::set_var("RUST_MIN_STACK", STACK) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uid_0_is_refused() {
        let refused = enter(&JailConfig { uid: 0, gid: 1000 });
        assert!(matches!(refused, Err(JailError::Root)));
    }

    #[test]
    fn only_root_has_capabilities() {
        assert_eq!(capabilities().unwrap() != 0, geteuid().is_root());
    }
}
