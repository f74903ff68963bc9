//! Access to the host's mount namespace for the agent of a pod without a VM. The agent's own mount
//! namespace has only `/dev` and cgroups of the host, so it neither keeps host mounts busy nor
//! resolves a path of its own as one of the host.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::tree::Tree;
use super::volumes::open_dir;
use crate::error::{Context, Error, Result};

#[derive(Debug)]
pub struct HostMounts(OwnedFd);

impl HostMounts {
    pub fn new(namespace: OwnedFd) -> Self {
        Self(namespace)
    }

    /// Runs `work` on a thread in the host's mount namespace. Blocks.
    fn run_in_namespace<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let join_namespace = || {
            // setns(CLONE_NEWNS) fails while the fs_struct is shared with another thread.
            unshare(CloneFlags::CLONE_FS)?;
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNS)
        };
        let result = thread::scope(|scope| {
            // A new thread, which ends in that namespace.
            let spawned = thread::Builder::new().name("host".into()).spawn_scoped(scope, || {
                join_namespace().context(|| "join the host's mount namespace".to_owned())?;
                work()
            });
            spawned.map(|thread| thread.join())
        });
        match result.context(|| "start a thread".to_owned())? {
            Ok(result) => result,
            Err(_panic) => Err(Error::Helper {
                operation: "access the host's files",
                reason: "the thread panicked".to_owned(),
            }),
        }
    }

    /// Clones the mount tree at `path` of the host, with its mounts below and its propagation.
    /// Returns whether it is a directory.
    pub fn copy(&self, path: &Path) -> Result<(Tree, bool)> {
        let what = || format!("open host path {}", path.display());
        if !path.is_absolute() {
            return Err(Error::invalid("host path", format!("{path:?} is not absolute")));
        }
        self.run_in_namespace(|| {
            let directory = fs::metadata(path).context(what)?.is_dir();
            let place = if directory { open_dir(path)? } else { open_file(path).context(what)? };
            Ok((Tree::copy(place.as_fd()).context(what)?, directory))
        })
    }

    pub fn open(&self, path: &Path) -> Result<File> {
        self.run_in_namespace(|| {
            File::open(path).context(|| format!("open host path {}", path.display()))
        })
    }
}

fn open_file(path: &Path) -> nix::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
}
