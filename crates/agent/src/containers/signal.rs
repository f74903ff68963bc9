//! SignalProcess and ResizeTty.

use nix::errno::Errno;

use crate::agent::Agent;
use crate::error::{Doing, Error, Result};

/// SIGRTMAX of Linux.
const MAX_SIGNAL: u32 = 64;
pub(super) const SIGKILL: u32 = 9;

pub fn signal(agent: &Agent, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
    if signal > MAX_SIGNAL {
        return Err(Error::invalid("signal", format!("{signal} is not one")));
    }
    let state = agent.lock();
    let process = state.process(id, exec_id)?;
    if all {
        let Some(cgroup) = &state.container(id)?.parts.cgroup else { return Ok(()) };
        if signal == SIGKILL {
            return cgroup.kill();
        }
        // A process that is just being made may be missed, as with every such loop.
        for pid in cgroup.processes() {
            send(pid, signal)?;
        }
        return Ok(());
    }
    if process.is_ended() {
        return Err(Error::Precondition("the process has ended".to_owned()));
    }
    if !exec_id.is_empty() && signal == SIGKILL {
        // A command is the leader of a session: one that is given up takes along what it started.
        send(-process.pid, signal)?;
    }
    send(process.pid, signal)
}

/// The pid cannot have been given to another process: ours are reaped under the same lock that
/// says whether they have ended. Real-time signals have no name in nix, so the number is used.
fn send(pid: i32, signal: u32) -> Result<()> {
    match crate::oci::raw_kill(pid, signal as i32) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).doing(|| format!("send signal {signal} to process {pid}")),
    }
}
