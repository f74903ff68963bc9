//! Scrapes over real sockets, of a fake node.

mod calls;
mod documents;
mod exposition;
mod hostile;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::{Duration, SystemTime};

use network::Verb;
use network::observe::{Observer as _, PluginRun};
use prometheus_client::registry::Registry;
use sandbox::model::{ContainerView, Meta, PodId, PodSpec, PodState, PodView};
use sandbox::observe::{
    DeathCause, Measured, Observer as _, OomVictim, Outcome, PodKind, StartedFrom,
};
use sandbox::stats::{
    BlockIoView, ContainerStatsView, CpuView, FsView, InterfaceView, MemoryView, PodStatsView,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::node::Source;
use super::{Counters, Node, Server, registry};
use crate::settings::Listen;
use exposition::{Family, parse};

#[derive(Clone, Default)]
struct Fake {
    pods: Arc<Mutex<Vec<PodView>>>,
    stats: Arc<Mutex<BTreeMap<PodId, Arc<PodStatsView>>>>,
}

impl Source for Fake {
    fn pods(&self) -> Vec<PodView> {
        self.pods.lock().unwrap().clone()
    }

    fn containers(&self) -> Vec<ContainerView> {
        Vec::new()
    }

    fn stats(&self) -> BTreeMap<PodId, Arc<PodStatsView>> {
        self.stats.lock().unwrap().clone()
    }
}

impl Fake {
    fn add(&self, id: &str, meta: Meta, stats: Option<PodStatsView>) {
        self.pods.lock().unwrap().push(view(id, meta));
        if let Some(stats) = stats {
            self.stats.lock().unwrap().insert(id.to_owned(), Arc::new(stats));
        }
    }

    fn remove(&self, id: &str) {
        self.pods.lock().unwrap().retain(|pod| pod.id != id);
        self.stats.lock().unwrap().remove(id);
    }
}

fn meta(name: &str, attempt: u32) -> Meta {
    Meta {
        name: name.into(),
        namespace: "default".into(),
        uid: format!("uid-of-{name}"),
        attempt,
        labels: BTreeMap::new(),
        annotations: BTreeMap::new(),
    }
}

fn view(id: &str, meta: Meta) -> PodView {
    let spec = PodSpec {
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
        origin: serde_json::Value::Null,
    };
    PodView {
        id: id.into(),
        spec: Arc::new(spec),
        state: PodState::Ready,
        created_at: SystemTime::UNIX_EPOCH,
        reason: String::new(),
        addresses: Vec::new(),
        netns: None,
        vmm_pid: None,
        kernel_release: String::new(),
        unreadable: false,
    }
}

/// `containers`: bytes that each read and wrote.
fn stats(id: &str, containers: &[(&str, u64, u64)]) -> PodStatsView {
    let at = SystemTime::UNIX_EPOCH;
    let io =
        |read_bytes, written_bytes| BlockIoView { read_bytes, written_bytes, ..Default::default() };
    let containers = containers.iter().map(|(id, read, written)| ContainerStatsView {
        id: (*id).into(),
        at,
        cpu: CpuView::default(),
        memory: MemoryView::default(),
        pids: 1,
        writable_layer: FsView { used_bytes: 4096, ..Default::default() },
        processes: Default::default(),
        block_io: vec![io(*read, *written)],
        oom_events: 0,
        started_at: None,
    });
    let interface = |name: &str, rx_bytes, tx_bytes| InterfaceView {
        name: name.into(),
        rx_bytes,
        tx_bytes,
        ..Default::default()
    };
    PodStatsView {
        pod: id.into(),
        at,
        cpu: CpuView { usage_ns: 2_500_000_000, ..Default::default() },
        memory: MemoryView { usage: 3 << 20, working_set: 2 << 20, ..Default::default() },
        pids: 1,
        interfaces: vec![interface("eth0", 100, 10), interface("net1", 5, 2)],
        io_pressure: None,
        containers: containers.collect(),
        empty_dirs: Vec::new(),
    }
}

/// A server on a unix socket.
struct Endpoint {
    server: Server,
    socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Endpoint {
    async fn start(registry: Arc<Registry>) -> Self {
        Self::start_with(registry, Duration::from_secs(60)).await
    }

    async fn start_with(registry: Arc<Registry>, limit: Duration) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("metrics.sock");
        let listen = Listen::Unix(socket.clone());
        let server = Server::start_with(&listen, || registry, limit).await.unwrap().unwrap();
        Self { server, socket, _dir: dir }
    }

    /// The whole reply to a request.
    async fn ask(&self, request: &str) -> String {
        let mut stream = UnixStream::connect(&self.socket).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = String::new();
        stream.read_to_string(&mut reply).await.unwrap();
        reply
    }

    async fn scrape(&self) -> Vec<Family> {
        let reply = self.ask("GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        assert!(head.starts_with("HTTP/1.1 200 "), "{head}");
        assert!(head.contains("text/plain; version=0.0.4"), "{head}");
        parse(body).unwrap_or_else(|error| panic!("{error}\n{body}"))
    }
}

/// The value of the series with exactly these labels.
fn value(families: &[Family], name: &str, labels: &[(&str, &str)]) -> Option<f64> {
    let wanted: BTreeMap<String, String> =
        labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
    let mut samples = families.iter().flat_map(|family| &family.samples);
    samples.find(|s| s.name == name && s.labels == wanted).map(|s| s.value)
}

/// Counters that have seen one measurement of each kind.
fn measured_counters() -> Counters {
    let counters = Counters::new();
    let took = Duration::from_millis(20);
    for measured in [
        Measured::StartPhase { phase: "boot", took },
        Measured::Start { kind: PodKind::Vm, outcome: Outcome::Ok, took },
        Measured::Start { kind: PodKind::Vm, outcome: Outcome::Failed, took },
        Measured::Boot { from: StartedFrom::Template, outcome: Outcome::Ok, took },
        Measured::TemplateSave { outcome: Outcome::Ok, took },
        Measured::VmmDeath { cause: DeathCause::Panic },
        Measured::OomKill { victim: OomVictim::Container },
        Measured::GuestCall { call: "configure the pod", outcome: Outcome::TimedOut, took },
        Measured::JournalWrite { outcome: Outcome::Ok, took },
        Measured::JournalSync { took },
    ] {
        counters.measured(measured);
    }
    let outcome = network::observe::Outcome::Failed;
    counters.plugin_ran(PluginRun { plugin: "bridge", verb: Verb::Add, outcome, took });
    image::observe::Observer::pulled(&counters, image::observe::Outcome::Ok, took);
    image::observe::Observer::fetched(&counters, 1234);
    cri::observe::Observer::called(&counters, "Version", tonic::Code::Ok, took);
    counters
}

async fn full() -> (Endpoint, Fake) {
    let fake = Fake::default();
    fake.add("a", meta("web", 0), Some(stats("a", &[("c1", 1000, 50), ("c2", 7, 3)])));
    let endpoint = Endpoint::start(registry(&measured_counters(), Node::new(fake.clone()))).await;
    (endpoint, fake)
}

#[tokio::test]
async fn what_was_measured_is_served() {
    let (endpoint, _) = full().await;
    let families = endpoint.scrape().await;
    let web = [("namespace", "default"), ("pod", "web"), ("uid", "uid-of-web")];
    for (name, labels, expected) in [
        ("nacelle_pod_starts_total", &[("kind", "vm"), ("result", "ok")][..], 1.0),
        ("nacelle_pod_starts_total", &[("kind", "vm"), ("result", "error")], 1.0),
        ("nacelle_pod_starts_total", &[("kind", "host"), ("result", "error")], 0.0),
        ("nacelle_pod_start_duration_seconds_count", &[("kind", "vm")], 1.0),
        ("nacelle_pod_start_phase_duration_seconds_sum", &[("phase", "boot")], 0.02),
        ("nacelle_vm_boots_total", &[("from", "template"), ("result", "ok")], 1.0),
        ("nacelle_vm_boots_total", &[("from", "kernel"), ("result", "ok")], 0.0),
        ("nacelle_vm_boot_duration_seconds_count", &[("from", "template")], 1.0),
        ("nacelle_template_saves_total", &[("result", "ok")], 1.0),
        ("nacelle_vmm_deaths_total", &[("cause", "panic")], 1.0),
        ("nacelle_vmm_deaths_total", &[("cause", "out_of_memory")], 0.0),
        ("nacelle_oom_kills_total", &[("victim", "container")], 1.0),
        ("nacelle_guest_calls_total", &[("call", "configure_the_pod"), ("result", "timeout")], 1.0),
        ("nacelle_journal_writes_total", &[("result", "ok")], 1.0),
        ("nacelle_journal_fsync_duration_seconds_count", &[], 1.0),
        (
            "nacelle_cni_operations_total",
            &[("operation", "ADD"), ("plugin", "bridge"), ("result", "error")],
            1.0,
        ),
        ("nacelle_image_pulls_total", &[("result", "ok")], 1.0),
        ("nacelle_image_fetched_bytes_total", &[], 1234.0),
        ("nacelle_cri_requests_total", &[("method", "Version"), ("code", "OK")], 1.0),
        ("nacelle_build_info", &[("version", env!("CARGO_PKG_VERSION"))], 1.0),
        ("nacelle_pods", &[("state", "ready")], 1.0),
        ("nacelle_pods", &[("state", "not_ready")], 0.0),
        ("nacelle_pod_cpu_usage_seconds_total", &web, 2.5),
        ("nacelle_pod_memory_usage_bytes", &web, f64::from(3 << 20)),
        ("nacelle_pod_memory_working_set_bytes", &web, f64::from(2 << 20)),
        ("nacelle_pod_network_receive_bytes_total", &web, 105.0),
        ("nacelle_pod_network_transmit_bytes_total", &web, 12.0),
        ("nacelle_pod_disk_read_bytes_total", &web, 1007.0),
        ("nacelle_pod_disk_written_bytes_total", &web, 53.0),
        ("nacelle_pod_filesystem_usage_bytes", &web, 8192.0),
    ] {
        assert_eq!(value(&families, name, labels), Some(expected), "{name} {labels:?}");
    }
    for name in ["process_resident_memory_bytes", "process_open_fds", "process_threads"] {
        assert!(value(&families, name, &[]).unwrap() >= 1.0, "{name}");
    }
    let started = value(&families, "process_start_time_seconds", &[]).unwrap();
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs_f64();
    assert!(started > now - 24.0 * 3600.0 && started < now + 60.0, "{started} {now}");
}

#[tokio::test]
async fn the_series_of_a_removed_pod_go() {
    let (endpoint, fake) = full().await;
    fake.add("b", meta("gone", 0), Some(stats("b", &[])));
    let of = |families: &[Family], pod: &str| {
        let samples = families.iter().flat_map(|family| &family.samples);
        samples.filter(|s| s.labels.get("pod").is_some_and(|name| name == pod)).count()
    };
    let families = endpoint.scrape().await;
    assert_eq!((of(&families, "web"), of(&families, "gone")), (8, 8));
    fake.remove("b");
    let families = endpoint.scrape().await;
    assert_eq!((of(&families, "web"), of(&families, "gone")), (8, 0));
    fake.remove("a");
    let families = endpoint.scrape().await;
    assert_eq!(of(&families, "web"), 0);
    assert_eq!(value(&families, "nacelle_pods", &[("state", "ready")]), Some(0.0));
}

#[tokio::test]
async fn of_two_attempts_at_a_pod_the_latest_is_shown() {
    let (endpoint, fake) = full().await;
    fake.add("z", meta("web", 1), Some(stats("z", &[("c", 1, 1)])));
    fake.add("0", meta("web", 0), Some(stats("0", &[("c", 2, 2)])));
    // parse() refuses duplicate series.
    let families = endpoint.scrape().await;
    let web = [("namespace", "default"), ("pod", "web"), ("uid", "uid-of-web")];
    assert_eq!(value(&families, "nacelle_pod_disk_read_bytes_total", &web), Some(1.0));
    assert_eq!(value(&families, "nacelle_pods", &[("state", "ready")]), Some(3.0));
}

#[tokio::test]
async fn bytes_of_a_removed_container_stay_in_its_pods_counters() {
    let (endpoint, fake) = full().await;
    let web = [("namespace", "default"), ("pod", "web"), ("uid", "uid-of-web")];
    let read = async || {
        let families = endpoint.scrape().await;
        value(&families, "nacelle_pod_disk_read_bytes_total", &web).unwrap()
    };
    assert_eq!(read().await, 1007.0);
    fake.stats.lock().unwrap().insert("a".into(), Arc::new(stats("a", &[("c2", 8, 3)])));
    assert_eq!(read().await, 1008.0);
    // It ends while the guest measures it, then it is removed.
    fake.stats.lock().unwrap().insert("a".into(), Arc::new(stats("a", &[("c2", 0, 0)])));
    assert_eq!(read().await, 1008.0);
    fake.stats.lock().unwrap().insert("a".into(), Arc::new(stats("a", &[])));
    assert_eq!(read().await, 1008.0);
    fake.stats.lock().unwrap().insert("a".into(), Arc::new(stats("a", &[("c3", u64::MAX, 0)])));
    assert_eq!(read().await, u64::MAX as f64);
}

#[tokio::test]
async fn labels_that_clients_choose_are_escaped_and_cut() {
    let (endpoint, fake) = full().await;
    let name = format!("a\"b\\c\nd{}", "é".repeat(1000));
    fake.add("x", meta(&name, 0), Some(stats("x", &[])));
    let families = endpoint.scrape().await;
    let mut samples = families.iter().flat_map(|family| &family.samples);
    let pod = samples.find_map(|s| s.labels.get("pod").filter(|pod| *pod != "web")).unwrap();
    assert!(pod.starts_with("a\"b\\c\ndé") && pod.len() <= 253, "{pod}");
}

#[tokio::test]
async fn a_loopback_port_serves_too_and_a_socket_is_removed_at_the_end() {
    let make = || registry(&Counters::new(), Node::new(Fake::default()));
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = Server::start(&Listen::Tcp(free), make).await.unwrap();
    let mut stream = tokio::net::TcpStream::connect(free).await.unwrap();
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut reply = String::new();
    stream.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 ") && reply.contains("nacelle_build_info"), "{reply}");
    let taken = Server::start(&Listen::Tcp(free), make).await.err().unwrap();
    assert!(format!("{taken:#}").contains(&free.to_string()), "{taken:#}");
    drop(server);

    assert!(Server::start(&Listen::Off, || panic!("not asked for")).await.unwrap().is_none());
    let endpoint = Endpoint::start(make()).await;
    assert!(endpoint.socket.exists());
    let Endpoint { server, socket, _dir } = endpoint;
    drop(server);
    assert!(!socket.exists());
}
