//! Synthetic pods for tests and benchmarks of listings: in the registry as if recovered, each with
//! one running container and one measurement; not in the journal and without a guest.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use crate::launcher::{Launch, Launched, Program};
use crate::model::{ContainerSpec, Identity, Meta, PidMode, PodId, PodSpec, RootfsSpec};
use crate::pod::{self, Handle, InitialAction};
use crate::policy::{Container, ContainerPhase, EmptyDirs, Phase, Pod};
use crate::ports::{Attachment, Network, PortError};
use crate::stats::{ContainerStatsView, InterfaceView, PodStatsView};
use crate::{Error, Sandboxes};

/// Age of the pods: a listing may measure a new pod.
const AGE: Duration = Duration::from_secs(3600);

/// A node without a network and without VMs: starts of pods fail.
#[derive(Debug, Clone, Copy)]
pub struct EmptyNode;

impl EmptyNode {
    pub const NOT_READY: &str = "no CNI configuration";
}

fn unavailable(message: &str) -> PortError {
    PortError(anyhow::anyhow!(message.to_owned()))
}

#[async_trait]
impl Network for EmptyNode {
    fn netns_path(&self, pod: &PodId) -> PathBuf {
        Path::new("/nowhere").join(pod)
    }

    async fn attach(
        &self,
        _: &PodId,
        _: &PodSpec,
        _: &CancellationToken,
    ) -> Result<Attachment, PortError> {
        Err(unavailable("no network"))
    }

    async fn open_taps(&self, _: &PodId, _: &Attachment) -> Result<Vec<OwnedFd>, PortError> {
        Err(unavailable("no taps"))
    }

    async fn detach(&self, _: &PodId, _: &PodSpec) -> Result<(), PortError> {
        Ok(())
    }

    async fn not_ready_reason(&self) -> Option<String> {
        Some(Self::NOT_READY.into())
    }

    async fn collect_garbage(&self, _: &[PodId]) -> Result<(), PortError> {
        Ok(())
    }
}

#[async_trait]
impl Launch for EmptyNode {
    async fn launch(&self, _: Program) -> Result<Launched, Error> {
        Err(Error::Unavailable { message: "no VMs".into() })
    }
}

/// Adds `count` pods with this pod request and container request.
pub fn add(daemon: &Sandboxes, count: usize, pod: &Value, container: &Value) {
    for n in 0..count {
        let handle = add_pod(daemon, n, pod.clone(), container.clone());
        handle.set_stats(stats(&handle.pod()));
    }
}

/// Adds pods with these numbers without measurements; they cannot be measured.
pub fn add_without_stats(daemon: &Sandboxes, numbers: std::ops::Range<usize>) {
    for n in numbers {
        add_pod(daemon, n, Value::Null, Value::Null);
    }
}

/// Adds the `n`-th pod without a measurement.
pub(crate) fn add_pod(daemon: &Sandboxes, n: usize, pod: Value, container: Value) -> Arc<Handle> {
    let node = daemon.node();
    let since = SystemTime::now() - AGE;
    let meta = |name: String| Meta {
        name,
        namespace: "default".into(),
        uid: format!("{n:032x}"),
        attempt: 0,
        labels: labels(n),
        annotations: BTreeMap::new(),
    };
    let running = Container {
        id: format!("{n:064x}"),
        spec: Arc::new(container_spec(meta("app".into()), container)),
        phase: ContainerPhase::Present,
        created_at: since,
        started_at: Some(since),
        exit: None,
        drained: false,
        oom: false,
        log_path: PathBuf::from("app/0.log"),
        resources: Default::default(),
        user: Some(Identity { uid: 0, gid: 0, groups: vec![0] }),
        shares: Vec::new(),
    };
    let address = u32::from_be_bytes([10, 0, 0, 0]) + n as u32 + 1;
    let attachment = Attachment {
        addresses: vec![std::net::Ipv4Addr::from(address).into()],
        ..Default::default()
    };
    let id = format!("pod{n:061x}");
    let pod = Pod {
        id: id.clone(),
        spec: Arc::new(pod_spec(meta(format!("pod-{n}")), pod)),
        created_at: since,
        phase: Phase::Ready,
        reason: String::new(),
        uid: n as u32,
        netns: PathBuf::new(),
        ledger: Vec::new(),
        attachment: Arc::new(attachment),
        kernel_release: String::new(),
        trace: Vec::new(),
        empty_dirs: EmptyDirs::default(),
        containers: [(running.id.clone(), running)].into(),
        unreadable: false,
    };
    node.registry.insert_pod(&id, &pod.spec.meta.clone(), &[n as u32]);
    let (handle, _owner) = pod::new(node.clone(), pod, InitialAction::Recover);
    node.registry.set_handle(&id, handle.clone());
    handle
}

fn labels(n: usize) -> BTreeMap<String, String> {
    let labels = [("io.kubernetes.pod.namespace", "default".into()), ("n", n.to_string())];
    labels.map(|(name, value)| (name.to_string(), value)).into()
}

fn pod_spec(meta: Meta, origin: Value) -> PodSpec {
    PodSpec {
        hostname: meta.name.clone(),
        meta,
        handler: String::new(),
        cgroup_parent: String::new(),
        log_directory: String::new(),
        sysctls: BTreeMap::new(),
        dns: Default::default(),
        ports: Vec::new(),
        vcpus: None,
        memory_mib: None,
        cpu: Default::default(),
        host: None,
        origin,
    }
}

fn container_spec(meta: Meta, origin: Value) -> ContainerSpec {
    ContainerSpec {
        meta,
        rootfs: RootfsSpec { image: PathBuf::from("/i"), read_only: false, volumes: Vec::new() },
        oci: Default::default(),
        user: String::new(),
        pid: PidMode::Container,
        stdin: false,
        stdin_once: false,
        tty: false,
        log_path: "app/0.log".into(),
        volumes: Vec::new(),
        devices: Vec::new(),
        strict_groups: false,
        image_name: "registry.example/app:1".into(),
        image_id: format!("sha256:{:064x}", 1),
        stop_signal: 15,
        strict_volumes: Vec::new(),
        origin,
    }
}

pub(crate) fn stats(pod: &Pod) -> Arc<PodStatsView> {
    let at = SystemTime::now();
    let of = |id: &String| ContainerStatsView {
        id: id.clone(),
        at,
        cpu: Default::default(),
        memory: Default::default(),
        pids: 1,
        writable_layer: Default::default(),
        processes: Default::default(),
        block_io: Vec::new(),
        oom_events: 0,
        started_at: None,
    };
    Arc::new(PodStatsView {
        pod: pod.id.clone(),
        at,
        cpu: Default::default(),
        memory: Default::default(),
        pids: 1,
        interfaces: vec![InterfaceView { name: "eth0".into(), ..Default::default() }],
        io_pressure: None,
        empty_dirs: Vec::new(),
        containers: pod.containers.keys().map(of).collect(),
    })
}
