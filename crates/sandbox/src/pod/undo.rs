//! Undo of the effects in a ledger: for a failed start, a stop, a removal and after a crash.

use std::fs;
use std::path::Path;
use std::time::Duration;

use super::handle::Handle;
use super::run_pod::network_failed;
use crate::error::Error;
use crate::host::process::Process;
use crate::host::{blocking, cgroup, ignore_not_found};
use crate::policy::{Change, Effect};

/// Longest wait for the exit of a killed VMM, which first frees its memory.
const KILL_LIMIT: Duration = Duration::from_secs(15);

/// Undoes effects in reverse order; continues after failures and reports them all. Returns the
/// changes for the undone effects.
pub(super) async fn undo(handle: &Handle, all: bool) -> (Vec<Change>, Result<(), Error>) {
    let pod = handle.pod();
    let (mut done, mut failures) = (Vec::new(), Vec::new());
    for effect in pod.to_undo(all) {
        let result = match &effect {
            Effect::Network => {
                let detached = async {
                    let detached = handle.node.network.detach(&pod.id, &pod.spec).await;
                    detached.map_err(|e| network_failed("detach", e))
                };
                handle.node.failpoints.wrap(failpoint_name(&effect), detached).await
            }
            Effect::ContainerFiles { container } => remove_files(handle, container).await,
            other => handle.node.failpoints.wrap(failpoint_name(other), undo_on_host(other)).await,
        };
        match result {
            Ok(()) => done.push(Change::Undone(effect)),
            Err(error) => {
                tracing::error!(pod = pod.id, ?effect, %error, "cannot undo an effect");
                failures.push(error);
            }
        }
    }
    (done, combine_errors(failures))
}

fn failpoint_name(effect: &Effect) -> &'static str {
    match effect {
        Effect::StateDir { .. } => "host: remove the state directory",
        Effect::Network => "host: detach from the network",
        Effect::Cgroup { .. } => "host: remove the cgroup",
        Effect::Vmm { .. } => "host: kill the VMM",
        Effect::ScratchDisk { .. } => "host: remove the scratch disk",
        Effect::FileServer { .. } => "host: kill the file server",
        Effect::ContainerFiles { .. } => "host: remove a container's files",
    }
}

/// Undoes effects that need no port.
async fn undo_on_host(effect: &Effect) -> Result<(), Error> {
    match effect {
        Effect::Vmm { pid, started } | Effect::FileServer { pid, started } => {
            let failed = |e| Error::io(format!("kill process {pid}"), e);
            match Process::find(*pid, *started).map_err(failed)? {
                Some(process) => process.kill_and_wait(KILL_LIMIT).await.map_err(failed),
                None => Ok(()),
            }
        }
        Effect::Cgroup { leaf, parents } => cgroup::remove(leaf, parents)
            .await
            .map_err(|e| Error::io(format!("remove cgroup {}", leaf.display()), e)),
        Effect::StateDir { path } => {
            let path = path.clone();
            blocking(move || {
                ignore_not_found(fs::remove_dir_all(&path))
                    .map_err(|e| Error::io(format!("remove {}", path.display()), e))
            })
            .await
        }
        Effect::ScratchDisk { path } => {
            let path = path.clone();
            blocking(move || {
                ignore_not_found(fs::remove_file(&path))
                    .map_err(|e| Error::io(format!("remove {}", path.display()), e))
            })
            .await
        }
        Effect::Network | Effect::ContainerFiles { .. } => Ok(()),
    }
}

/// Removes a container's files in the pod's directory.
pub(super) async fn remove_files(handle: &Handle, container: &str) -> Result<(), Error> {
    let paths = &handle.paths;
    let files = [paths.scratch(container), paths.sidecar(container)];
    let layer = paths.layer(container);
    let removed = blocking(move || {
        let failed = |path: &Path, e| Error::io(format!("remove {}", path.display()), e);
        for path in &files {
            ignore_not_found(fs::remove_file(path)).map_err(|e| failed(path, e))?;
        }
        ignore_not_found(fs::remove_dir_all(&layer)).map_err(|e| failed(&layer, e))
    });
    handle.node.failpoints.wrap("host: remove a container's files", removed).await
}

/// Combines errors into one.
pub(super) fn combine_errors(mut failures: Vec<Error>) -> Result<(), Error> {
    match failures.len() {
        0 => Ok(()),
        1 => Err(failures.remove(0)),
        _ => {
            let texts: Vec<_> = failures.iter().map(Error::to_string).collect();
            Err(Error::Internal(anyhow::anyhow!(texts.join("; "))))
        }
    }
}
