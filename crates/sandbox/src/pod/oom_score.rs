//! Which pods the host's OOM killer takes first (proc(5), /proc/pid/oom_score_adj): the score of a
//! pod's VMM and file server. They hold the memory of all its containers, and inherit the score of
//! the daemon, which is never to be killed.
//!
//! A kubelet states a score for each container only. Before there is one, the class of the pod (QoS)
//! counts, which stands in the name of its parent cgroup. Nothing is journaled for it: the score
//! follows from the containers, and is set again by the next daemon.

use std::path::Path;

use super::handle::Handle;
use crate::host::blocking;
use crate::host::process::set_oom_score;
use crate::policy::{Container, ContainerPhase, Effect, Pod};

/// Scores of a kubelet's classes (pkg/kubelet/qos/policy.go); a burstable pod's depends on what its
/// containers request, and lies between 2 and 999.
const GUARANTEED: i32 = -997;
const BURSTABLE: i32 = 500;
const BEST_EFFORT: i32 = 1000;
/// A pod that no kubelet made.
const UNKNOWN: i32 = 0;
/// No pod is protected better than this, whatever its containers ask for.
const RANGE: std::ops::RangeInclusive<i32> = GUARANTEED..=BEST_EFFORT;

/// Gives the pod's processes the score that its containers have now. A host that refuses it keeps the
/// score that they have, as the log says.
pub(super) async fn apply(handle: &Handle) {
    if handle.machine.host().is_some() {
        // The agent and its containers have scores of their own.
        return;
    }
    // The one that looks last writes last.
    let _one_at_a_time = handle.scoring.lock().await;
    let pod = handle.pod();
    let processes = pod.ledger.iter().filter_map(|effect| match effect {
        Effect::Vmm { pid, started } | Effect::FileServer { pid, started } => {
            Some((*pid, *started))
        }
        _ => None,
    });
    set(handle, processes.collect(), score(&pod)).await;
}

/// The same for a VMM that is not in the journal yet.
pub(super) async fn apply_to_new(handle: &Handle, pid: u32, started: u64) {
    if handle.machine.host().is_none() {
        set(handle, vec![(pid, started)], score(&handle.pod())).await;
    }
}

async fn set(handle: &Handle, processes: Vec<(u32, u64)>, score: i32) {
    let set = blocking(move || {
        let set = |(pid, started)| set_oom_score(pid, started, score);
        processes.into_iter().map(set).filter_map(Result::err).collect::<Vec<_>>()
    });
    for error in set.await {
        tracing::warn!(pod = handle.id, score, %error, "oom_score_adj of a pod is not set");
    }
}

/// The least of those of the containers that live: killing the pod kills that one too.
fn score(pod: &Pod) -> i32 {
    let lives = |c: &&Container| c.exit.is_none() && c.phase != ContainerPhase::Removing;
    let own = |c: &Container| c.spec.oci.process().as_ref().and_then(|p| p.oom_score_adj());
    let least = pod.containers.values().filter(lives).map(|c| own(c).unwrap_or(UNKNOWN)).min();
    least.unwrap_or_else(|| of_class(&pod.spec.cgroup_parent)).clamp(*RANGE.start(), *RANGE.end())
}

/// `/kubepods/burstable/pod…` with a kubelet's cgroupfs driver, `kubepods-burstable-pod….slice` with
/// systemd's; a guaranteed pod is in `kubepods` itself.
fn of_class(cgroup_parent: &str) -> i32 {
    let mut words = Path::new(cgroup_parent)
        .iter()
        .filter_map(|name| name.to_str())
        .flat_map(|name| name.strip_suffix(".slice").unwrap_or(name).split('-'))
        .skip_while(|word| *word != "kubepods");
    if words.next().is_none() {
        return UNKNOWN;
    }
    words
        .find_map(|word| match word {
            "besteffort" => Some(BEST_EFFORT),
            "burstable" => Some(BURSTABLE),
            _ => None,
        })
        .unwrap_or(GUARANTEED)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ContainerSpec, ExitView};
    use crate::policy::tests as samples;

    #[test]
    fn a_pods_class_is_read_from_its_parent_cgroup() {
        for (parent, score) in [
            ("/kubepods/besteffort/pod1-2", 1000),
            ("/node/kubepods/burstable/pod1-2", 500),
            ("/kubepods/pod1-2", -997),
            ("kubepods-besteffort-pod1_2.slice", 1000),
            ("/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1_2.slice", 500),
            ("kubepods-pod1_2.slice", -997),
            ("", 0),
            ("/burstable/besteffort", 0),
        ] {
            assert_eq!(of_class(parent), score, "{parent}");
        }
    }

    fn with(pod: &mut Pod, id: &str, score: Option<i32>) {
        let mut container = samples::container(id);
        let mut process = oci_spec::runtime::Process::default();
        process.set_oom_score_adj(score);
        let mut spec: ContainerSpec = (*container.spec).clone();
        spec.oci.set_process(Some(process));
        container.spec = spec.into();
        pod.containers.insert(id.to_owned(), container);
    }

    #[test]
    fn a_pod_has_the_least_score_of_its_living_containers() {
        let mut pod = samples::pod();
        with(&mut pod, "a", Some(990));
        with(&mut pod, "b", Some(300));
        assert_eq!(score(&pod), 300);
        let at = std::time::SystemTime::UNIX_EPOCH;
        let (reason, message) = (String::new(), String::new());
        let exit = ExitView { code: 0, oom_killed: false, at, reason, message };
        pod.containers.get_mut("b").unwrap().exit = Some(exit);
        assert_eq!(score(&pod), 990);
        with(&mut pod, "c", None);
        assert_eq!(score(&pod), 0);
        with(&mut pod, "d", Some(-1000));
        assert_eq!(score(&pod), -997, "no pod is out of the OOM killer's sight");
    }
}
