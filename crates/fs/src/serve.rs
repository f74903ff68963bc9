//! The server: FUSE over vhost-user, by the `virtiofsd` crate, for our file system
//! ([`crate::passthrough`]).
//!
//! What that means for a container:
//! - Data is cached in the guest until the file's size or time is another one, names and attributes
//!   for a second: shared mappings work, and what the host changes is seen within that second.
//! - Locks are the guest's own: they hold between the pod's processes, not against the host's or
//!   another pod's. Passing them on would let one guest hold a lock that another waits for, in a
//!   server that answers one request after the other.
//! - O_DIRECT, xattrs, sparse files and copy_file_range reach the host's file system. POSIX ACLs do
//!   not: the guest's kernel would not know what they allow.
//! - All shares are one file system, with what the host has mounted below them; inode numbers are
//!   made unique.

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
    /// Of libraries whose errors cannot be passed on as they are.
    #[error("vhost-user: {message}")]
    Backend { message: String },
    #[error("cannot report being ready")]
    Ready(#[source] nix::Error),
}

fn backend(error: impl std::fmt::Display) -> ServeError {
    ServeError::Backend { message: error.to_string() }
}

/// Serves the one connection that waits at `listener`, until it ends. `ready` is written to when
/// every right is gone and the first message can come.
///
/// To be called by the process' only thread.
pub fn run(listener: UnixListener, ready: OwnedFd) -> Result<(), ServeError> {
    // A server that lost a thread would leave the guest waiting; one that is gone is noticed.
    std::panic::set_hook(Box::new(|info| {
        eprintln!("nacelle-fs: the server is broken: {info}");
        std::process::exit(101);
    }));
    jail::open_files()?;
    let descriptors = jail::own_descriptors()?;
    jail::keep(&jail::SERVER)?;
    let root = CString::new(crate::SHARES).unwrap_or_default();
    let fs = Passthrough::new(root, descriptors).map_err(ServeError::FileSystem)?;
    let served = VhostUserFsBackendBuilder::default().build(fs).map_err(backend)?;
    let memory = GuestMemoryAtomic::new(GuestMemoryMmap::new());
    let name = "messages".to_owned();
    let mut daemon =
        VhostUserDaemon::new(name, Arc::new(Backend(served)), memory).map_err(backend)?;
    daemon.start(&mut Listener::from(listener)).map_err(backend)?;
    // All threads are there, none has seen a byte: the VMM is given its end of the connection only
    // after this.
    seccomp::apply(Role::Server)?;
    nix::unistd::write(&ready, &[1]).map_err(ServeError::Ready)?;
    drop(ready);
    match daemon.wait() {
        // The VMM has ended, or has hung up on us.
        Ok(()) | Err(vhost_user_backend::Error::HandleRequest(_)) => Ok(()),
        Err(e) => Err(backend(e)),
    }
}
