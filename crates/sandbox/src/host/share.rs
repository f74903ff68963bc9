//! Shares: the pod's `nacelle-fs` and the mounts it serves.
//!
//! ```text
//!   start ---> VMM gets the connection (Vmm::add_fs) ---> guest mounts the tag
//!     add, remove: at any time; both may be repeated
//! ```
//! A share is a detached clone of the host's mount, made by the daemon. The host path is resolved
//! once; later symlinks have no effect. The server enforces access; servers of an earlier release
//! do not, and get mounts with read-only flags. The server runs in the pod's cgroup and is killed
//! with it; its shares are in its mount namespace and leave nothing to undo on the host.
//!
//! Spec: open_tree(2), mount_setattr(2), mount_namespaces(7).

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::fcntl::{OFlag, open};
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, UnixAddr, connect, setsockopt, socket, sockopt,
};
use nix::sys::stat::{Mode, SFlag, fstat};
use nix::sys::time::{TimeVal, TimeValLike};
use vmm_api::shares::{Access, Error as ServerError, Reply, Request};
use vmm_api::transport::{self, TransportError};

use super::pool::BlockingPool;
use super::{blocking, ignore_not_found, sockets};
use crate::error::Error;
use crate::launcher::{Launch, Launched, Namespaces, Program};

/// Longest wait for a server to become ready.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Whether later mounts of the host below the path appear in the share. Mounts of the guest never
/// appear on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    Private,
    Slave,
}

/// Kind of a share: a directory is a file system below the tag's root, a file is a file there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Directory,
    File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) access: Access,
    pub(crate) propagation: Propagation,
    /// The server enforces the access; otherwise the mount's flags do.
    pub(crate) server_checks_access: bool,
}

/// Client of a pod's file server; every call has its own connection and deadline.
#[derive(Debug, Clone)]
pub(crate) struct ShareServer {
    control: PathBuf,
    limit: Duration,
    lookups: BlockingPool,
}

/// Parameters of a new server.
#[derive(Debug)]
pub(crate) struct Start {
    /// The `nacelle-fs` binary.
    pub(crate) exe: PathBuf,
    /// Path of the control socket; a socket with the extension `.peer` exists temporarily.
    pub(crate) control: PathBuf,
    /// The pod's leaf cgroup.
    pub(crate) cgroup: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// Limit of later calls.
    pub(crate) limit: Duration,
    pub(crate) lookups: BlockingPool,
}

#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) server: ShareServer,
    pub(crate) process: Launched,
    /// vhost-user connection for the VMM.
    pub(crate) vhost: OwnedFd,
}

impl ShareServer {
    /// Starts a server and waits until it is ready; kills it on a failure.
    pub(crate) async fn start(launcher: &dyn Launch, start: Start) -> Result<Started, Error> {
        let Start { exe, control, cgroup, stderr, limit, lookups } = start;
        let path = control.clone();
        let (listener, peer, vhost) = blocking(move || listen(&path)).await?;
        let args = ["--control-fd", "3", "--vhost-fd", "4"].map(str::to_owned).to_vec();
        let fds = vec![listener, peer];
        let program = Program { exe, args, cgroup, stderr, fds, own: Namespaces::ALL };
        let process = launcher.launch(program).await?;
        let ready = Self { control: control.clone(), limit: START_LIMIT, lookups: lookups.clone() };
        match ready.call(Request::List, None).await {
            Ok(_) => Ok(Started { server: Self { control, limit, lookups }, process, vhost }),
            Err(error) => {
                if let Ok(process) = super::process::Process::new(process.pid, process.pidfd) {
                    // If this fails, the undo of the pod's cgroup kills it.
                    let _ = process.kill();
                }
                Err(error)
            }
        }
    }

    /// An existing server, after a restart of the daemon.
    pub(crate) fn attach(control: PathBuf, limit: Duration, lookups: BlockingPool) -> Self {
        Self { control, limit, lookups }
    }

    /// Shares `source` (symlinks are followed now) as `name`. An existing share is kept, except for
    /// its access: a name implies a source.
    pub(crate) async fn add(&self, name: &str, source: &Path, share: Share) -> Result<Kind, Error> {
        self.add_as(name, source, share, None).await
    }

    /// [`Self::add`] with an idmapped mount ([`Launch::user_namespace`]): an id on disk that is
    /// inside the namespace has the id outside of it in the guest, and vice versa. Unmapped ids
    /// become the overflow id. Fails if the file system does not support it.
    pub(crate) async fn add_mapped(
        &self,
        name: &str,
        source: &Path,
        share: Share,
        ids: OwnedFd,
    ) -> Result<Kind, Error> {
        self.add_as(name, source, share, Some(ids)).await
    }

    async fn add_as(
        &self,
        name: &str,
        source: &Path,
        share: Share,
        ids: Option<OwnedFd>,
    ) -> Result<Kind, Error> {
        let path = source.to_owned();
        let what = format!("open {}", source.display());
        let made =
            self.lookups.run_with_limit(what, move || clone_mount(&path, share, ids.as_ref()));
        let (tree, kind) = made.await??;
        let access = if share.server_checks_access { share.access } else { Access::AsMounted };
        let request = Request::Add { name: name.to_owned(), access };
        match self.call(request, Some(tree)).await? {
            Ok(_) => Ok(kind),
            Err(ServerError::Exists { .. }) if share.server_checks_access => {
                self.access(name, share.access).await.map(|()| kind)
            }
            Err(ServerError::Exists { .. }) => Ok(kind),
            Err(e @ ServerError::Full { .. }) => {
                Err(Error::ResourceExhausted { message: e.to_string() })
            }
            Err(e @ ServerError::Name { .. }) => Err(Error::invalid(e.to_string())),
            Err(e) => Err(Error::Internal(
                anyhow::Error::new(e).context(format!("share {}", source.display())),
            )),
        }
    }

    /// Removes a share; a missing one is no error. The guest must have unmounted it.
    pub(crate) async fn remove(&self, name: &str) -> Result<(), Error> {
        match self.call(Request::Remove { name: name.to_owned() }, None).await? {
            Ok(_) | Err(ServerError::NoSuchShare { .. }) => Ok(()),
            Err(e) => Err(Error::Internal(anyhow::Error::new(e).context("remove a share"))),
        }
    }

    /// Sets the access of a share's users.
    pub(crate) async fn access(&self, name: &str, access: Access) -> Result<(), Error> {
        match self.call(Request::Access { name: name.to_owned(), access }, None).await? {
            Ok(_) => Ok(()),
            Err(e) => {
                Err(Error::Internal(anyhow::Error::new(e).context("set the access of a share")))
            }
        }
    }

    /// Names of the shares, and the server's protocol version (`vmm_api::shares`).
    pub(crate) async fn list(&self) -> Result<(Vec<String>, u32), Error> {
        match self.call(Request::List, None).await? {
            Ok(Reply::Shares { names, version }) => Ok((names, version)),
            got => {
                Err(Error::unavailable(format!("file server replied {got:?} to a list request")))
            }
        }
    }

    async fn call(
        &self,
        request: Request,
        fd: Option<OwnedFd>,
    ) -> Result<Result<Reply, ServerError>, Error> {
        let (control, limit) = (self.control.clone(), self.limit);
        let what = "file server";
        blocking(move || match exchange(&control, limit, &request, fd) {
            Ok(Reply::Error(error)) => Ok(Err(error)),
            Ok(reply) => Ok(Ok(reply)),
            Err(TransportError::Socket(nix::Error::EAGAIN)) => {
                Err(Error::Deadline { what: format!("{what}: {request:?}"), limit })
            }
            Err(error) => {
                Err(Error::unavailable(format!("{what}: {:#}", anyhow::Error::new(error))))
            }
        })
        .await
    }
}

/// The two sockets of a server, and a pending connection to the second.
fn listen(control: &Path) -> Result<(OwnedFd, OwnedFd, OwnedFd), Error> {
    let failed = |path: &Path, e: io::Error| Error::io(format!("listen at {}", path.display()), e);
    let listener =
        sockets::listen_at(control, SockType::SeqPacket).map_err(|e| failed(control, e))?;
    let path = control.with_extension("peer");
    let peer = sockets::listen_at(&path, SockType::Stream).map_err(|e| failed(&path, e))?;
    let vhost = std::os::unix::net::UnixStream::connect(&path).map_err(|e| failed(&path, e));
    // The VMM's connection is the only one.
    ignore_not_found(std::fs::remove_file(&path)).map_err(|e| failed(&path, e))?;
    Ok((listener, peer, vhost?.into()))
}

fn exchange(
    control: &Path,
    limit: Duration,
    request: &Request,
    fd: Option<OwnedFd>,
) -> Result<Reply, TransportError> {
    let kind = SockType::SeqPacket;
    let socket = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None)?;
    let time = TimeVal::milliseconds(limit.as_millis().try_into().unwrap_or(i64::MAX));
    setsockopt(&socket, sockopt::SendTimeout, &time)?;
    setsockopt(&socket, sockopt::ReceiveTimeout, &time)?;
    connect(socket.as_raw_fd(), &UnixAddr::new(control)?)?;
    let fds: Vec<_> = fd.iter().map(AsFd::as_fd).collect();
    transport::send(socket.as_fd(), request, &fds)?;
    Ok(transport::receive(socket.as_fd())?.0)
}

/// A detached recursive clone of the mount at `source` (open_tree(2)).
fn clone_mount(
    source: &Path,
    share: Share,
    ids: Option<&OwnedFd>,
) -> Result<(OwnedFd, Kind), Error> {
    let failed = |e: nix::Error| match e {
        nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP => {
            Error::precondition(format!("{}: {}", source.display(), e.desc()))
        }
        e => Error::io(format!("share {}", source.display()), e.into()),
    };
    let place = open(source, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed)?;
    let stat = fstat(&place).map_err(failed)?;
    let kind = match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => Kind::Directory,
        SFlag::S_IFREG => Kind::File,
        _ => {
            return Err(Error::Unsupported {
                message: format!(
                    "{} is neither a directory nor a regular file; sockets and devices of the host \
                     cannot be shared with a VM",
                    source.display()
                ),
            });
        }
    };
    let tree = sys::open_tree(&place).map_err(failed)?;
    let (top, below) = attributes(share);
    sys::set_attributes(&tree, &below, true).map_err(failed)?;
    sys::set_attributes(&tree, &top, false).map_err(failed)?;
    if let Some(ids) = ids {
        map_ids(&tree, ids).map_err(|e| Error::Unsupported {
            message: format!(
                "{}: {}; its file system does not support idmapped mounts (user namespace)",
                source.display(),
                e.desc()
            ),
        })?;
    }
    Ok((tree, kind))
}

/// Maps ids recursively if all file systems support it, otherwise of the top mount only: files of
/// submounts then have the overflow id.
fn map_ids(tree: &OwnedFd, ids: &OwnedFd) -> nix::Result<()> {
    let attributes = libc::mount_attr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: ids.as_raw_fd() as u64,
    };
    match sys::set_attributes(tree, &attributes, true) {
        Err(nix::Error::EINVAL) => sys::set_attributes(tree, &attributes, false),
        other => other,
    }
}

/// Attributes of the top mount, and of all mounts. No setuid programs, devices or execution from
/// there on the host.
fn attributes(share: Share) -> (libc::mount_attr, libc::mount_attr) {
    let plain = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let read_only = libc::MOUNT_ATTR_RDONLY;
    let (top, below) = match share.access {
        _ if share.server_checks_access => (0, 0),
        Access::ReadWrite | Access::AsMounted => (0, 0),
        Access::ReadOnly => (read_only, 0),
        Access::ReadOnlyRecursive => (read_only, read_only),
    };
    let propagation = match share.propagation {
        Propagation::Private => libc::MS_PRIVATE,
        Propagation::Slave => libc::MS_SLAVE,
    };
    let attr = |set: u64, propagation: u64| libc::mount_attr {
        attr_set: set,
        attr_clr: 0,
        propagation,
        userns_fd: 0,
    };
    (attr(top, 0), attr(plain | below, propagation))
}

#[allow(unsafe_code)] // raw system calls: nix does not have these two
mod sys {
    use super::{AsRawFd, CStr, FromRawFd, OwnedFd};
    use nix::errno::Errno;

    const EMPTY_PATH: &CStr = c"";

    pub(super) fn open_tree(place: &OwnedFd) -> nix::Result<OwnedFd> {
        let flags = libc::OPEN_TREE_CLONE
            | libc::OPEN_TREE_CLOEXEC
            | libc::AT_EMPTY_PATH as libc::c_uint
            | libc::AT_RECURSIVE as libc::c_uint;
        // SAFETY: the path is NUL-terminated and static; no memory is written. `place` is open.
        let fd = unsafe {
            libc::syscall(libc::SYS_open_tree, place.as_raw_fd(), EMPTY_PATH.as_ptr(), flags)
        };
        let fd = Errno::result(fd)?;
        // SAFETY: the kernel has just made this descriptor for us; nothing else knows its number.
        Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
    }

    pub(super) fn set_attributes(
        tree: &OwnedFd,
        attributes: &libc::mount_attr,
        recursive: bool,
    ) -> nix::Result<()> {
        let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
        // SAFETY: the path is NUL-terminated and static, `attributes` is readable for the length
        // that is named; no memory is written. `tree` is open.
        let done = unsafe {
            libc::syscall(
                libc::SYS_mount_setattr,
                tree.as_raw_fd(),
                EMPTY_PATH.as_ptr(),
                flags,
                std::ptr::from_ref(attributes),
                size_of::<libc::mount_attr>(),
            )
        };
        Errno::result(done).map(drop)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    const PLAIN: Share = Share {
        access: Access::ReadWrite,
        propagation: Propagation::Private,
        server_checks_access: false,
    };

    /// Path of a detached mount.
    fn fd_path(tree: &OwnedFd) -> PathBuf {
        format!("/proc/self/fd/{}", tree.as_raw_fd()).into()
    }

    fn is_root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            eprintln!("SKIP: mounts are made by root only");
        }
        root
    }

    #[test]
    fn a_share_has_the_directorys_files_and_enforces_read_only() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "one").unwrap();
        let (tree, kind) = clone_mount(dir.path(), PLAIN, None).unwrap();
        assert_eq!(kind, Kind::Directory);
        assert_eq!(fs::read_to_string(fd_path(&tree).join("a")).unwrap(), "one");
        fs::write(fd_path(&tree).join("b"), "two").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("b")).unwrap(), "two");
        for access in [Access::ReadOnly, Access::ReadOnlyRecursive] {
            let (tree, _) = clone_mount(dir.path(), Share { access, ..PLAIN }, None).unwrap();
            let refused = fs::write(fd_path(&tree).join("c"), "").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{access:?}");
        }
    }

    #[test]
    fn a_symlink_is_resolved_once() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (good, evil) = (dir.path().join("good"), dir.path().join("evil"));
        for (directory, text) in [(&good, "good"), (&evil, "evil")] {
            fs::create_dir(directory).unwrap();
            fs::write(directory.join("file"), text).unwrap();
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&good, &link).unwrap();
        let (tree, _) = clone_mount(&link, PLAIN, None).unwrap();
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&evil, &link).unwrap();
        assert_eq!(fs::read_to_string(fd_path(&tree).join("file")).unwrap(), "good");
    }

    #[test]
    fn files_can_be_shared_and_sockets_or_missing_paths_cannot() {
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "text").unwrap();
        let (tree, kind) = clone_mount(&file, PLAIN, None).unwrap();
        assert_eq!(kind, Kind::File);
        assert_eq!(fs::read_to_string(fd_path(&tree)).unwrap(), "text");
        let path = dir.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(clone_mount(&path, PLAIN, None), Err(Error::Unsupported { .. })));
        let error = clone_mount(Path::new("/no/such"), PLAIN, None).unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition { .. }), "{error}");
    }

    /// A user namespace that maps ids from 0 to ids from 70,000.
    fn namespace() -> OwnedFd {
        let mut child =
            std::process::Command::new("unshare").args(["--user", "sleep", "60"]).spawn().unwrap();
        let proc = PathBuf::from(format!("/proc/{}", child.id()));
        let ours = fs::read_link("/proc/self/ns/user").unwrap();
        while fs::read_link(proc.join("ns/user")).unwrap() == ours {
            std::thread::sleep(Duration::from_millis(1));
        }
        for map in ["uid_map", "gid_map"] {
            fs::write(proc.join(map), "0 70000 1000").unwrap();
        }
        let namespace = fs::File::open(proc.join("ns/user")).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        namespace.into()
    }

    #[test]
    fn ids_are_mapped_both_ways_if_the_file_system_supports_it() {
        use std::os::unix::fs::{MetadataExt, chown};
        if !is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        chown(dir.path(), Some(5), Some(6)).unwrap();
        let ids = namespace();
        let (tree, _) = match clone_mount(dir.path(), PLAIN, Some(&ids)) {
            Ok(made) => made,
            Err(Error::Unsupported { message }) => return eprintln!("SKIP: {message}"),
            Err(e) => panic!("{e}"),
        };
        let seen = fs::metadata(fd_path(&tree)).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (70_005, 70_006));
        chown(fd_path(&tree), Some(70_007), None).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().uid(), 7);
        let error = clone_mount(Path::new("/proc"), PLAIN, Some(&ids)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_missing_and_a_hanging_server_are_distinguished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs");
        let limit = Duration::from_millis(50);
        let lookups = BlockingPool::new("test-lookup", 1, limit);
        let server = ShareServer::attach(path.clone(), limit, lookups);
        assert!(matches!(server.list().await, Err(Error::Unavailable { .. })));
        let _listener = sockets::listen_at(&path, SockType::SeqPacket).unwrap();
        assert!(matches!(server.remove("a").await, Err(Error::Deadline { .. })));
    }
}
