//! Cause of the exit of a pod's VMM, or of a host pod's agent.

use std::path::Path;

use super::handle::Handle;
use super::message::ExitCause;
use crate::host::blocking;
use crate::host::cgroup::{self, OomKill};
use crate::machine::Machine;
use crate::observe::{DeathCause, Measured, OomVictim};
use crate::policy::Phase;
use crate::vmm;

const MIB: u64 = 1 << 20;

impl ExitCause {
    /// Must come before the change: a pod that is no longer ready was being stopped.
    pub(super) fn measure(&self, handle: &Handle) {
        if handle.pod().phase != Phase::Ready {
            return;
        }
        let observer = &handle.node.observer;
        observer.measured(Measured::VmmDeath { cause: self.cause });
        if self.cause == DeathCause::OutOfMemory {
            observer.measured(Measured::OomKill { victim: OomVictim::Vmm });
        }
    }
}

/// For a process that has exited. The VMM's status file has the reason; a killed VMM wrote none,
/// and the kernel's counters show whether the OOM killer did it.
pub(super) async fn find(handle: &Handle) -> ExitCause {
    let (status, root) = (handle.paths.status.clone(), handle.node.cgroup_root.clone());
    let pod = handle.pod();
    let leaf = pod.cgroup().map(Path::to_owned);
    let is_vm = matches!(handle.machine, Machine::Vm(_));
    let inspected = blocking(move || match is_vm.then(|| vmm::exit_reason(&status)).flatten() {
        Some((cause, reason)) => Err(ExitCause { reason, cause }),
        None => Ok(leaf.map(|leaf| cgroup::oom_kill(&root, &leaf)).transpose()),
    });
    match inspected.await {
        Err(cause) => return cause,
        Ok(Ok(Some(Some(kill)))) => {
            let vm_mib = pod.spec.memory_mib.unwrap_or(handle.node.config.default_memory_mib);
            let reason = out_of_memory(is_vm.then_some(vm_mib), kill);
            return ExitCause { reason, cause: DeathCause::OutOfMemory };
        }
        Ok(Ok(_)) => {}
        Ok(Err(error)) => {
            tracing::warn!(pod = handle.id, %error, "cannot read memory.events");
        }
    }
    let (cause, reason) = match is_vm {
        true => (DeathCause::Killed, "the VMM was killed (it left no status)"),
        false => (DeathCause::HostAgent, "the pod's agent on this host has ended"),
    };
    ExitCause { reason: reason.to_owned(), cause }
}

/// `vm_mib`: memory of the pod's VM, if it has one.
fn out_of_memory(vm_mib: Option<u32>, kill: OomKill) -> String {
    let victim = if vm_mib.is_some() { "VMM" } else { "agent on this host" };
    let Some((cgroup, limit)) = kill.limit else {
        return format!("the host ran out of memory and its OOM killer ended the pod's {victim}");
    };
    let (limit_mib, cgroup) = (limit / MIB, cgroup.display());
    let what = format!(
        "the pod reached its memory limit of {limit_mib} MiB (memory.max of cgroup {cgroup}) and \
         the OOM killer ended its {victim}"
    );
    let Some(vm_mib) = vm_mib.map(u64::from) else { return what };
    match limit_mib.checked_sub(vm_mib).filter(|left| *left > 0) {
        None => format!(
            "{what}: the limit has no room for its VM of {vm_mib} MiB; state a memory overhead in \
             the pod's RuntimeClass, or a higher one"
        ),
        Some(left) => format!(
            "{what}: beside its VM of {vm_mib} MiB the limit has room for {left} MiB; state a \
             memory overhead in the pod's RuntimeClass, or a higher one"
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_smaller_than_the_vm_is_reported_with_the_missing_overhead() {
        let kill = |limit: Option<u64>| OomKill { limit: limit.map(|l| ("/podx".into(), l * MIB)) };
        let text = out_of_memory(Some(192), kill(Some(64)));
        for part in ["64 MiB", "/podx", "VMM", "192 MiB", "overhead", "no room"] {
            assert!(text.contains(part), "{part}: {text}");
        }
        let text = out_of_memory(Some(192), kill(Some(200)));
        assert!(text.contains("room for 8 MiB") && text.contains("overhead"), "{text}");
        let text = out_of_memory(None, kill(Some(64)));
        assert!(text.contains("agent") && !text.contains("VM"), "{text}");
        let text = out_of_memory(Some(192), kill(None));
        assert!(text.contains("the host ran out of memory"), "{text}");
    }
}
