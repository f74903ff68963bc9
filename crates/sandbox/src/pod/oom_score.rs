//! oom_score_adj (proc(5)) of a pod's VMM and file server, so that the host's OOM killer prefers
//! the right pods. These processes hold the memory of all containers, and would inherit the score
//! of the daemon, which must not be killed.
//!
//! A kubelet sets a score per container. Without containers the pod's QoS class applies, taken from
//! the name of its parent cgroup. Scores are not journaled: they follow from the containers and are
//! set again by the next daemon.

use std::path::Path;

use super::handle::Handle;
use crate::host::blocking;
use crate::host::process::set_oom_score;
use crate::policy::{Container, ContainerPhase, Effect, Pod};

/// Scores of the QoS classes (pkg/kubelet/qos/policy.go); a burstable pod's score depends on its
/// containers' requests and is between 2 and 999.
const GUARANTEED: i32 = -997;
const BURSTABLE: i32 = 500;
const BEST_EFFORT: i32 = 1000;
/// A pod without a kubelet.
const UNKNOWN: i32 = 0;
/// Bounds for any pod, whatever its containers request.
const RANGE: std::ops::RangeInclusive<i32> = GUARANTEED..=BEST_EFFORT;

/// Sets the score of the pod's processes from its containers. On an error they keep their score,
/// which is logged.
pub(super) async fn apply(handle: &Handle) {
    if handle.machine.host().is_some() {
        // The agent sets the scores of its containers.
        return;
    }
    // Serialized: the last reader of the state writes last.
    let _one_at_a_time = handle.oom_score_lock.lock().await;
    let pod = handle.pod();
    let processes = pod.ledger.iter().filter_map(|effect| match effect {
        Effect::Vmm { pid, started } | Effect::FileServer { pid, started } => {
            Some((*pid, *started))
        }
        _ => None,
    });
    set(handle, processes.collect(), score(&pod)).await;
}

/// [`apply`] for a VMM that is not in the journal yet.
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
        tracing::warn!(pod = handle.id, score, %error, "cannot set oom_score_adj of a pod");
    }
}

/// The lowest score of the running containers: killing the pod kills that one too.
fn score(pod: &Pod) -> i32 {
    let is_running = |c: &&Container| c.exit.is_none() && c.phase != ContainerPhase::Removing;
    let container_score =
        |c: &Container| c.spec.oci.process().as_ref().and_then(|p| p.oom_score_adj());
    let lowest = pod
        .containers
        .values()
        .filter(is_running)
        .map(|c| container_score(c).unwrap_or(UNKNOWN))
        .min();
    lowest
        .unwrap_or_else(|| class_score(&pod.spec.cgroup_parent))
        .clamp(*RANGE.start(), *RANGE.end())
}

/// `/kubepods/burstable/pod…` with the kubelet's cgroupfs driver, `kubepods-burstable-pod….slice`
/// with systemd's; a guaranteed pod is directly in `kubepods`.
fn class_score(cgroup_parent: &str) -> i32 {
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
            assert_eq!(class_score(parent), score, "{parent}");
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
    fn a_pod_has_the_lowest_score_of_its_running_containers() {
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
        assert_eq!(score(&pod), -997, "no pod is exempt from the OOM killer");
    }
}
