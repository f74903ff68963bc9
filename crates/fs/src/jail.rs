//! The privileges that both processes drop: access to the host's files, then capabilities.
//!
//! The launcher creates the namespaces (pid, mount, ipc, uts, net). Both processes stay root in the
//! host's user namespace: shared files are owned by users of the host, and the guest's processes
//! act as any of them. All other privileges of root are dropped as capabilities.

use std::fs;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::unistd::{chdir, mkdir, pivot_root};

use crate::table::Table;
use crate::{SHARES, SOURCES, sys};

/// Temporary mount point of the new root: a directory that every system has.
const STAGE: &str = "/proc";
/// Most file descriptors of the server. There is one for each file that the guest has open, or has
/// removed and still uses. In practice guest memory is the limit, and they are charged to the pod's
/// cgroup. Attack: a guest opens one file after the other and closes none.
const OPEN_FILES: rlim_t = 1_000_000;
/// Capabilities of the server (capabilities(7)), and what would fail without each.
pub const SERVER: [(u32, &str); 8] = [
    (0, "CHOWN: chown in the guest, and the owner of new files"),
    (1, "DAC_OVERRIDE: the guest's root reads and writes as root does; its kernel checks others"),
    (3, "FOWNER: chmod, utimes and xattrs of files of other users by the guest's root"),
    (4, "FSETID: setgid bits survive a change by the guest's root"),
    (6, "SETGID: a file is created with the group of the guest's process"),
    (7, "SETUID: a file is created as the user of the guest's process"),
    (27, "MKNOD: fifos and sockets need none, whiteouts and device nodes do, as with runc"),
    (31, "SETFCAP: programs with file capabilities are installed by package managers"),
];
/// Capabilities of the mounter, and what would fail without each.
pub const MOUNTER: [(u32, &str); 2] = [
    (2, "DAC_READ_SEARCH: lookup of the host's mounts below a share, in directories of any user"),
    (21, "SYS_ADMIN: mounts, in a namespace of its own"),
];

#[derive(Debug, thiserror::Error)]
pub enum JailError {
    #[error("jail: cannot {step}")]
    Step { step: &'static str, source: Errno },
}

pub(crate) fn step(step: &'static str) -> impl FnOnce(Errno) -> JailError {
    move |source| JailError::Step { step, source }
}

/// Writable mounts of the directories of shares and of sources, for the mounter: the server's
/// mounts of them are read-only, so that a guest cannot fill the host's memory with files outside
/// its shares. And two open mount tables: POLLPRI reports changes since the last read of that file,
/// and there are two readers.
#[derive(Debug)]
pub struct Entries {
    pub(crate) shares: OwnedFd,
    pub(crate) sources: OwnedFd,
    pub(crate) table: Table,
    pub(crate) mounted: Table,
}

/// Changes the root to an empty tmpfs with empty directories for shares and sources and a /proc of
/// this pid namespace, and detaches the old root.
pub fn empty_root() -> Result<Entries, JailError> {
    // The launcher creates a mount namespace. Without it (started from a shell) one is created
    // here: the host's root must not be changed.
    let own = fs::read_link("/proc/self/ns/mnt");
    let host = fs::read_link("/proc/1/ns/mnt");
    if own.is_err() || host.is_err() || own.ok() == host.ok() {
        unshare(CloneFlags::CLONE_NEWNS).map_err(step("create a mount namespace"))?;
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(step("make mounts private"))?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
    let tmpfs = |target: &str, options: &str| {
        mount(Some("none"), target, Some("tmpfs"), flags, Some(options))
    };
    tmpfs(STAGE, "size=4k,nr_inodes=8,mode=0555").map_err(step("mount an empty root"))?;
    chdir(STAGE).map_err(step("change to the empty root"))?;
    // Mounts the old root on top of the new one; it is detached next (pivot_root(2), NOTES).
    pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("unmount the old root"))?;
    chdir("/").map_err(step("change to the new root"))?;
    for folder in [SHARES, SOURCES, "/proc"] {
        mkdir(folder, nix::sys::stat::Mode::from_bits_truncate(0o755))
            .map_err(step("create a directory"))?;
    }
    for folder in [SHARES, SOURCES] {
        tmpfs(folder, "size=64k,nr_inodes=1k,mode=0755").map_err(step("mount the shares"))?;
    }
    mount(Some("none"), "/proc", Some("proc"), flags, none).map_err(step("mount /proc"))?;
    let shares = sys::clone_mount(c"/shares").map_err(step("open the directory of shares"))?;
    let sources = sys::clone_mount(c"/sources").map_err(step("open the directory of sources"))?;
    let table = || {
        Table::open().map_err(|e| {
            let errno = e.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
            step("open the mount table")(errno)
        })
    };
    let (table, mounted) = (table()?, table()?);
    let fixed = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    for folder in [SHARES, SOURCES, "/"] {
        mount(none, folder, none, fixed, none).map_err(step("make a directory read-only"))?;
    }
    Ok(Entries { shares, sources, table, mounted })
}

/// A mount of /proc/self/fd only, with which the server reopens files that it has as O_PATH file
/// descriptors. /proc itself is unmounted.
pub(crate) fn own_descriptors() -> Result<OwnedFd, JailError> {
    let fds = sys::clone_mount(c"/proc/self/fd").map_err(step("open /proc/self/fd"))?;
    umount2("/proc", MntFlags::MNT_DETACH).map_err(step("unmount /proc"))?;
    Ok(fds)
}

/// Raises RLIMIT_NOFILE to [`OPEN_FILES`], as far as permitted.
pub fn open_files() -> Result<(), JailError> {
    let (_, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the limit of open files"))?;
    let most = fs::read_to_string("/proc/sys/fs/nr_open");
    let most = most.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(hard);
    let limit = OPEN_FILES.min(most);
    match setrlimit(Resource::RLIMIT_NOFILE, limit, limit) {
        Ok(()) => Ok(()),
        // Without CAP_SYS_RESOURCE.
        Err(_) => setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
            .map_err(step("raise the limit of open files")),
    }
}

/// The capabilities as a bit mask.
pub(crate) fn mask(capabilities: &[(u32, &str)]) -> u64 {
    capabilities.iter().fold(0, |mask, (capability, _)| mask | 1 << capability)
}

/// Sets no_new_privs, forbids core dumps (they would have tenant data), and drops all but these
/// capabilities.
pub fn drop_privileges(capabilities: &[(u32, &str)]) -> Result<(), JailError> {
    let caps = mask(capabilities);
    nix::sys::prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;
    nix::sys::prctl::set_dumpable(false).map_err(step("clear the dumpable flag"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;
    nix::unistd::setgroups(&[]).map_err(step("drop supplementary groups"))?;
    sys::limit_bounding_set(caps).map_err(step("drop the capability bounding set"))?;
    sys::set_capabilities(caps).map_err(step("drop capabilities"))
}
