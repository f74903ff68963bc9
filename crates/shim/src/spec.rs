//! Converts the bundle's config.json (OCI runtime specification) to the types of the `sandbox` crate.
//! The parts that the guest applies stay a specification; bind mounts of the host become volumes.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use oci_spec::runtime::{LinuxDeviceType, LinuxNamespaceType, Mount, Spec};
use sandbox::model::{
    Access, BlockDevice, ContainerSpec, CpuLimits, Dns, Meta, PidMode, PodSpec, Propagation,
    RootfsSpec, Volume, VolumeSource,
};

use crate::settings::Settings;

/// Maximum size of config.json, bytes; containerd's have some ten KiB.
const MAX_CONFIG: u64 = 16 << 20;
/// HOST_NAME_MAX (hostname(7)).
const MAX_HOSTNAME: usize = 64;
const MIB: u64 = 1 << 20;

/// containerd's own annotations (internal/cri/annotations).
const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
const SANDBOX_ID: &str = "io.kubernetes.cri.sandbox-id";
const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
const SANDBOX_MEMORY: &str = "io.kubernetes.cri.sandbox-memory";
const SANDBOX_QUOTA: &str = "io.kubernetes.cri.sandbox-cpu-quota";
const SANDBOX_PERIOD: &str = "io.kubernetes.cri.sandbox-cpu-period";
/// In the pod's record: path of the network namespace that containerd created.
pub(crate) const NETNS: &str = "nacelle.dev/netns";

/// How a task belongs to a pod.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ContainerType {
    /// The pause container of a Kubernetes pod: the task is the VM.
    PodSandbox,
    /// A container of a Kubernetes pod.
    PodContainer { pod: String },
    /// A container without a pod (ctr, nerdctl); it has its own VM.
    SingleContainer,
}

pub(crate) fn read(bundle: &Path) -> Result<Spec> {
    let path = bundle.join("config.json");
    let what = || format!("reading {}", path.display());
    let mut text = Vec::new();
    File::open(&path)
        .with_context(what)?
        .take(MAX_CONFIG)
        .read_to_end(&mut text)
        .with_context(what)?;
    serde_json::from_slice(&text).with_context(what)
}

/// None if the bundle has no config.json: that of a sandbox which is created by the Sandbox service.
pub(crate) fn read_if_present(bundle: &Path) -> Result<Option<Spec>> {
    let path = bundle.join("config.json");
    match path.try_exists().with_context(|| format!("reading {}", path.display()))? {
        true => read(bundle).map(Some),
        false => Ok(None),
    }
}

fn annotation<'a>(spec: &'a Spec, name: &str) -> Option<&'a str> {
    spec.annotations().as_ref()?.get(name).map(String::as_str).filter(|text| !text.is_empty())
}

pub(crate) fn container_type(spec: &Spec) -> Result<ContainerType> {
    match annotation(spec, CONTAINER_TYPE) {
        Some("sandbox") => Ok(ContainerType::PodSandbox),
        Some("container") => {
            let pod = annotation(spec, SANDBOX_ID);
            let pod = pod.with_context(|| format!("annotation {SANDBOX_ID} is missing"))?;
            crate::args::validate_id("sandbox id", pod)?;
            Ok(ContainerType::PodContainer { pod: pod.to_owned() })
        }
        None => Ok(ContainerType::SingleContainer),
        Some(other) => bail!("annotation {CONTAINER_TYPE}: {other:?} is unknown"),
    }
}

fn namespace(spec: &Spec, kind: LinuxNamespaceType) -> Option<Option<PathBuf>> {
    let namespaces = spec.linux().as_ref()?.namespaces().as_ref()?;
    namespaces.iter().find(|n| n.typ() == kind).map(|n| n.path().clone())
}

/// The pod of a sandbox, or of a single container.
pub(crate) fn pod(namespace_name: &str, id: &str, spec: &Spec, settings: &Settings) -> PodSpec {
    let text = |name| annotation(spec, name).map(str::to_owned);
    let mut annotations = BTreeMap::new();
    if let Some(Some(netns)) = namespace(spec, LinuxNamespaceType::Network) {
        annotations.insert(NETNS.to_owned(), netns.to_string_lossy().into_owned());
    }
    let linux = spec.linux().as_ref();
    let sysctls = linux.and_then(|linux| linux.sysctl().clone()).unwrap_or_default();
    let size = Size::of(spec);
    PodSpec {
        meta: Meta {
            name: text(SANDBOX_NAME).unwrap_or_else(|| id.to_owned()),
            namespace: text(SANDBOX_NAMESPACE).unwrap_or_else(|| namespace_name.to_owned()),
            uid: text(SANDBOX_UID).unwrap_or_else(|| id.to_owned()),
            annotations,
            ..Meta::default()
        },
        hostname: hostname(spec.hostname().clone().unwrap_or_default(), id),
        handler: String::new(),
        cgroup_parent: cgroup_parent(spec),
        log_directory: String::new(),
        sysctls: sysctls.into_iter().collect(),
        dns: Dns::default(),
        ports: Vec::new(),
        vcpus: size.vcpus(settings),
        memory_mib: size.memory_mib(settings),
        cpu: CpuLimits::default(),
        host: None,
        origin: serde_json::Value::Null,
    }
}

/// Host name of a pod: the given one, or the beginning of its id.
pub(crate) fn hostname(given: String, id: &str) -> String {
    let mut hostname = given;
    if hostname.is_empty() {
        hostname = id.chars().take(12).collect();
    }
    hostname.truncate(hostname.floor_char_boundary(MAX_HOSTNAME));
    hostname
}

/// Limits that decide the size of a VM; not positive: unlimited.
pub(crate) struct Size {
    /// Bytes.
    pub(crate) memory: Option<i64>,
    /// Microseconds.
    pub(crate) quota: Option<i64>,
    pub(crate) period: Option<i64>,
}

impl Size {
    /// From the CRI annotations, or from the single container's resources.
    fn of(spec: &Spec) -> Self {
        let number = |name| annotation(spec, name).and_then(|text| text.parse::<i64>().ok());
        let resources = spec.linux().as_ref().and_then(|linux| linux.resources().as_ref());
        let memory = resources.and_then(|r| r.memory().as_ref()).and_then(|memory| memory.limit());
        let cpu = resources.and_then(|r| r.cpu().as_ref());
        let period = cpu.and_then(|cpu| cpu.period()).and_then(|p| i64::try_from(p).ok());
        Self {
            memory: number(SANDBOX_MEMORY).or(memory),
            quota: number(SANDBOX_QUOTA).or_else(|| cpu.and_then(|cpu| cpu.quota())),
            period: number(SANDBOX_PERIOD).or(period),
        }
    }

    pub(crate) fn memory_mib(&self, settings: &Settings) -> Option<u32> {
        let bytes = self.memory.and_then(|bytes| u64::try_from(bytes).ok()).filter(|b| *b > 0)?;
        let mib = u32::try_from(bytes.div_ceil(MIB)).unwrap_or(u32::MAX);
        Some(mib.saturating_add(settings.guest_overhead_mib).max(settings.min_memory_mib))
    }

    pub(crate) fn vcpus(&self, settings: &Settings) -> Option<u8> {
        let quota = self.quota.and_then(|quota| u64::try_from(quota).ok()).filter(|q| *q > 0)?;
        let period = self.period.filter(|period| *period > 0).unwrap_or(100_000);
        let cpus = quota.div_ceil(period.unsigned_abs());
        let host = std::thread::available_parallelism().map_or(1, |n| n.get()) as u64;
        let cpus = u8::try_from(cpus.clamp(1, host)).unwrap_or(u8::MAX);
        Some(cpus.min(settings.max_vcpus.max(1)))
    }
}

/// Parent of the VMM's cgroup, from `cgroupsPath` of the specification: a path, or systemd's
/// `slice:prefix:name`.
fn cgroup_parent(spec: &Spec) -> String {
    let path = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    let text = path.unwrap_or_default().to_string_lossy().into_owned();
    if let Some((slice, _)) = text.split_once(':') {
        return slice.to_owned();
    }
    let parent = Path::new(&text).parent().unwrap_or(Path::new(""));
    match parent.to_string_lossy() {
        root if root == "/" => String::new(),
        parent => parent.into_owned(),
    }
}

/// A container whose lower layer is mounted at `rootfs`, on the host.
pub(crate) fn container(
    id: &str,
    mut spec: Spec,
    rootfs: &Path,
    terminal: bool,
    stdin: bool,
) -> Result<ContainerSpec> {
    if spec.hooks().as_ref().is_some_and(|hooks| *hooks != Default::default()) {
        bail!("OCI hooks are not supported: the container has no process on the host");
    }
    let mut volumes = vec![Volume {
        container_path: "/".to_owned(),
        source: VolumeSource::Shared { host_path: rootfs.to_owned() },
        access: Access::ReadOnly,
        propagation: Propagation::Private,
    }];
    let mut mounts = Vec::new();
    for mount in spec.mounts().clone().unwrap_or_default() {
        match volume(&mount)? {
            MountKind::Guest => mounts.push(mount),
            MountKind::Volume(volume) => volumes.push(volume),
            MountKind::Pod => {}
        }
    }
    spec.set_mounts(Some(mounts));
    let devices = take_block_devices(&mut spec);
    let pid = match namespace(&spec, LinuxNamespaceType::Pid) {
        Some(None) => PidMode::Container,
        // Another container's (all pids are the VMM's), or the host's: the pod's in the guest.
        Some(Some(_)) | None => PidMode::Pod,
    };
    let read_only = spec.root().as_ref().and_then(|root| root.readonly()).unwrap_or(false);
    Ok(ContainerSpec {
        meta: Meta { name: id.to_owned(), ..Meta::default() },
        rootfs: RootfsSpec { image: PathBuf::new(), read_only, volumes: Vec::new() },
        oci: spec,
        user: String::new(),
        pid,
        stdin,
        // CloseIO closes the stream, and the process must read end of file.
        stdin_once: true,
        tty: terminal,
        log_path: String::new(),
        volumes,
        devices,
        // containerd has resolved the groups.
        strict_groups: true,
        image_name: String::new(),
        image_id: String::new(),
        stop_signal: 15,
        strict_volumes: Vec::new(),
        origin: serde_json::Value::Null,
    })
}

enum MountKind {
    /// A file system mounted by the guest.
    Guest,
    Volume(Volume),
    /// Provided by the pod's VM.
    Pod,
}

/// Options of bind mounts that volumes of a guest cannot have yet.
const UNSUPPORTED: [&str; 8] =
    ["nosuid", "nodev", "noexec", "rnosuid", "rnodev", "rnoexec", "idmap", "ridmap"];

/// Files that a pod's VM provides if nothing is mounted there.
const POD_FILES: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

fn volume(mount: &Mount) -> Result<MountKind> {
    let options = mount.options().as_deref().unwrap_or_default();
    let has = |name: &str| options.iter().any(|option| option == name);
    let is_bind = mount.typ().as_deref() == Some("bind") || has("bind") || has("rbind");
    if !is_bind {
        return Ok(MountKind::Guest);
    }
    let destination = mount.destination();
    // containerd's is a tmpfs on the host; containers of a pod share the guest's instead.
    if destination == Path::new("/dev/shm") {
        return Ok(MountKind::Pod);
    }
    let Some(source) = mount.source().clone().filter(|source| source.is_absolute()) else {
        bail!("mount {}: its source is not an absolute path", destination.display());
    };
    // containerd 1.7 makes no such files for a pod of the Sandbox service, but mounts an empty directory.
    if POD_FILES.iter().any(|file| destination == Path::new(file)) && source.is_dir() {
        return Ok(MountKind::Pod);
    }
    let Some(container_path) = destination.to_str() else {
        bail!("mount {}: not UTF-8", destination.display());
    };
    // A mount without it would be less strict than the request.
    if let Some(option) = options.iter().find(|option| UNSUPPORTED.contains(&option.as_str())) {
        bail!("mount {container_path}: option {option} is not supported for bind mounts");
    }
    let access = match (has("rro"), has("ro")) {
        (true, _) => Access::ReadOnlyRecursive,
        (false, true) => Access::ReadOnly,
        (false, false) => Access::ReadWrite,
    };
    let propagation = match () {
        () if has("rshared") || has("shared") => Propagation::Bidirectional,
        () if has("rslave") || has("slave") => Propagation::HostToContainer,
        () => Propagation::Private,
    };
    Ok(MountKind::Volume(Volume {
        container_path: container_path.to_owned(),
        source: VolumeSource::Shared { host_path: source },
        access,
        propagation,
    }))
}

/// Block devices of the host become disks of the VM, as their device numbers differ there.
fn take_block_devices(spec: &mut Spec) -> Vec<BlockDevice> {
    let Some(linux) = spec.linux_mut() else { return Vec::new() };
    let Some(all) = linux.devices().clone() else { return Vec::new() };
    let (blocks, others): (Vec<_>, Vec<_>) =
        all.into_iter().partition(|device| device.typ() == LinuxDeviceType::B);
    linux.set_devices(Some(others));
    let rules = linux.resources().as_ref().and_then(|r| r.devices().clone()).unwrap_or_default();
    let mut permissions: HashMap<(i64, i64), String> = HashMap::new();
    for rule in rules.iter().filter(|rule| rule.allow()) {
        if let (Some(major), Some(minor)) = (rule.major(), rule.minor()) {
            permissions.insert((major, minor), rule.access().clone().unwrap_or_default());
        }
    }
    let block = |device: oci_spec::runtime::LinuxDevice| {
        let number = (device.major(), device.minor());
        BlockDevice {
            host_path: format!("/dev/block/{}:{}", number.0, number.1).into(),
            container_path: device.path().to_string_lossy().into_owned(),
            permissions: permissions.remove(&number).unwrap_or_else(|| "rwm".to_owned()),
        }
    };
    blocks.into_iter().map(block).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn spec(value: serde_json::Value) -> Spec {
        let mut whole = json!({ "ociVersion": "1.0.2",
            "process": { "cwd": "/", "args": ["sh"], "user": { "uid": 0, "gid": 0 } } });
        for (name, value) in value.as_object().unwrap() {
            whole[name] = value.clone();
        }
        serde_json::from_value(whole).unwrap()
    }

    #[test]
    fn the_container_type_is_read_from_the_annotations() {
        let of = |annotations| container_type(&spec(json!({ "annotations": annotations })));
        assert_eq!(of(json!({ CONTAINER_TYPE: "sandbox" })).unwrap(), ContainerType::PodSandbox);
        let container = of(json!({ CONTAINER_TYPE: "container", SANDBOX_ID: "p" })).unwrap();
        assert_eq!(container, ContainerType::PodContainer { pod: "p".into() });
        assert_eq!(of(json!({})).unwrap(), ContainerType::SingleContainer);
        assert!(of(json!({ CONTAINER_TYPE: "container" })).is_err());
        assert!(of(json!({ CONTAINER_TYPE: "container", SANDBOX_ID: "../p" })).is_err());
        assert!(of(json!({ CONTAINER_TYPE: "x" })).is_err());
    }

    #[test]
    fn the_pods_resources_and_cgroup_parent_are_those_of_the_specification() {
        let settings = Settings::default();
        let pod_of = |value| pod("k8s.io", "0123456789abcdef", &spec(value), &settings);
        let kubelet = pod_of(json!({
            "hostname": "web-0",
            "annotations": { SANDBOX_MEMORY: "268435456", SANDBOX_QUOTA: "150000",
                SANDBOX_PERIOD: "100000", SANDBOX_NAME: "web", SANDBOX_NAMESPACE: "shop" },
            "linux": { "cgroupsPath": "kubepods-burstable-podx.slice:cri-containerd:0123",
                "namespaces": [{ "type": "network", "path": "/run/netns/a" }],
                "sysctl": { "net.core.somaxconn": "9" } } }));
        assert_eq!(kubelet.memory_mib, Some(256 + 128));
        assert!(kubelet.vcpus.is_some_and(|cpus| (1..=2).contains(&cpus)));
        assert_eq!(kubelet.cgroup_parent, "kubepods-burstable-podx.slice");
        assert_eq!((&*kubelet.hostname, &*kubelet.meta.name), ("web-0", "web"));
        assert_eq!(kubelet.meta.annotations[NETNS], "/run/netns/a");
        assert_eq!(kubelet.sysctls["net.core.somaxconn"], "9");

        let ctr = pod_of(json!({ "linux": { "cgroupsPath": "/default/one",
            "resources": { "memory": { "limit": 1048576 } },
            "namespaces": [{ "type": "network" }] } }));
        assert_eq!((&*ctr.cgroup_parent, &*ctr.hostname), ("/default", "0123456789ab"));
        assert_eq!((ctr.memory_mib, ctr.vcpus), (Some(129), None));
        assert!(!ctr.meta.annotations.contains_key(NETNS));
        // Zero and negative values mean "no limit".
        let open = pod_of(json!({ "annotations": { SANDBOX_MEMORY: "0", SANDBOX_QUOTA: "-1" } }));
        assert_eq!((open.memory_mib, open.vcpus), (None, None));
        assert_eq!(open.cgroup_parent, "");
    }

    #[test]
    fn bind_mounts_become_volumes_and_other_mounts_stay() {
        let spec = spec(json!({
            "root": { "path": "rootfs", "readonly": true },
            "mounts": [
                { "destination": "/proc", "type": "proc", "source": "proc" },
                { "destination": "/dev/shm", "type": "bind", "source": "/run/shm",
                  "options": ["rbind", "rw"] },
                { "destination": "/etc/hosts", "type": "bind", "source": "/var/h",
                  "options": ["rbind", "rprivate", "ro"] },
                { "destination": "/data", "source": "/srv", "options": ["rbind", "rslave"] } ],
            "linux": {
                "namespaces": [{ "type": "pid" }],
                "devices": [
                    { "path": "/dev/data", "type": "b", "major": 8, "minor": 16 },
                    { "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 } ],
                "resources": { "devices": [
                    { "allow": true, "type": "b", "major": 8, "minor": 16, "access": "r" } ] } } }));
        let made = container("c", spec, Path::new("/b/rootfs"), true, false).unwrap();
        let volumes: Vec<_> = made.volumes.iter().map(|v| (&*v.container_path, v.access)).collect();
        let expected = [
            ("/", Access::ReadOnly),
            ("/etc/hosts", Access::ReadOnly),
            ("/data", Access::ReadWrite),
        ];
        assert_eq!(volumes, expected);
        assert_eq!(made.volumes[2].propagation, Propagation::HostToContainer);
        assert!(made.volumes[0].is_lower_layer(&made.rootfs));
        assert!(made.rootfs.read_only && made.tty && made.pid == PidMode::Container);
        assert_eq!(made.oci.mounts().as_ref().unwrap().len(), 1);
        assert_eq!(made.devices[0].host_path, Path::new("/dev/block/8:16"));
        assert_eq!(
            (&*made.devices[0].container_path, &*made.devices[0].permissions),
            ("/dev/data", "r")
        );
        assert_eq!(made.oci.linux().as_ref().unwrap().devices().as_ref().unwrap().len(), 1);
    }

    #[test]
    fn directories_in_place_of_the_pods_files_are_not_mounted() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "").unwrap();
        let mounts = |source: &Path| {
            let mount = |destination: &str| {
                json!({ "destination": destination, "type": "bind", "source": source,
                    "options": ["rbind"] })
            };
            let all = ["/etc/hosts", "/etc/resolv.conf", "/etc/hostname", "/etc/conf"].map(mount);
            let spec = spec(json!({ "mounts": all }));
            container("c", spec, Path::new("/b/rootfs"), false, false).unwrap().volumes.len() - 1
        };
        assert_eq!(mounts(&file), 4);
        assert_eq!(mounts(dir.path()), 1);
    }

    #[test]
    fn hooks_and_relative_sources_are_refused() {
        let hooks = spec(json!({ "hooks": { "createRuntime": [{ "path": "/x" }] } }));
        assert!(container("c", hooks, Path::new("/b"), false, false).is_err());
        let relative = spec(json!({ "mounts": [
            { "destination": "/x", "type": "bind", "source": "y", "options": ["bind"] }] }));
        assert!(container("c", relative, Path::new("/b"), false, false).is_err());
    }

    #[test]
    fn options_of_bind_mounts_that_would_be_lost_are_refused() {
        for (option, supported) in [("noexec", false), ("rnosuid", false), ("suid", true)] {
            let spec = spec(json!({ "mounts": [
                { "destination": "/x", "type": "bind", "source": "/y", "options": ["bind", option] }] }));
            let made = container("c", spec, Path::new("/b"), false, false);
            assert_eq!(made.is_ok(), supported, "{option}");
            let error = made.err().map(|error| error.to_string()).unwrap_or_default();
            assert!(supported || error.contains(&format!("/x: option {option}")), "{error}");
        }
    }
}
