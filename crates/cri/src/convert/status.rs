//! Views of pods and containers to the interface's listings and statuses.

use std::collections::BTreeMap;

use sandbox::model::{ContainerState, ContainerView, PodState, PodView};

use super::time::nanos;
use super::{resources, signal};
use crate::v1;

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
        annotations: view.spec.meta.annotations.clone(),
        runtime_handler: view.spec.handler.clone(),
    }
}

pub fn pod_status(view: &PodView) -> v1::PodSandboxStatus {
    let mut addresses = view.addresses.iter().map(ToString::to_string);
    let network = v1::PodSandboxNetworkStatus {
        ip: addresses.next().unwrap_or_default(),
        additional_ips: addresses.map(|ip| v1::PodIp { ip }).collect(),
    };
    let asked: v1::PodSandboxConfig =
        serde_json::from_value(view.spec.origin.clone()).unwrap_or_default();
    let options = asked
        .linux
        .and_then(|linux| linux.security_context)
        .and_then(|context| context.namespace_options)
        .unwrap_or_default();
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
        annotations: view.spec.meta.annotations.clone(),
        runtime_handler: view.spec.handler.clone(),
    }
}

/// What `crictl inspectp` shows.
pub fn pod_info(view: &PodView) -> BTreeMap<String, String> {
    let info = serde_json::json!({
        "pid": view.vmm_pid,
        "state": view.state,
        "reason": view.reason,
        "netns": view.netns,
        "addresses": view.addresses,
        "kernel": view.kernel_release,
        "vcpus": view.spec.vcpus,
        "memoryMiB": view.spec.memory_mib,
        "runtimeHandler": view.spec.handler,
        "config": view.spec.origin,
    });
    [("info".to_string(), info.to_string())].into()
}

fn image_spec(view: &ContainerView) -> v1::ImageSpec {
    v1::ImageSpec { image: view.spec.image_name.clone(), ..Default::default() }
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
    let asked: v1::ContainerConfig =
        serde_json::from_value(view.spec.origin.clone()).unwrap_or_default();
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
        mounts: asked.mounts,
        log_path: view.log_path.to_string_lossy().into_owned(),
        resources: Some(v1::ContainerResources {
            linux: Some(v1::LinuxContainerResources {
                oom_score_adj: asked
                    .linux
                    .and_then(|linux| linux.resources)
                    .map_or(0, |resources| resources.oom_score_adj),
                ..resources::from_oci(&view.resources)
            }),
            windows: None,
        }),
        image_id: view.spec.image_id.clone(),
        user: user(view),
        stop_signal: signal::to_cri(view.spec.stop_signal) as i32,
    }
}

/// None where only the guest knows, because a name had to be looked up in the image.
fn user(view: &ContainerView) -> Option<v1::ContainerUser> {
    let of_process = view.spec.oci.process().as_ref()?.user();
    let (uid, gid) = match view.spec.user.split_once(':') {
        None if view.spec.user.is_empty() => (of_process.uid(), of_process.gid()),
        Some((user, group)) => (user.parse().ok()?, group.parse().ok()?),
        None => return None,
    };
    let groups = of_process.additional_gids().clone().unwrap_or_default();
    let linux = v1::LinuxContainerUser {
        uid: i64::from(uid),
        gid: i64::from(gid),
        supplemental_groups: groups.into_iter().map(i64::from).collect(),
    };
    Some(v1::ContainerUser { linux: Some(linux) })
}

/// What `crictl inspect` shows.
pub fn container_info(view: &ContainerView) -> BTreeMap<String, String> {
    let info = serde_json::json!({
        "sandboxID": view.pod,
        "state": view.state,
        "rootfs": view.spec.rootfs,
        "runtimeSpec": view.spec.oci,
        "config": view.spec.origin,
    });
    [("info".to_string(), info.to_string())].into()
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, UNIX_EPOCH};

    use sandbox::model::{ContainerSpec, ExitView, Meta, PidMode, RootfsSpec};

    use super::*;

    fn view() -> ContainerView {
        let at = |seconds| UNIX_EPOCH + Duration::from_secs(seconds);
        ContainerView {
            id: "c".into(),
            pod: "p".into(),
            spec: ContainerSpec {
                meta: Meta { name: "web".into(), attempt: 2, ..Meta::default() },
                rootfs: RootfsSpec { image: "/i".into(), read_only: false },
                oci: oci_spec::runtime::Spec::default(),
                user: String::new(),
                pid: PidMode::Pod,
                stdin: false,
                stdin_once: false,
                tty: false,
                log_path: "web/2.log".into(),
                volumes: vec![],
                devices: vec![],
                strict_groups: false,
                image_name: "nginx:1".into(),
                image_id: "sha256:00".into(),
                stop_signal: 3,
                origin: serde_json::json!({ "mounts": [{ "container_path": "/x" }] }),
            },
            state: ContainerState::Exited,
            created_at: at(1),
            started_at: Some(at(2)),
            exit: Some(ExitView {
                code: 137,
                oom_killed: true,
                at: at(3),
                reason: "OOMKilled".into(),
                message: "too much".into(),
            }),
            log_path: "/logs/web/2.log".into(),
            resources: oci_spec::runtime::LinuxResources::default(),
            user: None,
        }
    }

    #[test]
    fn an_exit_is_told_with_time_code_and_reason() {
        let status = container_status(&view(), "ref".into());
        assert_eq!(status.state(), v1::ContainerState::ContainerExited);
        assert_eq!((status.created_at, status.finished_at), (1_000_000_000, 3_000_000_000));
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"));
        assert_eq!(status.stop_signal(), v1::Signal::Sigquit);
        assert_eq!(status.mounts[0].container_path, "/x");
        assert_eq!(status.metadata.unwrap().attempt, 2);
        assert_eq!(status.user.unwrap().linux.unwrap().uid, 0);
    }

    #[test]
    fn a_user_that_the_guest_looked_up_is_not_made_up() {
        let named =
            ContainerView { spec: ContainerSpec { user: "redis".into(), ..view().spec }, ..view() };
        assert_eq!(container_status(&named, String::new()).user, None);
        let numeric =
            ContainerView { spec: ContainerSpec { user: "7:8".into(), ..view().spec }, ..view() };
        let user = container_status(&numeric, String::new()).user.unwrap().linux.unwrap();
        assert_eq!((user.uid, user.gid), (7, 8));
    }
}
