//! Reaps exited children.
#![allow(unsafe_code)] // waitpid(2): nix has no real-time signals, and drops the status of a child ended by one

use std::sync::Arc;

use nix::errno::Errno;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::agent::Agent;
pub use crate::exit_status::ExitStatus;

/// Registers for SIGCHLD; called before the first child is spawned.
pub fn watch() -> std::io::Result<Signal> {
    signal(SignalKind::child())
}

/// Reaps one exited child, if there is one.
fn reap_one() -> nix::Result<Option<(i32, ExitStatus)>> {
    let mut status = 0;
    // SAFETY: the kernel writes one int, to a variable that lives until the call returns.
    let pid = unsafe { libc::waitpid(-1, &raw mut status, libc::WNOHANG) };
    match Errno::result(pid)? {
        0 => Ok(None),
        pid if libc::WIFSIGNALED(status) => {
            Ok(Some((pid, ExitStatus::Signaled(libc::WTERMSIG(status)))))
        }
        pid => Ok(Some((pid, ExitStatus::Exited(libc::WEXITSTATUS(status))))),
    }
}

/// Reaps children; never returns.
pub async fn run(mut sigchld: Signal, agent: Arc<Agent>) {
    loop {
        loop {
            match reap_one() {
                Ok(Some((pid, sigchld))) => agent.child_exited(pid, sigchld),
                Ok(None) => break,
                Err(Errno::EINTR) => {}
                // ECHILD: no children.
                Err(_) => break,
            }
        }
        if sigchld.recv().await.is_none() {
            return;
        }
    }
}
