//! What a pod costs the host: processes, cgroups, files. Every function here can be repeated; the
//! undoing ones succeed when there is nothing left to undo.

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

/// Turns "was not there" into success.
pub(crate) fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Makes what was renamed, made or removed in a folder durable.
pub(crate) fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Runs blocking work off the runtime's threads. Not for paths that a user chose: [`pool::Pool`].
pub(crate) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(value) => value,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // Only at the runtime's end: this task is about to be dropped as well.
            Err(_) => std::future::pending().await,
        },
    }
}
