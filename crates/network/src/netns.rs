//! Named network namespaces, kept by a bind mount as by `ip netns` (ip-netns(8)), so that the usual
//! tools work with them.
//!
//! A namespace is a property of a thread. Work inside of one runs on a new thread, which ends
//! afterwards, so no pool thread stays in a namespace.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::thread;

use nix::fcntl::{Flock, FlockArg};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::statfs::{FsType, statfs};

/// `NSFS_MAGIC` of linux/magic.h: file system of a mounted namespace.
const NSFS_MAGIC: FsType = FsType(0x6e73_6673);
/// Maximum mounts on one path that `remove` unmounts.
const MAX_STACK: usize = 64;
const NONE: Option<&str> = None;

#[derive(Debug, thiserror::Error)]
pub enum NetnsError {
    #[error("cannot {what} {}", .path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("cannot start a thread for the network namespace {}", .path.display())]
    Thread { path: PathBuf, source: io::Error },
    #[error("the network namespace {} does not exist", .path.display())]
    Missing { path: PathBuf },
    #[error("a thread in the network namespace {} panicked", .path.display())]
    Panicked { path: PathBuf },
}

fn io_error<E: Into<io::Error>>(what: &'static str, path: &Path) -> impl FnOnce(E) -> NetnsError {
    move |source| NetnsError::Io { what, path: path.to_owned(), source: source.into() }
}

/// Creates a namespace and mounts it at `path`, which must not exist.
pub fn create(path: &Path) -> Result<(), NetnsError> {
    let dir = path.parent().unwrap_or(Path::new("/"));
    make_shared(dir)?;
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o444)
        .open(path)
        .map_err(io_error("create", path))?;
    let made = on_thread(path, || {
        unshare(CloneFlags::CLONE_NEWNET)
            .map_err(io_error("make a network namespace for", path))?;
        mount(Some("/proc/thread-self/ns/net"), path, NONE, MsFlags::MS_BIND, NONE)
            .map_err(io_error("mount a network namespace at", path))
    });
    if made.is_err() {
        let _ = remove(path);
    }
    made
}

/// Unmounts and removes a namespace; success if it does not exist.
pub fn remove(path: &Path) -> Result<(), NetnsError> {
    for _ in 0..MAX_STACK {
        match umount2(path, MntFlags::MNT_DETACH) {
            Ok(()) => {}
            // Not a mount point, or it does not exist.
            Err(nix::Error::EINVAL | nix::Error::ENOENT) => break,
            Err(e) => return Err(io_error("unmount", path)(e)),
        }
    }
    match fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(io_error("remove", path)(e)),
        _ => Ok(()),
    }
}

/// Whether a namespace is mounted there. A plain file is left by an interrupted creation.
pub fn is_mounted(path: &Path) -> bool {
    statfs(path).is_ok_and(|s| s.filesystem_type() == NSFS_MAGIC)
}

/// Runs `work` on a thread in the namespace.
pub fn run_in_netns<T, E>(path: &Path, work: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E>
where
    T: Send,
    E: Send + From<NetnsError>,
{
    if !is_mounted(path) {
        return Err(NetnsError::Missing { path: path.to_owned() }.into());
    }
    let netns = File::open(path).map_err(io_error("open", path))?;
    on_thread(path, || {
        setns(netns.as_fd(), CloneFlags::CLONE_NEWNET).map_err(io_error("join", path))?;
        work()
    })
}

fn on_thread<T, E>(path: &Path, work: impl FnOnce() -> Result<T, E> + Send) -> Result<T, E>
where
    T: Send,
    E: Send + From<NetnsError>,
{
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name("netns".into())
            .spawn_scoped(scope, work)
            .map_err(|source| NetnsError::Thread { path: path.to_owned(), source })?;
        thread.join().unwrap_or_else(|_| Err(NetnsError::Panicked { path: path.to_owned() }.into()))
    })
}

/// Makes the directory a shared mount: an unmount must propagate to mount namespaces with a copy,
/// which would otherwise keep the namespace alive.
fn make_shared(dir: &Path) -> Result<(), NetnsError> {
    fs::create_dir_all(dir).map_err(io_error("create", dir))?;
    let handle = File::open(dir).map_err(io_error("open", dir))?;
    // A concurrent call (or `ip netns add`) could mount twice.
    let _lock =
        Flock::lock(handle, FlockArg::LockExclusive).map_err(|(_, e)| io_error("lock", dir)(e))?;
    let share = || mount(NONE, dir, NONE, MsFlags::MS_SHARED | MsFlags::MS_REC, NONE);
    match share() {
        Ok(()) => return Ok(()),
        // Not a mount point yet.
        Err(nix::Error::EINVAL) => {}
        Err(e) => return Err(io_error("share the mount", dir)(e)),
    }
    mount(Some(dir), dir, NONE, MsFlags::MS_BIND | MsFlags::MS_REC, NONE)
        .map_err(io_error("create a mount point at", dir))?;
    share().map_err(io_error("share the mount", dir))
}
