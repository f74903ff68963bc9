//! Collects ended children: PID 1's foremost duty.
#![allow(unsafe_code)] // waitpid(2) with any signal: nix names no real-time ones, and loses the status

use std::sync::Arc;

use nix::errno::Errno;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::agent::Agent;

/// How a child has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    Exited(i32),
    Signaled(i32),
}

impl Ended {
    /// Whether SIGKILL ended it, which is what the OOM killer sends.
    pub fn by_kill(self) -> bool {
        self == Self::Signaled(libc::SIGKILL)
    }
}

/// Has to be made before the first child.
pub fn children() -> std::io::Result<Signal> {
    signal(SignalKind::child())
}

/// One child that has ended, if there is one.
fn next() -> nix::Result<Option<(i32, Ended)>> {
    let mut status = 0;
    // SAFETY: the kernel writes one int, to a variable that lives until the call returns.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    match Errno::result(pid)? {
        0 => Ok(None),
        pid if libc::WIFSIGNALED(status) => {
            Ok(Some((pid, Ended::Signaled(libc::WTERMSIG(status)))))
        }
        pid => Ok(Some((pid, Ended::Exited(libc::WEXITSTATUS(status))))),
    }
}

/// Reaps for ever.
pub async fn run(mut ended: Signal, agent: Arc<Agent>) {
    loop {
        loop {
            match next() {
                Ok(Some((pid, ended))) => agent.child_ended(pid, ended),
                Ok(None) => break,
                Err(Errno::EINTR) => {}
                // ECHILD: none at all.
                Err(_) => break,
            }
        }
        if ended.recv().await.is_none() {
            return;
        }
    }
}
