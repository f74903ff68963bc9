//! Folders and files of the host that a guest sees: the pod's `nacelle-fs`, and the mounts it is
//! handed.
//!
//! ```text
//!   start ---> VMM gets the connection (Vmm::add_fs) ---> guest mounts the tag
//!     add, remove: at any time; both may be repeated
//! ```
//! A share is a detached copy of the host's mount, made here by the daemon. The host's path is
//! resolved once; what becomes a link later leads nowhere else. The server protects what nobody may
//! write to; servers of the release before do not, and get mounts whose flags say it. The server
//! lives in the pod's cgroup, so the end of that is its end; its shares go with its mount namespace,
//! and leave nothing on the host to be undone.
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
use vmm_api::shares::{Access, Error as Refusal, Reply, Request};
use vmm_api::transport::{self, TransportError};

use super::pool::Pool;
use super::{absent_is_fine, blocking, sockets};
use crate::error::Error;
use crate::launcher::{Launch, Launched, Namespaces, Program};

/// A server that is not ready by then is broken.
const START_LIMIT: Duration = Duration::from_secs(20);

/// Whether the host's later mounts below the path appear in the share. The guest's never appear on
/// the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Propagation {
    Private,
    Slave,
}

/// What a share is, which decides how the guest has it: a folder is a file system of its own below
/// the tag's root, a file is just there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Folder,
    File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Share {
    pub(crate) access: Access,
    pub(crate) propagation: Propagation,
    /// The server keeps the access; otherwise the mount's flags do.
    pub(crate) kept: bool,
}

/// The control of one pod's server; every call has a connection and a deadline of its own.
#[derive(Debug, Clone)]
pub(crate) struct ShareServer {
    control: PathBuf,
    limit: Duration,
    lookups: Pool,
}

/// What a new server needs.
#[derive(Debug)]
pub(crate) struct Start {
    /// The `nacelle-fs` binary.
    pub(crate) exe: PathBuf,
    /// Where its control socket is to be; a name beside it (`.peer`) is used for a moment.
    pub(crate) control: PathBuf,
    /// The pod's leaf.
    pub(crate) cgroup: OwnedFd,
    pub(crate) stderr: OwnedFd,
    /// For calls later on.
    pub(crate) limit: Duration,
    pub(crate) lookups: Pool,
}

#[derive(Debug)]
pub(crate) struct Started {
    pub(crate) server: ShareServer,
    pub(crate) process: Launched,
    /// For the VMM.
    pub(crate) vhost: OwnedFd,
}

impl ShareServer {
    /// Starts a server and waits until it is ready; what fails leaves no process.
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
                    // It is in the pod's cgroup: if this fails, that one's end is its end.
                    let _ = process.kill();
                }
                Err(error)
            }
        }
    }

    /// The server that listens there, after a restart of ours.
    pub(crate) fn attach(control: PathBuf, limit: Duration, lookups: Pool) -> Self {
        Self { control, limit, lookups }
    }

    /// Shares `source` (links in it are followed, now) as `name`. One that is there already stays
    /// as it is, but for what may be written to: a name stands for a source.
    pub(crate) async fn add(&self, name: &str, source: &Path, share: Share) -> Result<Kind, Error> {
        self.add_as(name, source, share, None).await
    }

    /// The same with ids mapped by a user namespace ([`Launch::user_namespace`]): what stands on the
    /// disk as an id in it has the id outside of it in the guest, and the other way round. Ids that
    /// it does not know belong to nobody. Refused where the host's file system cannot do it.
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
        let what = format!("look at {}", source.display());
        let made = self.lookups.look(what, move || mount_of(&path, share, ids.as_ref()));
        let (tree, kind) = made.await??;
        let access = if share.kept { share.access } else { Access::AsMounted };
        let request = Request::Add { name: name.to_owned(), access };
        match self.call(request, Some(tree)).await? {
            Ok(_) => Ok(kind),
            Err(Refusal::Exists { .. }) if share.kept => {
                self.access(name, share.access).await.map(|()| kind)
            }
            Err(Refusal::Exists { .. }) => Ok(kind),
            Err(e @ Refusal::Full { .. }) => {
                Err(Error::ResourceExhausted { message: e.to_string() })
            }
            Err(e @ Refusal::Name { .. }) => Err(Error::invalid(e.to_string())),
            Err(e) => Err(Error::Internal(
                anyhow::Error::new(e).context(format!("share {}", source.display())),
            )),
        }
    }

    /// Takes a share away; one that is not there is fine. The guest must have unmounted it first,
    /// or finds it gone.
    pub(crate) async fn remove(&self, name: &str) -> Result<(), Error> {
        match self.call(Request::Remove { name: name.to_owned() }, None).await? {
            Ok(_) | Err(Refusal::NoSuchShare { .. }) => Ok(()),
            Err(e) => Err(Error::Internal(anyhow::Error::new(e).context("remove a share"))),
        }
    }

    /// Changes what the users of a share may write to.
    pub(crate) async fn access(&self, name: &str, access: Access) -> Result<(), Error> {
        match self.call(Request::Access { name: name.to_owned(), access }, None).await? {
            Ok(_) => Ok(()),
            Err(e) => Err(Error::Internal(anyhow::Error::new(e).context("protect a share"))),
        }
    }

    /// Names of the shares, and the server's version (`vmm_api::shares`).
    pub(crate) async fn list(&self) -> Result<(Vec<String>, u32), Error> {
        match self.call(Request::List, None).await? {
            Ok(Reply::Shares { names, version }) => Ok((names, version)),
            got => Err(Error::unavailable(format!("file server answered {got:?} to a list"))),
        }
    }

    async fn call(
        &self,
        request: Request,
        fd: Option<OwnedFd>,
    ) -> Result<Result<Reply, Refusal>, Error> {
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

/// Both sockets of a server, and a connection that waits at the second.
fn listen(control: &Path) -> Result<(OwnedFd, OwnedFd, OwnedFd), Error> {
    let failed = |path: &Path, e: io::Error| Error::io(format!("listen at {}", path.display()), e);
    let listener =
        sockets::listen_at(control, SockType::SeqPacket).map_err(|e| failed(control, e))?;
    let path = control.with_extension("peer");
    let peer = sockets::listen_at(&path, SockType::Stream).map_err(|e| failed(&path, e))?;
    let vhost = std::os::unix::net::UnixStream::connect(&path).map_err(|e| failed(&path, e));
    // There is one VMM, and it is connected.
    absent_is_fine(std::fs::remove_file(&path)).map_err(|e| failed(&path, e))?;
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

/// A detached copy of the mount at `source` with what is mounted below it.
fn mount_of(source: &Path, share: Share, ids: Option<&OwnedFd>) -> Result<(OwnedFd, Kind), Error> {
    let failed = |e: nix::Error| match e {
        nix::Error::ENOENT | nix::Error::ENOTDIR | nix::Error::ELOOP => {
            Error::precondition(format!("{}: {}", source.display(), e.desc()))
        }
        e => Error::io(format!("share {}", source.display()), e.into()),
    };
    let place = open(source, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty()).map_err(failed)?;
    let stat = fstat(&place).map_err(failed)?;
    let kind = match SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits()) {
        SFlag::S_IFDIR => Kind::Folder,
        SFlag::S_IFREG => Kind::File,
        _ => {
            return Err(Error::Unsupported {
                message: format!(
                    "{} is neither a folder nor a regular file; sockets and devices of the host \
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
                "{}: {}; its file system cannot map ids for a pod with a user namespace",
                source.display(),
                e.desc()
            ),
        })?;
    }
    Ok((tree, kind))
}

/// Of everything, if all file systems below can do it, or else of the top alone: what is mounted
/// there belongs to nobody then.
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

/// What the top mount gets, and what all of them get. Nothing on the host is ever run or opened as
/// a device from there.
fn attributes(share: Share) -> (libc::mount_attr, libc::mount_attr) {
    let plain = libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOEXEC;
    let read_only = libc::MOUNT_ATTR_RDONLY;
    let (top, below) = match share.access {
        _ if share.kept => (0, 0),
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

    const HERE: &CStr = c"";

    pub(super) fn open_tree(place: &OwnedFd) -> nix::Result<OwnedFd> {
        let flags = libc::OPEN_TREE_CLONE
            | libc::OPEN_TREE_CLOEXEC
            | libc::AT_EMPTY_PATH as libc::c_uint
            | libc::AT_RECURSIVE as libc::c_uint;
        // SAFETY: the path is NUL-terminated and static; no memory is written. `place` is open.
        let fd =
            unsafe { libc::syscall(libc::SYS_open_tree, place.as_raw_fd(), HERE.as_ptr(), flags) };
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
                HERE.as_ptr(),
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

    const PLAIN: Share =
        Share { access: Access::ReadWrite, propagation: Propagation::Private, kept: false };

    /// Where a detached mount can be looked into.
    fn inside(tree: &OwnedFd) -> PathBuf {
        format!("/proc/self/fd/{}", tree.as_raw_fd()).into()
    }

    fn root() -> bool {
        let root = nix::unistd::geteuid().is_root();
        if !root {
            eprintln!("SKIP: mounts are made by root only");
        }
        root
    }

    #[test]
    fn a_share_shows_the_folder_and_takes_writes_only_where_it_may() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("a"), "one").unwrap();
        let (tree, kind) = mount_of(dir.path(), PLAIN, None).unwrap();
        assert_eq!(kind, Kind::Folder);
        assert_eq!(fs::read_to_string(inside(&tree).join("a")).unwrap(), "one");
        fs::write(inside(&tree).join("b"), "two").unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("b")).unwrap(), "two");
        for access in [Access::ReadOnly, Access::ReadOnlyRecursive] {
            let (tree, _) = mount_of(dir.path(), Share { access, ..PLAIN }, None).unwrap();
            let refused = fs::write(inside(&tree).join("c"), "").unwrap_err();
            assert_eq!(refused.raw_os_error(), Some(libc::EROFS), "{access:?}");
        }
    }

    #[test]
    fn a_link_is_followed_once_and_later_changes_lead_nowhere() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (good, evil) = (dir.path().join("good"), dir.path().join("evil"));
        for (folder, text) in [(&good, "good"), (&evil, "evil")] {
            fs::create_dir(folder).unwrap();
            fs::write(folder.join("file"), text).unwrap();
        }
        let link = dir.path().join("link");
        std::os::unix::fs::symlink(&good, &link).unwrap();
        let (tree, _) = mount_of(&link, PLAIN, None).unwrap();
        fs::remove_file(&link).unwrap();
        std::os::unix::fs::symlink(&evil, &link).unwrap();
        assert_eq!(fs::read_to_string(inside(&tree).join("file")).unwrap(), "good");
    }

    #[test]
    fn a_file_can_be_shared_and_a_socket_or_nothing_cannot() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        fs::write(&file, "text").unwrap();
        let (tree, kind) = mount_of(&file, PLAIN, None).unwrap();
        assert_eq!(kind, Kind::File);
        assert_eq!(fs::read_to_string(inside(&tree)).unwrap(), "text");
        let path = dir.path().join("socket");
        let _socket = std::os::unix::net::UnixListener::bind(&path).unwrap();
        assert!(matches!(mount_of(&path, PLAIN, None), Err(Error::Unsupported { .. })));
        let error = mount_of(Path::new("/no/such"), PLAIN, None).unwrap_err();
        assert!(matches!(error, Error::FailedPrecondition { .. }), "{error}");
    }

    /// A namespace in which ids from 0 on stand for those from 70,000 on.
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
    fn ids_are_mapped_both_ways_where_the_file_system_can() {
        use std::os::unix::fs::{MetadataExt, chown};
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        chown(dir.path(), Some(5), Some(6)).unwrap();
        let ids = namespace();
        let (tree, _) = match mount_of(dir.path(), PLAIN, Some(&ids)) {
            Ok(made) => made,
            Err(Error::Unsupported { message }) => return eprintln!("SKIP: {message}"),
            Err(e) => panic!("{e}"),
        };
        let seen = fs::metadata(inside(&tree)).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (70_005, 70_006));
        chown(inside(&tree), Some(70_007), None).unwrap();
        assert_eq!(fs::metadata(dir.path()).unwrap().uid(), 7);
        let error = mount_of(Path::new("/proc"), PLAIN, Some(&ids)).unwrap_err();
        assert!(matches!(error, Error::Unsupported { .. }), "{error}");
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_or_sleeps_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fs");
        let limit = Duration::from_millis(50);
        let lookups = Pool::new("test-lookup", 1, limit);
        let server = ShareServer::attach(path.clone(), limit, lookups);
        assert!(matches!(server.list().await, Err(Error::Unavailable { .. })));
        let _listener = sockets::listen_at(&path, SockType::SeqPacket).unwrap();
        assert!(matches!(server.remove("a").await, Err(Error::Deadline { .. })));
    }
}
