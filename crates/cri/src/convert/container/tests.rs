use oci_spec::image::{ConfigBuilder, ImageConfigurationBuilder};
use sandbox::model::VolumeSource;

use super::*;

fn image() -> ImageConfiguration {
    let config = ConfigBuilder::default()
        .cmd(vec!["/bin/server".to_string()])
        .user("web")
        .stop_signal("SIGQUIT")
        .build()
        .unwrap();
    ImageConfigurationBuilder::default().config(config).build().unwrap()
}

fn request() -> v1::ContainerConfig {
    v1::ContainerConfig {
        metadata: Some(v1::ContainerMetadata { name: "c".into(), attempt: 3 }),
        image: Some(v1::ImageSpec { image: "reg/web:1".into(), ..Default::default() }),
        ..Default::default()
    }
}

fn convert(request: &v1::ContainerConfig) -> Result<ContainerSpec, Refusal> {
    convert_in(request, &v1::PodSandboxConfig::default())
}

fn convert_in(
    request: &v1::ContainerConfig,
    pod: &v1::PodSandboxConfig,
) -> Result<ContainerSpec, Refusal> {
    let image = image();
    let parts = ImageParts { id: "sha256:1", rootfs: "/e".into(), configuration: Some(&image) };
    let pod = PodParts { hostname: "pod", request: pod };
    let find = |name: &str| {
        (name == "data").then(|| ImageVolume { id: "sha256:d".into(), rootfs: "/d".into() })
    };
    to_spec(request, &pod, &parts, &find, &Config::default())
}

fn pod(context: v1::LinuxSandboxSecurityContext) -> v1::PodSandboxConfig {
    let linux = v1::LinuxPodSandboxConfig { security_context: Some(context), ..Default::default() };
    v1::PodSandboxConfig { linux: Some(linux), ..Default::default() }
}

fn privileged_pod() -> v1::PodSandboxConfig {
    pod(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() })
}

fn secured(context: v1::LinuxContainerSecurityContext) -> v1::ContainerConfig {
    let linux = v1::LinuxContainerConfig { security_context: Some(context), ..Default::default() };
    v1::ContainerConfig { linux: Some(linux), ..request() }
}

#[test]
fn a_plain_request_gets_containerds_defaults() {
    let spec = convert(&request()).unwrap();
    assert_eq!((spec.meta.name.as_str(), spec.meta.attempt), ("c", 3));
    assert_eq!((spec.user.as_str(), spec.stop_signal), ("web", 3));
    assert_eq!(spec.pid, PidMode::Container);
    let linux = spec.oci.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_none() && linux.masked_paths().is_none());
    assert!(linux.devices().is_none() && !spec.strict_groups);
    let process = spec.oci.process().as_ref().unwrap();
    assert_eq!(process.args().as_ref().unwrap(), &["/bin/server"]);
    assert_eq!(process.no_new_privileges(), Some(false));
    let sys = |m: &&Mount| m.destination() == Path::new("/sys");
    let sys = spec.oci.mounts().as_ref().unwrap().iter().find(sys).unwrap();
    assert!(sys.options().as_ref().unwrap().contains(&"ro".to_string()));
    assert!(spec.oci.root().is_none());
}

#[test]
fn a_privileged_container_has_no_masks_and_no_filter() {
    let asked = secured(v1::LinuxContainerSecurityContext {
        privileged: true,
        masked_paths: vec!["/proc/keys".into()],
        readonly_paths: vec!["/proc/sys".into()],
        seccomp: Some(v1::SecurityProfile::default()),
        ..Default::default()
    });
    let spec = convert_in(&asked, &privileged_pod()).unwrap();
    let linux = spec.oci.linux().as_ref().unwrap();
    assert!(linux.seccomp().is_none() && linux.masked_paths().is_none());
    assert!(linux.readonly_paths().is_none());
    assert!(linux.resources().as_ref().unwrap().devices().as_ref().unwrap()[0].allow());
    let mounts = spec.oci.mounts().as_ref().unwrap();
    assert!(!mounts.iter().any(|m| m.options().iter().flatten().any(|o| o == "ro")));
    let refusal = convert(&asked).unwrap_err().to_string();
    assert!(refusal.contains("privileged pod"), "{refusal}");
}

#[test]
fn masks_filters_and_devices_are_those_of_the_request() {
    let mut asked = secured(v1::LinuxContainerSecurityContext {
        masked_paths: vec!["/bin/ls".into()],
        readonly_paths: vec!["/tmp".into()],
        seccomp: Some(v1::SecurityProfile::default()),
        supplemental_groups: vec![7],
        supplemental_groups_policy: 1,
        ..Default::default()
    });
    asked.devices = vec![v1::Device { host_path: "/dev/fuse".into(), ..Default::default() }];
    let spec = convert(&asked).unwrap();
    let linux = spec.oci.linux().as_ref().unwrap();
    assert_eq!(linux.masked_paths().as_deref(), Some(&["/bin/ls".to_string()][..]));
    assert_eq!(linux.readonly_paths().as_deref(), Some(&["/tmp".to_string()][..]));
    assert!(linux.seccomp().is_some() && spec.strict_groups);
    assert_eq!(linux.devices().as_ref().unwrap().len(), 1);
    let rules = linux.resources().as_ref().unwrap().devices().clone().unwrap();
    assert!(!rules[0].allow() && rules[1].allow() && rules[1].minor() == Some(229));
    let user = spec.oci.process().as_ref().unwrap().user();
    assert_eq!(user.additional_gids().as_deref(), Some(&[7][..]));
}

#[test]
fn a_container_has_the_user_namespace_of_its_pod() {
    let mapping = vec![v1::IdMapping { container_id: 0, host_id: 1000, length: 100_000 }];
    let options = v1::NamespaceOption {
        pid: 1,
        userns_options: Some(v1::UserNamespace { mode: 0, uids: mapping.clone(), gids: mapping }),
        ..Default::default()
    };
    let asked = secured(v1::LinuxContainerSecurityContext {
        namespace_options: Some(options.clone()),
        ..Default::default()
    });
    let pod = pod(v1::LinuxSandboxSecurityContext {
        namespace_options: Some(options),
        ..Default::default()
    });
    let spec = convert_in(&asked, &pod).unwrap();
    let linux = spec.oci.linux().as_ref().unwrap();
    assert_eq!(linux.uid_mappings().as_ref().unwrap()[0].host_id(), 1000);
    assert_eq!(linux.gid_mappings().as_ref().unwrap()[0].size(), 100_000);
    let user = |n: &LinuxNamespace| n.typ() == LinuxNamespaceType::User;
    assert!(linux.namespaces().as_ref().unwrap().iter().any(user));
    for (container, pod) in [(&asked, &privileged_pod()), (&request(), &pod)] {
        let refusal = convert_in(container, pod).unwrap_err().to_string();
        assert!(refusal.contains("not those of the pod"), "{refusal}");
    }
}

#[test]
fn mounted_images_are_reported_with_their_ids() {
    let mount = v1::Mount {
        container_path: "/data".into(),
        readonly: true,
        image: Some(v1::ImageSpec { image: "data".into(), ..Default::default() }),
        ..Default::default()
    };
    let spec = convert(&v1::ContainerConfig { mounts: vec![mount], ..request() }).unwrap();
    assert_eq!(spec.origin["mounts"][0]["image"]["image_ref"], "sha256:d");
    assert_eq!(spec.volumes.len(), 1);
}

#[test]
fn pid_modes_are_kept() {
    let with = |pid, target: &str| {
        let options = v1::NamespaceOption { pid, target_id: target.into(), ..Default::default() };
        convert(&secured(v1::LinuxContainerSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        }))
        .unwrap()
    };
    let own = |spec: &ContainerSpec| {
        let namespaces = spec.oci.linux().as_ref().unwrap().namespaces().clone().unwrap();
        namespaces.iter().any(|n| n.typ() == LinuxNamespaceType::Pid)
    };
    let container = with(1, "");
    assert!(container.pid == PidMode::Container && own(&container));
    let pod = with(0, "");
    assert!(pod.pid == PidMode::Pod && !own(&pod));
    assert_eq!(with(3, "abc").pid, PidMode::Target("abc".into()));
}

#[test]
fn a_container_of_a_host_pod_has_the_pods_namespaces() {
    let node = v1::NamespaceMode::Node as i32;
    let options = |pid, network| v1::NamespaceOption { pid, network, ..Default::default() };
    let of_pod = |options| {
        pod(v1::LinuxSandboxSecurityContext {
            namespace_options: Some(options),
            ..Default::default()
        })
    };
    let ask = |own, pods| {
        let context = v1::LinuxContainerSecurityContext {
            namespace_options: Some(own),
            ..Default::default()
        };
        let null = v1::Device { host_path: "/dev/null".into(), ..Default::default() };
        let socket = v1::Mount {
            host_path: "/dev/null".into(),
            container_path: "/x".into(),
            ..Default::default()
        };
        let request =
            v1::ContainerConfig { devices: vec![null], mounts: vec![socket], ..secured(context) };
        convert_in(&request, &of_pod(pods))
    };
    let spec = ask(options(0, node), options(node, node)).unwrap();
    assert_eq!(spec.pid, PidMode::Node, "the pod's processes are the host's");
    let shared = VolumeSource::Shared { host_path: "/dev/null".into() };
    assert_eq!(spec.volumes[0].source, shared, "whatever it is");
    assert_eq!(spec.oci.linux().as_ref().unwrap().devices().as_ref().unwrap().len(), 1);
    assert_eq!(ask(options(node, 0), options(node, 0)).unwrap().pid, PidMode::Node);
    assert_eq!(ask(options(0, 0), options(0, node)).unwrap().pid, PidMode::Pod);
    for (own, pods, field) in [
        (options(node, node), options(0, node), "namespace_options.pid"),
        (options(0, node), options(node, 0), "namespace_options.network"),
    ] {
        let text = ask(own, pods).unwrap_err().to_string();
        assert!(text.contains(field), "{text}");
    }
}

#[test]
fn unsupported_requests_are_rejected_with_the_field() {
    let host_pid = v1::NamespaceOption { pid: 2, ..Default::default() };
    let table = [
        (v1::ContainerConfig { metadata: None, ..request() }, "metadata.name"),
        (v1::ContainerConfig { log_path: "../x".into(), ..request() }, "log_path"),
        (v1::ContainerConfig { log_path: "/x".into(), ..request() }, "log_path"),
        (v1::ContainerConfig { devices: vec![v1::Device::default()], ..request() }, "devices"),
        (
            v1::ContainerConfig {
                metadata: Some(v1::ContainerMetadata { name: "a/b".into(), attempt: 0 }),
                ..request()
            },
            "metadata.name",
        ),
        (
            v1::ContainerConfig {
                annotations: [("big".to_string(), "x".repeat(2 << 20))].into(),
                ..request()
            },
            "annotations",
        ),
        (
            v1::ContainerConfig { cdi_devices: vec![v1::CdiDevice::default()], ..request() },
            "CDI_devices",
        ),
        (v1::ContainerConfig { working_dir: "x".into(), ..request() }, "working_dir"),
        (v1::ContainerConfig { stop_signal: 999, ..request() }, "stop_signal"),
        (
            secured(v1::LinuxContainerSecurityContext {
                namespace_options: Some(host_pid),
                ..Default::default()
            }),
            "linux.security_context.namespace_options.pid",
        ),
    ];
    for (request, field) in table {
        let text = convert(&request).unwrap_err().to_string();
        assert!(text.starts_with(field), "{text}");
    }
}
