//! Helper `pod-pid`: the PID namespace that containers share in mode POD, with a PID 1 of its own
//! that reaps orphans and does nothing else.
#![allow(unsafe_code)] // fork and sigaction

use std::os::fd::OwnedFd;

use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use nix::unistd::{ForkResult, fork};
use serde::{Deserialize, Serialize};

use super::helper::{self, Streams};
use crate::error::Result;

pub(super) const VERB: &str = "@pod-pid";

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Job {}

/// Makes the namespace; it lives as long as the process whose pid is returned.
pub async fn make(spawned: impl FnOnce(i32)) -> Result<i32> {
    Ok(helper::run(VERB, Job {}, Streams::null(), None, spawned).await?.pid)
}

pub(super) fn main(_: Job, start: OwnedFd) -> std::result::Result<i32, String> {
    unshare(CloneFlags::CLONE_NEWPID).map_err(|error| format!("new PID namespace: {error}"))?;
    // SAFETY: this process has one thread, so the child may go on using everything.
    match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            drop(start);
            // Its end would be the end of all containers that share it.
            let _ = std::fs::write("/proc/self/oom_score_adj", "-998");
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
