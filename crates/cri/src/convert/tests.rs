//! A pod and a container as the life cycle shows them, for the tests of several modules.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use sandbox::model::{
    ContainerSpec, ContainerState, ContainerView, ExitView, Meta, PidMode, PodState, PodView,
    RootfsSpec,
};
use serde_json::json;

use super::pod::{Host, to_spec};
use crate::Config;
use crate::v1;

fn at(seconds: u64) -> SystemTime {
    UNIX_EPOCH + Duration::from_secs(seconds)
}

pub(crate) fn pod() -> PodView {
    let request = v1::PodSandboxConfig {
        metadata: Some(v1::PodSandboxMetadata {
            name: "pod".into(),
            namespace: "ns".into(),
            ..Default::default()
        }),
        ..Default::default()
    };
    let spec =
        to_spec(&request, "", &Host { cpus: 1, hostname: "node".into() }, &Config::default())
            .unwrap();
    PodView {
        id: "p".into(),
        spec: spec.into(),
        state: PodState::Ready,
        created_at: at(1),
        reason: String::new(),
        addresses: vec!["10.0.0.2".parse().unwrap(), "fd00::2".parse().unwrap()],
        netns: Some("/run/netns/p".into()),
        vmm_pid: Some(42),
        kernel_release: "6.1".into(),
        unreadable: false,
    }
}

pub(crate) fn container() -> ContainerView {
    let spec = ContainerSpec {
        meta: Meta { name: "web".into(), attempt: 2, ..Meta::default() },
        rootfs: RootfsSpec { image: "/i".into(), read_only: false, volumes: vec![] },
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
        strict_volumes: vec![],
        origin: json!({
            "mounts": [{ "container_path": "/x", "image": { "image_ref": "sha256:d" } }],
            "image": { "image": "sha256:00", "user_specified_image": "nginx:1" },
            "linux": { "resources": { "memory_swap_limit_in_bytes": 7 } },
        }),
    };
    ContainerView {
        id: "c".into(),
        pod: "p".into(),
        spec: spec.into(),
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
