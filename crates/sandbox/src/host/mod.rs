//! Resources of a pod on the host: processes, cgroups, files. Every function here is idempotent;
//! undo functions succeed if there is nothing to undo.

pub(crate) mod cgroup;
pub(crate) mod empty_dir;
pub(crate) mod etc;
pub(crate) mod mounts;
pub(crate) mod pool;
pub(crate) mod process;
pub(crate) mod scratch;
pub(crate) mod share;
pub(crate) mod sockets;
pub(crate) mod volumes;
pub(crate) mod watch;

use std::fs::File;
use std::io;
use std::path::Path;

/// Maps NotFound to success.
pub(crate) fn ignore_not_found(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// fsync of a directory: makes renames, creations and removals in it durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Runs blocking work on the runtime's blocking threads. Not for user-chosen paths: use
/// [`pool::BlockingPool`].
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime shuts down: this task is dropped as well.
            Err(_) => std::future::pending().await,
        },
    }
}
