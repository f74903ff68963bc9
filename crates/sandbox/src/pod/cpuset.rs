//! CPUs and memory nodes of the host that containers are kept on (a kubelet's static CPU and memory
//! managers). Their numbers mean nothing in a VM, so the guest is not told them: the pod's cgroup on
//! the host is kept on what its living containers have together (cgroup-v2.rst, "Cpuset"). One of
//! them that may run anywhere lets the pod run anywhere.
//!
//! Nothing is journaled for it: the setting stands in the cgroup, goes with it, and follows from the
//! containers' limits.

use std::borrow::Cow;
use std::collections::BTreeSet;
use std::sync::Arc;

use oci_spec::runtime::LinuxResources;

use super::handle::Handle;
use crate::error::Error;
use crate::host::{blocking, cgroup};
use crate::model::ContainerSpec;
use crate::policy::{ContainerPhase, Effect, Pod};

/// Keeps the pod where its containers may be; `change` is about to become the limits of one.
pub(super) async fn pin(
    handle: &Arc<Handle>,
    change: Option<(&str, &LinuxResources)>,
) -> Result<(), Error> {
    // The agent of a pod without a VM keeps each container where it may be.
    if handle.machine.host().is_some() {
        return Ok(());
    }
    let _one_at_a_time = handle.pinning.lock().await;
    let pod = handle.pod();
    let [cpus, mems] = together(&pod, change);
    let leaf = pod.ledger.iter().find_map(|effect| match effect {
        Effect::Cgroup { leaf, .. } => Some(leaf.clone()),
        _ => None,
    });
    let Some(leaf) = leaf else { return Ok(()) };
    let (root, names) = (handle.node.cgroup_root.clone(), format!("CPUs {cpus:?}, nodes {mems:?}"));
    let pinned = blocking(move || cgroup::pin(&root, &leaf, &cpus, &mems)).await;
    pinned
        .map_err(|error| Error::invalid(format!("the host cannot keep a pod on {names}: {error}")))
}

/// The same where nobody is to be told: a container is gone, which frees more than it asks for.
pub(super) async fn pin_again(handle: &Arc<Handle>) {
    if let Err(error) = pin(handle, None).await {
        tracing::warn!(pod = handle.id, %error, "pod stays where it was");
    }
}

/// Lists of CPUs and nodes; empty: all.
fn together(pod: &Pod, change: Option<(&str, &LinuxResources)>) -> [String; 2] {
    let living = pod
        .containers
        .values()
        .filter(|c| c.exit.is_none() && c.phase != ContainerPhase::Removing)
        .map(|c| match change {
            Some((id, limits)) if id == c.id => limits,
            _ => &c.resources,
        });
    let sets = living.map(|limits| {
        let cpu = limits.cpu().as_ref();
        let list = |list: Option<&String>| list.cloned().unwrap_or_default();
        (
            list(cpu.and_then(|cpu| cpu.cpus().as_ref())),
            list(cpu.and_then(|cpu| cpu.mems().as_ref())),
        )
    });
    let (cpus, mems): (BTreeSet<_>, BTreeSet<_>) = sets.unzip();
    // The kernel takes lists that overlap.
    [cpus, mems].map(|lists| match lists.iter().any(String::is_empty) {
        true => String::new(),
        false => lists.into_iter().collect::<Vec<_>>().join(","),
    })
}

/// A container as its VM is told of it.
pub(super) fn spec_for_guest<'a>(
    handle: &Handle,
    spec: &'a ContainerSpec,
) -> Cow<'a, ContainerSpec> {
    let limits = spec.oci.linux().as_ref().and_then(|linux| linux.resources().as_ref());
    match limits {
        Some(limits) if handle.machine.host().is_none() && names_some(limits) => {
            let mut told = spec.clone();
            if let Some(limits) =
                told.oci.linux_mut().as_mut().and_then(|l| l.resources_mut().as_mut())
            {
                *limits = without(limits);
            }
            Cow::Owned(told)
        }
        _ => Cow::Borrowed(spec),
    }
}

/// Limits as a VM is told of them.
pub(super) fn for_guest(handle: &Handle, limits: &LinuxResources) -> LinuxResources {
    if handle.machine.host().is_some() { limits.clone() } else { without(limits) }
}

fn names_some(limits: &LinuxResources) -> bool {
    limits.cpu().as_ref().is_some_and(|cpu| cpu.cpus().is_some() || cpu.mems().is_some())
}

fn without(limits: &LinuxResources) -> LinuxResources {
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
    fn a_pod_is_kept_on_what_its_living_containers_have_together() {
        let set = |cpus: &str| format!(r#"{{"cpu":{{"cpus":"{cpus}","mems":"0"}}}}"#);
        let (a, b) = (set("3,5"), set("0-1"));
        let mut both = pod(&[("a", &a), ("b", &b), ("c", &a)]);
        assert_eq!(together(&both, None), ["0-1,3,5", "0"].map(String::from));
        let change = limits(&set("7"));
        assert_eq!(together(&both, Some(("b", &change)))[0], "3,5,7");
        both.containers.get_mut("b").unwrap().phase = ContainerPhase::Removing;
        assert_eq!(together(&both, None)[0], "3,5");
        let free = pod(&[("a", &a), ("b", r#"{"cpu":{"shares":2}}"#)]);
        assert_eq!(together(&free, None), [String::new(), String::new()]);
        assert_eq!(together(&pod(&[]), None), [String::new(), String::new()]);
    }

    #[test]
    fn a_guest_is_not_told_of_cpus_that_it_does_not_have() {
        let told = without(&limits(r#"{"cpu":{"cpus":"3","mems":"1","shares":5}}"#));
        assert_eq!(told, limits(r#"{"cpu":{"shares":5}}"#));
    }
}
