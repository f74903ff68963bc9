//! SignalProcess and ResizeTty.

use std::time::Duration;

use nix::errno::Errno;

use super::process::{Process, unix_time_ns};
use crate::agent::Agent;
use crate::error::{Doing, Error, Result};

/// SIGRTMAX of Linux.
const MAX_SIGNAL: u32 = 64;
pub(super) const SIGKILL: u32 = 9;

/// From a program's start until it has set up its signals, if it ever does.
const SETTING_UP: Duration = Duration::from_secs(5);
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// Looks in a row that must find the signal blocked: fork(2) and its like in libraries block all
/// signals for a moment, and what a PID 1 gets in that moment is dropped afterwards.
const BLOCKED_LOOKS: usize = 3;

/// Waits until PID 1 of a PID namespace, started a moment ago, handles, ignores or waits for a
/// signal: before that the kernel would drop it. Any other process is not waited for.
pub async fn until_set_up(agent: &Agent, id: &str, exec_id: &str, signal: u32) {
    let mut blocked = 0;
    loop {
        {
            let state = agent.lock();
            let Ok(process) = state.process(id, exec_id) else { return };
            if process.is_ended() || !is_young(process) {
                return;
            }
            // The pid is still this process': it would be reaped under the same lock.
            let status = std::fs::read_to_string(format!("/proc/{}/status", process.pid));
            match status.ok().and_then(|status| disposition(&status, signal)) {
                Some(Disposition::Dropped) => blocked = 0,
                Some(Disposition::Blocked) if blocked + 1 < BLOCKED_LOOKS => blocked += 1,
                _ => return,
            }
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn is_young(process: &Process) -> bool {
    let age = unix_time_ns().saturating_sub(process.started_unix_ns);
    process.started_unix_ns > 0 && u128::try_from(age).is_ok_and(|age| age < SETTING_UP.as_nanos())
}

/// What becomes of a signal that is sent now.
#[derive(Debug, PartialEq, Eq)]
enum Disposition {
    Taken,
    Blocked,
    /// To PID 1 of a PID namespace, by the kernel.
    Dropped,
}

/// Parses `/proc/<pid>/status` (proc_pid_status(5)); None if it is not understood.
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
    fn a_signal_is_dropped_only_by_a_pid_1_that_has_not_set_it_up() {
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
