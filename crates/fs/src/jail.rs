//! What both processes give up: the host's files, first of all, then rights, each as much as it can.
//!
//! Namespaces are the launcher's part (pid, mount, ipc, uts, net). They stay root in the host's user
//! namespace: the shared files have the host's users as owners, and the guest's processes act as any
//! of them. What root may do beyond that is taken away as capabilities.

use std::fs;
use std::os::fd::OwnedFd;

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::sys::resource::{Resource, getrlimit, rlim_t, setrlimit};
use nix::unistd::{chdir, mkdir, pivot_root};

use crate::table::Table;
use crate::{SHARES, SOURCES, sys};

/// Where the new root is mounted for a moment; any directory that every system has.
const STAGE: &str = "/proc";
/// Descriptors of the server. The guest holds one for each file that it has open or has removed and
/// still uses, so its memory is the limit in practice, and the pod's cgroup pays for them. Attack: a
/// guest that opens one file after the other and closes none.
const OPEN_FILES: rlim_t = 1_000_000;
/// Capabilities of the server (capabilities(7)), and what would fail without each.
pub const SERVER: [(u32, &str); 8] = [
    (0, "CHOWN: chown in the guest, and new files belong to the guest's user"),
    (1, "DAC_OVERRIDE: the guest's root reads and writes as root does; its kernel checks others"),
    (3, "FOWNER: chmod, utimes and xattrs of files of other users by the guest's root"),
    (4, "FSETID: setgid bits survive a change by the guest's root"),
    (6, "SETGID: a file is made with the group of the guest's process"),
    (7, "SETUID: a file is made as the user of the guest's process"),
    (27, "MKNOD: fifos and sockets need none, whiteouts and device nodes do, as with runc"),
    (31, "SETFCAP: programs with file capabilities are installed by package managers"),
];
/// And of the mounter.
pub const MOUNTER: [(u32, &str); 2] = [
    (2, "DAC_READ_SEARCH: the ways to what the host mounts below a share, past anybody's folders"),
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

/// The ways into the folders of shares and of their sources that make entries in them, where the
/// server's own way is read-only: a guest cannot fill the host's memory with files outside of its
/// shares. And the table of what is mounted, twice: who has read it once is told of changes only
/// since then, and two look at it.
#[derive(Debug)]
pub struct Entries {
    pub(crate) shares: OwnedFd,
    pub(crate) sources: OwnedFd,
    pub(crate) table: Table,
    pub(crate) mounted: Table,
}

/// Makes an empty tmpfs the root, with empty folders of shares and a view of our processes, and
/// forgets the former root.
pub fn empty_root() -> Result<Entries, JailError> {
    // The launcher has given us a mount namespace. If it did not (a person at a shell), get one:
    // the host's root must never be pivoted away.
    let mine = fs::read_link("/proc/self/ns/mnt");
    let host = fs::read_link("/proc/1/ns/mnt");
    if mine.is_err() || host.is_err() || mine.ok() == host.ok() {
        unshare(CloneFlags::CLONE_NEWNS).map_err(step("get a mount namespace"))?;
    }
    let none = None::<&str>;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .map_err(step("make mounts private"))?;
    let flags = MsFlags::MS_NODEV | MsFlags::MS_NOEXEC | MsFlags::MS_NOSUID;
    let tmpfs = |target: &str, options: &str| {
        mount(Some("none"), target, Some("tmpfs"), flags, Some(options))
    };
    tmpfs(STAGE, "size=4k,nr_inodes=8,mode=0555").map_err(step("mount an empty root"))?;
    chdir(STAGE).map_err(step("enter the empty root"))?;
    // Stacks the old root on the new one, from where it is detached (pivot_root(2), NOTES).
    pivot_root(".", ".").map_err(step("change the root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(step("forget the old root"))?;
    chdir("/").map_err(step("enter the new root"))?;
    for folder in [SHARES, SOURCES, "/proc"] {
        mkdir(folder, nix::sys::stat::Mode::from_bits_truncate(0o755))
            .map_err(step("make a folder"))?;
    }
    for folder in [SHARES, SOURCES] {
        tmpfs(folder, "size=64k,nr_inodes=1k,mode=0755").map_err(step("mount the shares"))?;
    }
    mount(Some("none"), "/proc", Some("proc"), flags, none).map_err(step("mount /proc"))?;
    let shares = sys::clone_mount(c"/shares").map_err(step("keep a way to the shares"))?;
    let sources = sys::clone_mount(c"/sources").map_err(step("keep a way to the sources"))?;
    let table = || {
        Table::open().map_err(|e| {
            let errno = e.raw_os_error().map_or(Errno::UnknownErrno, Errno::from_raw);
            step("open the table of mounts")(errno)
        })
    };
    let (table, mounted) = (table()?, table()?);
    let fixed = flags | MsFlags::MS_REMOUNT | MsFlags::MS_BIND | MsFlags::MS_RDONLY;
    for folder in [SHARES, SOURCES, "/"] {
        mount(none, folder, none, fixed, none).map_err(step("make a folder read-only"))?;
    }
    Ok(Entries { shares, sources, table, mounted })
}

/// The server's way to open a file anew that it has as a path only: its own descriptors, as a mount
/// from which nothing else of /proc can be reached; /proc itself goes.
pub(crate) fn own_descriptors() -> Result<OwnedFd, JailError> {
    let fds = sys::clone_mount(c"/proc/self/fd").map_err(step("open the own descriptors"))?;
    umount2("/proc", MntFlags::MNT_DETACH).map_err(step("forget /proc"))?;
    Ok(fds)
}

/// Lets as many files be open as the guest may want.
pub fn open_files() -> Result<(), JailError> {
    let (_, hard) =
        getrlimit(Resource::RLIMIT_NOFILE).map_err(step("read the limit of open files"))?;
    let most = fs::read_to_string("/proc/sys/fs/nr_open");
    let most = most.ok().and_then(|text| text.trim().parse().ok()).unwrap_or(hard);
    let wanted = OPEN_FILES.min(most);
    match setrlimit(Resource::RLIMIT_NOFILE, wanted, wanted) {
        Ok(()) => Ok(()),
        // Without the right to raise it.
        Err(_) => setrlimit(Resource::RLIMIT_NOFILE, hard, hard)
            .map_err(step("raise the limit of open files")),
    }
}

/// A bit for each of them.
pub(crate) fn mask(capabilities: &[(u32, &str)]) -> u64 {
    capabilities.iter().fold(0, |mask, (capability, _)| mask | 1 << capability)
}

/// No dumps of a tenant's data, no new privileges, and of root's rights only these.
pub fn keep(capabilities: &[(u32, &str)]) -> Result<(), JailError> {
    let caps = mask(capabilities);
    nix::sys::prctl::set_no_new_privs().map_err(step("set no_new_privs"))?;
    nix::sys::prctl::set_dumpable(false).map_err(step("become undumpable"))?;
    setrlimit(Resource::RLIMIT_CORE, 0, 0).map_err(step("forbid core dumps"))?;
    nix::unistd::setgroups(&[]).map_err(step("drop supplementary groups"))?;
    sys::bound_capabilities(caps).map_err(step("drop the capability bounding set"))?;
    sys::set_capabilities(caps).map_err(step("drop capabilities"))
}
