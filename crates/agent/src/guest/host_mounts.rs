//! The host's mount namespace, for an agent without a VM. The agent's own holds nothing of the host
//! but `/dev` and cgroups: neither does it keep the host from unmounting something, nor can a path
//! of its own be taken for one of the host.

use std::fs::{self, File};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns, unshare};

use super::tree::Tree;
use super::volumes::open_dir;
use crate::error::{Doing, Error, Result};

#[derive(Debug)]
pub struct HostMounts(OwnedFd);

impl HostMounts {
    pub fn new(namespace: OwnedFd) -> Self {
        Self(namespace)
    }

    /// Runs `work` where paths are the host's. Blocks.
    fn within<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let enter = || {
            // Who enters a mount namespace must share its root and folder with no other thread.
            unshare(CloneFlags::CLONE_FS)?;
            setns(self.0.as_fd(), CloneFlags::CLONE_NEWNS)
        };
        let result = thread::scope(|scope| {
            // A thread of its own, which ends there.
            let inside = thread::Builder::new().name("host".into()).spawn_scoped(scope, || {
                enter().doing(|| "enter the host's mount namespace".to_owned())?;
                work()
            });
            inside.map(|thread| thread.join())
        });
        match result.doing(|| "start a thread".to_owned())? {
            Ok(result) => result,
            Err(_panic) => Err(Error::Helper {
                doing: "look at the host's files",
                why: "the thread panicked".to_owned(),
            }),
        }
    }

    /// A copy of what is at `path` with all that is mounted below, still exchanging mounts with the
    /// host as the host has it; whether it is a folder.
    pub fn copy(&self, path: &Path) -> Result<(Tree, bool)> {
        let what = || format!("open {} of the host", path.display());
        if !path.is_absolute() {
            return Err(Error::invalid("path of the host", format!("{path:?} is not absolute")));
        }
        self.within(|| {
            let directory = fs::metadata(path).doing(what)?.is_dir();
            let place = if directory { open_dir(path)? } else { open_file(path).doing(what)? };
            Ok((Tree::copy(place.as_fd()).doing(what)?, directory))
        })
    }

    pub fn open(&self, path: &Path) -> Result<File> {
        self.within(|| File::open(path).doing(|| format!("open {} of the host", path.display())))
    }
}

fn open_file(path: &Path) -> nix::Result<OwnedFd> {
    use nix::fcntl::{OFlag, open};
    open(path, OFlag::O_PATH | OFlag::O_CLOEXEC, nix::sys::stat::Mode::empty())
}
