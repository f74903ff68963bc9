//! Helper `pod-pid`: creates the PID namespace that containers share in mode POD. Its PID 1 reaps
//! orphans, as a pause container does.
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

/// Creates the namespace, owned by the user namespace if there is one; returns the pid of its PID
/// 1.
pub async fn make(userns: Option<PathBuf>, spawned: impl FnOnce(i32)) -> Result<i32> {
    Ok(helper::run(VERB, Job { userns }, Streams::null(), Vec::new(), spawned).await?.pid)
}

pub(super) fn main(job: Job, start: OwnedFd) -> std::result::Result<i32, String> {
    helper::make_untraceable()?;
    // The exit of this PID 1 would kill all containers in the namespace. Set before setns: it needs
    // CAP_SYS_RESOURCE of the initial user namespace.
    let _ = std::fs::write("/proc/self/oom_score_adj", "-998");
    if let Some(path) = &job.userns {
        let userns = File::open(path).map_err(|error| format!("user namespace: {error}"))?;
        setns(userns, CloneFlags::CLONE_NEWUSER)
            .map_err(|error| format!("user namespace: {error}"))?;
    }
    unshare(CloneFlags::CLONE_NEWPID).map_err(|error| format!("new PID namespace: {error}"))?;
    // SAFETY: this process has one thread, so the child may use all of its state.
    match unsafe { fork() }.map_err(|error| format!("fork: {error}"))? {
        ForkResult::Parent { child } => Ok(child.as_raw()),
        ForkResult::Child => {
            drop(start);
            // With SIGCHLD ignored the kernel reaps; PID 1 ignores other signals by default.
            let ignore = SigAction::new(SigHandler::SigIgn, SaFlags::SA_NOCLDWAIT, SigSet::empty());
            // SAFETY: ignoring a signal installs no handler.
            let _ = unsafe { sigaction(Signal::SIGCHLD, &ignore) };
            // The agent's descriptors would keep its pipes open.
            // SAFETY: nothing in this process uses a descriptor after this.
            unsafe { libc::close_range(0, libc::c_uint::MAX, 0) };
            loop {
                nix::unistd::pause();
            }
        }
    }
}
