//! cpuset of a pod: CPUs and NUMA nodes of the host that containers are pinned to (a kubelet's
//! static CPU and memory managers). The numbers have no meaning in the guest and are not sent to
//! it: the pod's cgroup on the host gets the union of its running containers' sets (cgroup-v2.rst,
//! "Cpuset"). If one of them has no set, the pod may run on all.
//!
//! Not journaled: the setting is in the cgroup and follows from the containers' limits.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use oci_spec::runtime::LinuxResources;

use super::handle::Handle;
use crate::error::Error;
use crate::host::{blocking, cgroup};
use crate::model::ContainerSpec;
use crate::policy::{ContainerPhase, Effect, Pod};

/// Applies the union of the containers' sets; `change` are the new limits of one container.
pub(super) async fn pin(
    handle: &Arc<Handle>,
    change: Option<(&str, &LinuxResources)>,
) -> Result<(), Error> {
    // The agent of a host pod sets each container's cpuset.
    if handle.machine.host().is_some() {
        return Ok(());
    }
    let _one_at_a_time = handle.cpuset_lock.lock().await;
    let pod = handle.pod();
    let [cpus, mems] = combined_cpuset(&pod, change);
    let leaf = pod.ledger.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, .. } => Some(leaf.clone()),
        _ => None,
    });
    let Some(leaf) = leaf else { return Ok(()) };
    let (root, names) = (handle.node.cgroup_root.clone(), format!("CPUs {cpus:?}, nodes {mems:?}"));
    let pinned = blocking(move || cgroup::pin(&root, &leaf, &cpus, &mems)).await;
    pinned.map_err(|error| {
        Error::invalid(format!("cannot pin the pod to {names} of the host: {error}"))
    })
}

/// [`pin`] without a caller for the error: after a container's exit or removal.
pub(super) async fn pin_or_log(handle: &Arc<Handle>) {
    if let Err(error) = pin(handle, None).await {
        tracing::warn!(pod = handle.id, %error, "cannot update the pod's cpuset");
    }
}

/// Lists of CPUs and NUMA nodes; empty: all.
fn combined_cpuset(pod: &Pod, change: Option<(&str, &LinuxResources)>) -> [String; 2] {
    let running = pod
        .containers
        .values()
        .filter(|c| c.exit.is_none() && c.phase != ContainerPhase::Removing)
        .map(|c| match change {
            Some((id, limits)) if id == c.id => limits,
            _ => &c.resources,
        });
    let sets = running.map(|limits| {
        let cpu = limits.cpu().as_ref();
        let list = |list: Option<&String>| list.cloned().unwrap_or_default();
        (
            list(cpu.and_then(|cpu| cpu.cpus().as_ref())),
            list(cpu.and_then(|cpu| cpu.mems().as_ref())),
        )
    });
    let (cpus, mems): (BTreeSet<_>, BTreeSet<_>) = sets.unzip();
    // The kernel accepts overlapping lists.
    [cpus, mems].map(|lists| match lists.iter().any(String::is_empty) {
        true => String::new(),
        false => lists.into_iter().collect::<Vec<_>>().join(","),
    })
}

/// The container's spec for the guest, without a cpuset.
pub(super) fn spec_for_guest<'a>(
    handle: &Handle,
    spec: &'a ContainerSpec,
) -> Cow<'a, ContainerSpec> {
    let limits = spec.oci.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    match limits {
        Some(limits) if handle.machine.host().is_none() && has_cpuset(limits) => {
            let mut guest_spec = spec.clone();
            if let Some(limits) =
                guest_spec.oci.linux_mut().as_mut().and_then(|l| l.resources_mut().as_mut())
            {
                *limits = without_cpuset(limits);
            }
            Cow::Owned(guest_spec)
        }
        _ => Cow::Borrowed(spec),
    }
}

/// The limits for the guest, without a cpuset.
pub(super) fn for_guest(handle: &Handle, limits: &LinuxResources) -> LinuxResources {
    if handle.machine.host().is_some() { limits.clone() } else { without_cpuset(limits) }
}

fn has_cpuset(limits: &LinuxResources) -> bool {
    limits.cpu().as_ref().is_some_and(|cpu| cpu.cpus().is_some() || cpu.mems().is_some())
}

fn without_cpuset(limits: &LinuxResources) -> LinuxResources {
    let mut limits = limits.clone();
    if let Some(cpu) = limits.cpu_mut() {
        cpu.set_cpus(None);
        cpu.set_mems(None);
    }
    limits
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policy::tests as samples;

    fn limits(json: &str) -> LinuxResources {
        serde_json::from_str(json).unwrap()
    }

    fn pod(containers: &[(&str, &str)]) -> Pod {
        let mut pod = samples::pod();
        pod.containers.clear();
        for (id, json) in containers {
            let mut container = samples::container(id);
            container.resources = limits(json);
            pod.containers.insert(container.id.clone(), container);
        }
        pod
    }

    #[test]
    fn the_cpuset_is_the_union_of_the_running_containers_sets() {
        let set = |cpus: &str| format!(r#"{{"cpu":{{"cpus":"{cpus}","mems":"0"}}}}"#);
        let (a, b) = (set("3,5"), set("0-1"));
        let mut both = pod(&[("a", &a), ("b", &b), ("c", &a)]);
        assert_eq!(combined_cpuset(&both, None), ["0-1,3,5", "0"].map(String::from));
        let change = limits(&set("7"));
        assert_eq!(combined_cpuset(&both, Some(("b", &change)))[0], "3,5,7");
        both.containers.get_mut("b").unwrap().phase = ContainerPhase::Removing;
        assert_eq!(combined_cpuset(&both, None)[0], "3,5");
        let free = pod(&[("a", &a), ("b", r#"{"cpu":{"shares":2}}"#)]);
        assert_eq!(combined_cpuset(&free, None), [String::new(), String::new()]);
        assert_eq!(combined_cpuset(&pod(&[]), None), [String::new(), String::new()]);
    }

    #[test]
    fn the_guest_gets_no_cpuset() {
        let guest_limits = without_cpuset(&limits(r#"{"cpu":{"cpus":"3","mems":"1","shares":5}}"#));
        assert_eq!(guest_limits, limits(r#"{"cpu":{"shares":5}}"#));
    }
}
