//! Collects ended children: PID 1's foremost duty.

use std::sync::Arc;

use nix::errno::Errno;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::agent::Agent;

/// Has to be made before the first child.
pub fn children() -> std::io::Result<Signal> {
    signal(SignalKind::child())
}

/// Reaps for ever.
pub async fn run(mut ended: Signal, agent: Arc<Agent>) {
    loop {
        loop {
            match waitpid(Pid::from_raw(-1), Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => break,
                Ok(status) => {
                    if let Some(pid) = status.pid() {
                        agent.child_ended(pid.as_raw(), status);
                    }
                }
                Err(Errno::EINTR) => {}
                // A real-time signal that nix has no name for: such a child is reaped, its status
                // is not told.
                Err(error) => tracing::warn!(%error, "cannot read a child's status"),
            }
        }
        if ended.recv().await.is_none() {
            return;
        }
    }
}
