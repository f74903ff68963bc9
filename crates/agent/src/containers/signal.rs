//! SignalProcess.

use std::time::Duration;

use nix::errno::Errno;

use super::process::{Process, unix_time_ns};
use crate::agent::Agent;
use crate::error::{Context, Error, Result};

/// SIGRTMAX of Linux.
const MAX_SIGNAL: u32 = 64;
pub(super) const SIGKILL: u32 = 9;

/// Time after the start in which a program may set up its signal handlers.
const HANDLER_TIMEOUT: Duration = Duration::from_secs(5);
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// Polls in a row that must find the signal blocked: fork(3) and some libraries block all signals
/// for a moment, and a signal to PID 1 in that moment is dropped afterwards.
const BLOCKED_POLLS: usize = 3;

/// Waits until a recently started PID 1 of a PID namespace handles, ignores or blocks a signal:
/// before that the kernel drops it. Returns at once for other processes.
pub async fn wait_for_handler(agent: &Agent, id: &str, exec_id: &str, signal: u32) {
    let mut blocked = 0;
    loop {
        {
            let state = agent.lock();
            let Ok(process) = state.process(id, exec_id) else { return };
            if process.is_stopped() || !started_recently(process) {
                return;
            }
            // The pid cannot have been reused: children are reaped under the same lock.
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid));
            match status.ok().and_then(|status| disposition(&status, signal)) {
                Some(Disposition::Dropped) => blocked = 0,
                Some(Disposition::Blocked) if blocked + 1 < BLOCKED_POLLS => blocked += 1,
                _ => return,
            }
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}

fn started_recently(process: &Process) -> bool {
    let age = unix_time_ns().saturating_sub(process.started_unix_ns);
    process.started_unix_ns > 0
        && u128::try_from(age).is_ok_and(|age| age < HANDLER_TIMEOUT.as_nanos())
}

/// Effect of a signal that is sent now.
#[derive(Debug, PartialEq, Eq)]
enum Disposition {
    Taken,
    Blocked,
    /// By the kernel: PID 1 of a PID namespace without a handler.
    Dropped,
}

/// Parses `/proc/<pid>/status` (proc_pid_status(5)); None if a field is missing.
fn disposition(status: &str, signal: u32) -> Option<Disposition> {
    let field = |name: &str| {
        status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
    };
    let bit = 1u64 << signal.checked_sub(1).filter(|bit| *bit < u64::BITS)?;
    let holds = |name: &str| Some(u64::from_str_radix(field(name)?, 16).ok()? & bit != 0);
    let innermost = field("NSpid")?.split_whitespace().next_back()?;
    if innermost != "1" || signal == SIGKILL || holds("SigCgt")? || holds("SigIgn")? {
        return Some(Disposition::Taken);
    }
    Some(if holds("SigBlk")? { Disposition::Blocked } else { Disposition::Dropped })
}

pub fn signal(agent: &Agent, id: &str, exec_id: &str, signal: u32, all: bool) -> Result<()> {
    if signal > MAX_SIGNAL {
        return Err(Error::invalid("signal", format!("{signal} is not a signal number")));
    }
    let state = agent.lock();
    let process = state.process(id, exec_id)?;
    if all {
        let Some(cgroup) = &state.container(id)?.parts.cgroup else { return Ok(()) };
        if signal == SIGKILL {
            cgroup.kill()?;
            return cgroup.set_frozen(false);
        }
        // A process that is forked during the loop may be missed.
        for pid in cgroup.processes() {
            send(pid, signal)?;
        }
        return Ok(());
    }
    if process.is_stopped() {
        return Err(Error::Precondition("the process has ended".to_owned()));
    }
    if !exec_id.is_empty() && signal == SIGKILL {
        // An exec leads a session: its process group is killed with it.
        send(-process.pid, signal)?;
    }
    send(process.pid, signal)?;
    // As runc does: processes of the container that outlive its init process must not stay frozen.
    if exec_id.is_empty()
        && signal == SIGKILL
        && let Some(cgroup) = &state.container(id)?.parts.cgroup
    {
        return cgroup.set_frozen(false);
    }
    Ok(())
}

/// The pid cannot have been reused: children are reaped under the lock that the caller holds. A
/// number, as nix has no real-time signals.
fn send(pid: i32, signal: u32) -> Result<()> {
    match crate::oci::raw_kill(pid, signal as i32) {
        Ok(()) | Err(Errno::ESRCH) => Ok(()),
        Err(error) => Err(error).context(|| format!("send signal {signal} to process {pid}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn status(pid: &str, blocked: &str, ignored: &str, caught: &str) -> String {
        format!(
            "Name:\tsh\nNSpid:\t4711\t{pid}\nSigPnd:\t0000000000000000\nSigBlk:\t{blocked}\n\
             SigIgn:\t{ignored}\nSigCgt:\t{caught}\n"
        )
    }

    #[test]
    fn a_signal_is_dropped_only_by_a_pid_1_without_a_handler() {
        use Disposition::{Blocked, Dropped, Taken};
        let (none, term) = ("0000000000000000", "0000000000004000");
        for (pid, blocked, ignored, caught, wanted) in [
            ("1", none, none, none, Dropped),
            ("1", none, none, "0000000000002000", Dropped),
            ("1", none, none, term, Taken),
            ("1", none, term, none, Taken),
            ("1", term, none, none, Blocked),
            ("17", none, none, none, Taken),
        ] {
            let text = status(pid, blocked, ignored, caught);
            assert_eq!(disposition(&text, 15), Some(wanted), "{text}");
        }
        assert_eq!(disposition(&status("1", none, none, none), SIGKILL), Some(Taken));
        assert_eq!(disposition(&status("1", none, none, none), 0), None);
        assert_eq!(disposition("Name:\tsh\n", 15), None);
    }
}
