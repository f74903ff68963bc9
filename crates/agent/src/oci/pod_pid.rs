//! Helper `pod-pid`: the PID namespace that containers share in mode POD, with a PID 1 of its own
//! that reaps orphans and does nothing else.
#![allow(unsafe_code)] // fork and sigaction

use std::fs::File;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, fork};
use serde::{Deserialize, Serialize};

use super::helper::{self, Streams};
use crate::error::Result;

pub(super) const VERB: &str = "@pod-pid";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {
    userns: Option<PathBuf>,
}

/// Makes the namespace, which belongs to the user namespace; it lives as long as the process whose
/// pid is returned.
pub async fn make(userns: Option<PathBuf>, spawned: impl FnOnce(i32)) -> Result<i32> {
    Ok(helper::run(VERB, Job { userns }, Streams::null(), None, spawned).await?.pid)
}

pub(super) fn main(job: Job, start: OwnedFd) -> std::result::Result<i32, String> {
    // Its end would be the end of all containers that share the namespace. Inside of a user
    // namespace it could not ask for this any more.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-998");
    if let Some(path) = &job.userns {
        let userns = File::open(path).map_err(|error| format!("user namespace: {error}"))?;
        setns(userns, CloneFlags::CLONE_NEWUSER)
            .map_err(|error| format!("user namespace: {error}"))?;
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(|error| format!("new PID namespace: {error}"))?;
    // SAFETY: this process has one thread, so the child may go on using everything.
    match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            drop(start);
            // Ignoring SIGCHLD makes the kernel reap; PID 1 ignores all other signals by default.
            let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::SA_NOCLDWAIT, SigSet::empty());
            // SAFETY: ignoring a signal installs no handler.
            let _ = unsafe { sigaction(Signal::SIGCHLD, &ignore) };
            // Nothing of the agent is needed any more: its descriptors would keep pipes open.
            // SAFETY: nothing in this process uses a descriptor after this.
            unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
            loop {
                nix::unistd::pause();
            }
        }
    }
}
