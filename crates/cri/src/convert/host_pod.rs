//! Pods that request namespaces of the host (NamespaceMode NODE): such a pod has no VM, so
//! the node's configuration decides which are allowed.

use std::collections::BTreeMap;

use sandbox::model::HostNamespaces;

use super::Refusal;
use crate::config::HostPods;

/// In a list: all of them.
const ALL: &str = "*";

/// Properties of a pod that the policy checks.
#[derive(Debug)]
pub struct PodFacts<'a> {
    /// Of Kubernetes.
    pub namespace: &'a str,
    pub annotations: &'a BTreeMap<String, String>,
    pub handler: &'a str,
}

/// Field names of the pod specification.
fn names(host: HostNamespaces) -> String {
    let HostNamespaces { network, pid, ipc } = host;
    let all = [(network, "hostNetwork"), (pid, "hostPID"), (ipc, "hostIPC")];
    let requested: Vec<_> =
        all.into_iter().filter(|(requested, _)| *requested).map(|(_, name)| name).collect();
    requested.join(", ")
}

/// Whether such a pod may run here; the error names the setting to change.
pub fn check(host: HostNamespaces, pod: &PodFacts<'_>, policy: &HostPods) -> Result<(), Refusal> {
    let refused = |why: String| {
        Err(Refusal::invalid(
            "namespace_options",
            format!(
                "{}: a pod with namespaces of the host runs there without a VM context it, and this \
                 node's configuration does not allow that: {why}",
                names(host)
            ),
        ))
    };
    if !policy.enabled {
        return refused("set `enabled = true` in [cri.host_pods]".into());
    }
    let lists = |list: &[String], name: &str| list.iter().any(|e| e == name || e == ALL);
    if !lists(&policy.namespaces, pod.namespace) {
        return refused(format!(
            "add the namespace {:?} to `namespaces` in [cri.host_pods], now {:?}",
            pod.namespace, policy.namespaces
        ));
    }
    if !policy.handlers.is_empty() && !lists(&policy.handlers, pod.handler) {
        return refused(format!(
            "add the runtime handler {:?} to `handlers` in [cri.host_pods], now {:?}",
            pod.handler, policy.handlers
        ));
    }
    let annotation = policy.annotation.as_str();
    if !annotation.is_empty() && pod.annotations.get(annotation).is_none_or(|v| v != "true") {
        return refused(format!(
            "the pod needs the annotation {annotation:?} with the value \"true\" (`annotation` in \
             [cri.host_pods])"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn host_pods_are_allowed_by_the_whole_policy_or_rejected_with_the_setting_to_change() {
        let policy = |enabled, namespaces: &[&str], handlers: &[&str], annotation: &str| HostPods {
            enabled,
            namespaces: namespaces.iter().map(ToString::to_string).collect(),
            handlers: handlers.iter().map(ToString::to_string).collect(),
            annotation: annotation.into(),
        };
        let host = HostNamespaces { network: true, pid: true, ipc: false };
        let annotations = [("x/host".to_string(), "true".to_string())].into();
        let pod =
            PodFacts { namespace: "kube-system", annotations: &annotations, handler: "native" };
        for (policy, word) in [
            (HostPods::default(), "`enabled = true`"),
            (policy(true, &[], &[], ""), "`namespaces`"),
            (policy(true, &["other"], &[], ""), "\"kube-system\""),
            (policy(true, &["*"], &[""], ""), "`handlers`"),
            (policy(true, &["*"], &["*"], "y/host"), "\"y/host\""),
        ] {
            let text = check(host, &pod, &policy).unwrap_err().to_string();
            assert!(text.contains(word) && text.contains("hostNetwork, hostPID:"), "{text}");
        }
        for policy in [
            policy(true, &["kube-system"], &[], ""),
            policy(true, &["*"], &["native"], "x/host"),
            policy(true, &["a", "kube-system"], &["*"], ""),
        ] {
            assert_eq!(check(host, &pod, &policy), Ok(()), "{policy:?}");
        }
    }
}
