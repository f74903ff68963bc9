//! The server: FUSE over vhost-user with the `virtiofsd` crate, for the file system of
//! [`crate::passthrough`].
//!
//! Properties for containers:
//! - Data is cached in the guest until the file's size or mtime changes, names and attributes for
//!   one second: shared mappings work, and changes by the host are visible within that second.
//! - Locks are local to the guest: they work between processes of the pod, not with those of the
//!   host or of other pods. If they were passed to the host, a request that waits for a lock would
//!   block its virtqueue, whose requests are answered one after the other.
//! - O_DIRECT, xattrs, sparse files and copy_file_range are passed to the host's file system. POSIX
//!   ACLs are not: the guest's kernel would not apply them.
//! - All shares and the mounts below them are one file system; inode numbers are made unique.

use std::ffi::CString;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use vhost::vhost_user::Listener;
use vhost_user_backend::VhostUserDaemon;
use virtiofsd::vhost_user::VhostUserFsBackendBuilder;
use vm_memory::{GuestMemoryAtomic, GuestMemoryMmap};

use crate::backend::Backend;
use crate::jail::{self, JailError};
use crate::passthrough::Passthrough;
use crate::seccomp::{self, FilterError, Role};

#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error("file system")]
    FileSystem(#[source] io::Error),
    /// An error of a library, as text.
    #[error("vhost-user: {message}")]
    Backend { message: String },
    #[error("cannot report readiness")]
    Ready(#[source] nix::Error),
}

fn backend(error: impl std::fmt::Display) -> ServeError {
    ServeError::Backend { message: error.to_string() }
}

/// Accepts one connection on `listener` and serves it until it is closed. One byte is written to
/// `ready` once all privileges are dropped.
///
/// The process must be single-threaded.
pub fn run(listener: UnixListener, ready: OwnedFd) -> Result<(), ServeError> {
    // Without one of its threads the server would not answer; the VMM notices when the process
    // exits.
    std::panic::set_hook(Box::new(|info| {
        eprintln!("nacelle-fs: the server panicked: {info}");
        std::process::exit(101);
    }));
    jail::open_files()?;
    let descriptors = jail::own_descriptors()?;
    jail::drop_privileges(&jail::SERVER)?;
    let root = CString::new(crate::SHARES).unwrap_or_default();
    let fs = Passthrough::new(root, descriptors).map_err(ServeError::FileSystem)?;
    let served = VhostUserFsBackendBuilder::default().build(fs).map_err(backend)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let name = "messages".to_owned();
    let mut daemon =
        VhostUserDaemon::new(name, Arc::new(Backend(served)), memory).map_err(backend)?;
    daemon.start(&mut Listener::from(listener)).map_err(backend)?;
    // All threads are started and none has read a message: the VMM gets its end of the connection
    // only after this.
    seccomp::apply(Role::Server)?;
    nix::unistd::write(&ready, &[1]).map_err(ServeError::Ready)?;
    drop(ready);
    match daemon.wait() {
        // The VMM has exited, or has closed the connection.
        Ok(()) | Err(vhost_user_backend::Error::HandleRequest(_)) => Ok(()),
        Err(e) => Err(backend(e)),
    }
}
