//! Views of pods and containers to the interface's listings and statuses.

use std::collections::BTreeMap;

use sandbox::model::{ContainerState, ContainerView, PodState, PodView};
use serde::Deserialize;
use serde_json::json;

use super::time::nanos;
use super::{resources, signal};
use crate::v1;

/// Annotation of a pod whose record cannot be read, with the reason.
const UNREAD: &str = "nacelle.dev/unread-record";

fn pod_state(state: PodState) -> v1::PodSandboxState {
    match state {
        PodState::Ready => v1::PodSandboxState::SandboxReady,
        PodState::Reserved | PodState::NotReady => v1::PodSandboxState::SandboxNotready,
    }
}

pub fn container_state(state: ContainerState) -> v1::ContainerState {
    match state {
        ContainerState::Created => v1::ContainerState::ContainerCreated,
        ContainerState::Running => v1::ContainerState::ContainerRunning,
        ContainerState::Exited => v1::ContainerState::ContainerExited,
        ContainerState::Unknown => v1::ContainerState::ContainerUnknown,
    }
}

pub fn pod_metadata(view: &PodView) -> v1::PodSandboxMetadata {
    let meta = &view.spec.meta;
    v1::PodSandboxMetadata {
        name: meta.name.clone(),
        uid: meta.uid.clone(),
        namespace: meta.namespace.clone(),
        attempt: meta.attempt,
    }
}

pub fn container_metadata(view: &ContainerView) -> v1::ContainerMetadata {
    v1::ContainerMetadata { name: view.spec.meta.name.clone(), attempt: view.spec.meta.attempt }
}

pub fn pod_item(view: &PodView) -> v1::PodSandbox {
    v1::PodSandbox {
        id: view.id.clone(),
        metadata: Some(pod_metadata(view)),
        state: pod_state(view.state) as i32,
        created_at: nanos(view.created_at),
        labels: view.spec.meta.labels.clone(),
        annotations: pod_annotations(view),
        runtime_handler: view.spec.handler.clone(),
    }
}

/// As they were given; of a pod whose record cannot be read they may be lost, and the reason stands
/// there instead.
fn pod_annotations(view: &PodView) -> BTreeMap<String, String> {
    let given = view.spec.meta.annotations.clone().into_iter();
    given.chain(view.unreadable.then(|| (UNREAD.to_string(), view.reason.clone()))).collect()
}

pub fn pod_status(view: &PodView) -> v1::PodSandboxStatus {
    let mut addresses = view.addresses.iter().map(ToString::to_string);
    let network = v1::PodSandboxNetworkStatus {
        ip: addresses.next().unwrap_or_default(),
        additional_ips: addresses.map(|ip| v1::PodIp { ip }).collect(),
    };
    let requested = &view.spec.origin["linux"]["security_context"]["namespace_options"];
    let options = v1::NamespaceOption::deserialize(requested).unwrap_or_default();
    v1::PodSandboxStatus {
        id: view.id.clone(),
        metadata: Some(pod_metadata(view)),
        state: pod_state(view.state) as i32,
        created_at: nanos(view.created_at),
        network: Some(network),
        linux: Some(v1::LinuxPodSandboxStatus {
            namespaces: Some(v1::Namespace { options: Some(options) }),
        }),
        labels: view.spec.meta.labels.clone(),
        annotations: pod_annotations(view),
        runtime_handler: view.spec.handler.clone(),
    }
}

/// What `crictl inspectp` shows; `pid`, `config`, `runtimeSpec` and `cniResult` stand where scripts
/// written for containerd look for them. `pid` is the pod's VMM.
pub fn pod_info(view: &PodView) -> BTreeMap<String, String> {
    let network = json!({ "type": "network", "path": view.netns });
    let addresses: Vec<_> = view.addresses.iter().map(|address| json!({ "IP": address })).collect();
    let info = json!({
        "pid": view.vmm_pid,
        "state": format!("{:?}", view.state),
        "reason": view.reason,
        "recordUnread": view.unreadable,
        "netns": view.netns,
        "netNamespaceClosed": view.netns.is_none(),
        "addresses": view.addresses,
        "cniResult": { "Interfaces": { "eth0": { "IPConfigs": addresses } } },
        "kernel": view.kernel_release,
        "vcpus": view.spec.vcpus,
        "memoryMiB": view.spec.memory_mib,
        "runtimeHandler": view.spec.handler,
        "runtimeType": "nacelle",
        "runtimeSpec": {
            "hostname": view.spec.hostname,
            "linux": { "namespaces": [network], "sysctl": view.spec.sysctls },
        },
        "config": view.spec.origin,
    });
    [("info".to_string(), info.to_string())].into()
}

/// The name people use, for they read it in listings; a kubelet asks with the image's id. Of the
/// request only this part is read: listings are long.
fn image_spec(view: &ContainerView) -> v1::ImageSpec {
    let requested = v1::ImageSpec::deserialize(&view.spec.origin["image"]).unwrap_or_default();
    v1::ImageSpec { image: view.spec.image_name.clone(), image_ref: String::new(), ..requested }
}

fn requested(view: &ContainerView) -> v1::ContainerConfig {
    v1::ContainerConfig::deserialize(&view.spec.origin).unwrap_or_default()
}

/// `image_ref` is what the container was made from, for certain: the image's id, unless its
/// repository digest is known.
pub fn container_item(view: &ContainerView) -> v1::Container {
    v1::Container {
        id: view.id.clone(),
        pod_sandbox_id: view.pod.clone(),
        metadata: Some(container_metadata(view)),
        image: Some(image_spec(view)),
        image_ref: view.spec.image_id.clone(),
        state: container_state(view.state) as i32,
        created_at: nanos(view.created_at),
        labels: view.spec.meta.labels.clone(),
        annotations: view.spec.meta.annotations.clone(),
        image_id: view.spec.image_id.clone(),
    }
}

pub fn container_status(view: &ContainerView, image_ref: String) -> v1::ContainerStatus {
    let requested = requested(view);
    let exit = view.exit.as_ref();
    v1::ContainerStatus {
        id: view.id.clone(),
        metadata: Some(container_metadata(view)),
        state: container_state(view.state) as i32,
        created_at: nanos(view.created_at),
        started_at: view.started_at.map_or(0, nanos),
        finished_at: exit.map_or(0, |exit| nanos(exit.at)),
        exit_code: exit.map_or(0, |exit| exit.code),
        image: Some(image_spec(view)),
        image_ref,
        reason: exit.map(|exit| exit.reason.clone()).unwrap_or_default(),
        message: exit.map(|exit| exit.message.clone()).unwrap_or_default(),
        labels: view.spec.meta.labels.clone(),
        annotations: view.spec.meta.annotations.clone(),
        mounts: requested.mounts,
        log_path: view.log_path.to_string_lossy().into_owned(),
        resources: Some(v1::ContainerResources {
            linux: Some(limits(view, requested.linux.and_then(|linux| linux.resources))),
            windows: None,
        }),
        image_id: view.spec.image_id.clone(),
        user: user(view),
        stop_signal: signal::to_cri(view.spec.stop_signal) as i32,
    }
}

/// Limits in force; those that no cgroup file holds are given back as they were asked for.
fn limits(
    view: &ContainerView,
    requested: Option<v1::LinuxContainerResources>,
) -> v1::LinuxContainerResources {
    let (requested, held) = (requested.unwrap_or_default(), resources::from_oci(&view.resources));
    let swap = match held.memory_swap_limit_in_bytes {
        0 => requested.memory_swap_limit_in_bytes,
        swap => swap,
    };
    v1::LinuxContainerResources {
        oom_score_adj: requested.oom_score_adj,
        memory_swap_limit_in_bytes: swap,
        hugepage_limits: requested.hugepage_limits,
        ..held
    }
}

/// As the guest resolved it; none before it has, for a name may have to be looked up in the image.
fn user(view: &ContainerView) -> Option<v1::ContainerUser> {
    let user = view.user.as_ref()?;
    Some(v1::ContainerUser {
        linux: Some(v1::LinuxContainerUser {
            uid: i64::from(user.uid),
            gid: i64::from(user.gid),
            supplemental_groups: user.groups.iter().copied().map(i64::from).collect(),
        }),
    })
}

/// What `crictl inspect` shows. `pid` is the VMM that the container runs in: its own process has no
/// number on this host.
pub fn container_info(view: &ContainerView, vmm_pid: Option<u32>) -> BTreeMap<String, String> {
    let rootfs = &view.spec.rootfs;
    let info = json!({
        "sandboxID": view.pod,
        "pid": vmm_pid,
        "state": format!("{:?}", view.state),
        "rootfs": {
            "image": rootfs.image,
            "read_only": rootfs.read_only,
            "volumes": rootfs.volumes,
        },
        "runtimeType": "nacelle",
        "runtimeSpec": view.spec.oci,
        "config": view.spec.origin,
    });
    [("info".to_string(), info.to_string())].into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::convert::tests::{container as view, pod};
    use sandbox::model::Identity;

    #[test]
    fn a_pods_first_address_is_its_primary_one() {
        let network = pod_status(&pod()).network.unwrap();
        assert_eq!(network.ip, "10.0.0.2");
        assert_eq!(network.additional_ips[0].ip, "fd00::2");
        let info: serde_json::Value = serde_json::from_str(&pod_info(&pod())["info"]).unwrap();
        assert_eq!(info["pid"], 42);
        assert_eq!(info["runtimeSpec"]["linux"]["namespaces"][0]["path"], "/run/netns/p");
    }

    #[test]
    fn a_pod_whose_record_cannot_be_read_says_so() {
        let known = pod();
        assert!(!pod_item(&known).annotations.contains_key(UNREAD));
        let reason = "the pod's record cannot be read: it is missing".to_string();
        let view = PodView {
            unreadable: true,
            state: PodState::NotReady,
            reason: reason.clone(),
            ..known
        };
        assert_eq!(pod_item(&view).annotations[UNREAD], reason);
        let status = pod_status(&view);
        assert_eq!(status.annotations[UNREAD], reason);
        assert_eq!(status.state(), v1::PodSandboxState::SandboxNotready);
        let info: serde_json::Value = serde_json::from_str(&pod_info(&view)["info"]).unwrap();
        assert_eq!((&info["recordUnread"], &info["reason"]), (&json!(true), &json!(reason)));
    }

    #[test]
    fn an_exit_is_reported_with_time_code_and_reason() {
        let status = container_status(&view(), "ref".into());
        assert_eq!(status.state(), v1::ContainerState::ContainerExited);
        assert_eq!((status.created_at, status.finished_at), (1_000_000_000, 3_000_000_000));
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        assert_eq!(status.stop_signal(), v1::Signal::Sigquit);
        assert_eq!(status.mounts[0].container_path, "/x");
        assert_eq!(status.metadata.unwrap().attempt, 2);
        assert_eq!(status.mounts[0].image.as_ref().unwrap().image_ref, "sha256:d");
        assert_eq!(status.resources.unwrap().linux.unwrap().memory_swap_limit_in_bytes, 7);
        let image = status.image.unwrap();
        assert_eq!(
            (image.image.as_str(), image.user_specified_image.as_str()),
            ("nginx:1", "nginx:1")
        );
        assert_eq!(status.image_id, "sha256:00");
    }

    #[test]
    fn the_user_is_reported_once_the_guest_has_resolved_it() {
        assert_eq!(container_status(&view(), String::new()).user, None);
        let user = Identity { uid: 1000, gid: 1000, groups: vec![1000, 50_000] };
        let resolved = ContainerView { user: Some(user), ..view() };
        let user = container_status(&resolved, String::new()).user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid), (1000, 1000));
        assert_eq!(user.supplemental_groups, [1000, 50_000]);
    }

    #[test]
    fn what_inspect_shows_has_the_keys_that_scripts_look_for() {
        let info = &container_info(&view(), Some(42))["info"];
        let info: serde_json::Value = serde_json::from_str(info).unwrap();
        assert_eq!((&info["pid"], &info["sandboxID"]), (&json!(42), &json!("p")));
        assert!(info["runtimeSpec"]["ociVersion"].is_string());
    }
}
