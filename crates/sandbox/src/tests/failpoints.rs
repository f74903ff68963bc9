//! Runs scenarios with each failpoint ([`crate::failpoint`]), one at a time: a step fails once, or
//! the daemon stops as by SIGKILL. After a failure a caller that retries succeeds; after a crash
//! the next daemon keeps what was acknowledged. In both cases nothing is left at the end: no
//! process, cgroup, file or network, and names and uids are free.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::test_node::{TestNode, eventually};
use super::volumes::{publish, volume};
use crate::failpoint::{Action, Failpoints, Hook, When};
use crate::model::{
    Access, ContainerState, Filter, HostNamespaces, PodResources, PodSpec, PodState, Volume,
    VolumeSource,
};
use crate::observe::Unobserved;
use crate::{Config, Error, Sandboxes};

/// Parallel runs: a run mostly waits.
const PARALLEL: usize = 4;
/// Longest wait for a result.
const LIMIT: Duration = Duration::from_secs(15);
/// Timed calls: a scenario may end before them.
const TIMED: [&str; 4] =
    ["guest: stats", "guest: events", "guest: acknowledge events", "guest: shut down"];

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Failpoint {
    when: When,
    what: String,
    /// Occurrence, from 1.
    nth: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Scenario {
    Vm,
    /// A host pod.
    Host,
    /// A pod recovered from a previous daemon.
    Recovered,
}

/// Counts reached failpoints, and acts at one of them.
struct FailpointHook {
    failpoint: Option<Failpoint>,
    action: Action,
    seen: Mutex<BTreeMap<(When, String), usize>>,
    hit: AtomicBool,
    over: AtomicBool,
    crashed: AtomicBool,
    crash_sender: Mutex<Option<oneshot::Sender<()>>>,
}

impl FailpointHook {
    fn new(failpoint: Option<Failpoint>, action: Action) -> (Arc<Self>, oneshot::Receiver<()>) {
        let (crash_sender, crash) = oneshot::channel();
        let hook = Self {
            failpoint,
            action,
            seen: Mutex::default(),
            hit: AtomicBool::new(false),
            over: AtomicBool::new(false),
            crashed: AtomicBool::new(false),
            crash_sender: Mutex::new(Some(crash_sender)),
        };
        (Arc::new(hook), crash)
    }
}

impl Hook for FailpointHook {
    fn reached(&self, when: When, what: &str) -> Action {
        if self.crashed.load(Ordering::SeqCst) {
            return Action::Crash;
        }
        if self.over.load(Ordering::SeqCst) {
            return Action::Continue;
        }
        let nth = {
            let mut seen = self.seen.lock().unwrap();
            let count = seen.entry((when, what.to_owned())).or_default();
            *count += 1;
            *count
        };
        let here = |p: &Failpoint| p.when == when && p.what == what && p.nth == nth;
        if !self.failpoint.as_ref().is_some_and(here) {
            return Action::Continue;
        }
        self.hit.store(true, Ordering::SeqCst);
        if self.action == Action::Crash {
            self.crashed.store(true, Ordering::SeqCst);
            if let Some(crash_sender) = self.crash_sender.lock().unwrap().take() {
                let _ = crash_sender.send(());
            }
        }
        self.action
    }
}

fn pod_spec(node: &TestNode, scenario: Scenario) -> PodSpec {
    let host = HostNamespaces { network: true, pid: true, ipc: false };
    PodSpec { host: (scenario == Scenario::Host).then_some(host), ..node.pod_spec("p") }
}

/// One of each volume kind with state on the host.
fn volumes(node: &TestNode) -> Vec<Volume> {
    let (config, message, shared) =
        (node.path("config"), node.path("message"), node.path("shared"));
    std::fs::write(&message, "before").unwrap();
    std::fs::create_dir_all(&shared).unwrap();
    if !config.exists() {
        publish(&config, "..1", &[("a", "1")]);
    }
    [
        VolumeSource::Synced { host_path: config },
        VolumeSource::WrittenBack { host_path: message },
        VolumeSource::Shared { host_path: shared },
    ]
    .map(|source| volume(source, Access::ReadWrite))
    .into()
}

/// Results that the caller received before the crash.
#[derive(Debug, Default, Clone)]
struct Acknowledged {
    pod: Option<String>,
    resized: bool,
    container: Option<String>,
    started: bool,
    exited: bool,
    second_started: bool,
}

/// A caller that stops at the first failure.
async fn run_until_failure(
    daemon: &Sandboxes,
    node: &TestNode,
    scenario: Scenario,
    acknowledged: &Mutex<Acknowledged>,
) {
    let Ok(pod) = daemon.run_pod(pod_spec(node, scenario)).await else { return };
    acknowledged.lock().unwrap().pod = Some(pod.clone());
    let change = PodResources { memory_mib: Some(1024), ..PodResources::default() };
    if daemon.update_pod(&pod, change).await.is_err() {
        return;
    }
    acknowledged.lock().unwrap().resized = scenario == Scenario::Vm;
    let mut spec = node.container_spec("app", &["print", "one\ntwo\n"]);
    spec.volumes = volumes(node);
    let Ok(id) = daemon.create_container(&pod, spec).await else { return };
    acknowledged.lock().unwrap().container = Some(id.clone());
    if daemon.start_container(&id).await.is_err() {
        return;
    }
    acknowledged.lock().unwrap().started = true;
    eventually("exit", || daemon.container(&id).is_ok_and(|c| c.exit.is_some())).await;
    acknowledged.lock().unwrap().exited = true;
    let other = node.container_spec("other", &["forever"]);
    let Ok(other) = daemon.create_container(&pod, other).await else { return };
    if daemon.start_container(&other).await.is_err() {
        return;
    }
    acknowledged.lock().unwrap().second_started = true;
    if daemon.remove_container(&id).await.is_err() || daemon.stop_pod(&pod).await.is_err() {
        return;
    }
    let _ = daemon.remove_pod(&pod).await;
}

/// Retries until it succeeds, as a kubelet does.
async fn retry<T, F: Future<Output = Result<T, Error>>>(what: &str, call: impl Fn() -> F) -> T {
    let began = Instant::now();
    loop {
        match call().await {
            Ok(done) => return done,
            Err(error) => assert!(began.elapsed() < LIMIT, "timed out: {what}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// Starts a container: one whose start failed is removed, and created again with the next attempt.
async fn running(
    daemon: &Sandboxes,
    node: &TestNode,
    pod: &str,
    name: &str,
    args: &[&str],
) -> String {
    for attempt in 0.. {
        let mut spec = node.container_spec(name, args);
        (spec.meta.attempt, spec.log_path) = (attempt, format!("{name}-{attempt}.log"));
        if name == "app" {
            spec.volumes = volumes(node);
        }
        let id = retry("create", || daemon.create_container(pod, spec.clone())).await;
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Created);
        if daemon.start_container(&id).await.is_ok() {
            return id;
        }
        retry("removal of a container", || daemon.remove_container(&id)).await;
        assert!(daemon.container(&id).is_err());
    }
    unreachable!()
}

/// A caller that retries.
async fn run_with_retries(daemon: &Sandboxes, node: &TestNode, scenario: Scenario) {
    let pod = retry("start of a pod", || daemon.run_pod(pod_spec(node, scenario))).await;
    let state = |pod: &str| daemon.pod(pod).unwrap().state;
    assert_eq!(state(&pod), PodState::Ready);
    let change = PodResources { memory_mib: Some(1024), ..PodResources::default() };
    retry("resizing", || daemon.update_pod(&pod, change)).await;
    let id = running(daemon, node, &pod, "app", &["print", "one\ntwo\n"]).await;
    let exited = |id: &str| daemon.container(id).unwrap().state == ContainerState::Exited;
    eventually("exit", || exited(&id)).await;
    let container = daemon.container(&id).unwrap();
    assert_eq!(container.exit.unwrap().code, 0);
    assert_eq!(node.log(&container.spec.log_path), ["one", "two"]);
    let other = running(daemon, node, &pod, "other", &["forever"]).await;
    assert_eq!(daemon.container(&other).unwrap().state, ContainerState::Running);
    retry("removal of a container", || daemon.remove_container(&id)).await;
    assert_eq!(daemon.containers(&Filter::default()).len(), 1);
    retry("stop of the pod", || daemon.stop_pod(&pod)).await;
    assert_eq!(state(&pod), PodState::NotReady);
    assert!(exited(&other), "a container runs in a stopped pod");
    retry("removal of the pod", || daemon.remove_pod(&pod)).await;
}

/// Recovers the previous daemon's pod with a running container, and removes it.
async fn run_after_recovery(daemon: &Sandboxes, node: &TestNode) {
    let pod = daemon.pods(&Filter::default()).remove(0).id;
    let id = daemon.containers(&Filter::default()).remove(0).id;
    node.guest(&pod).print(&id, "later\n");
    eventually("output after recovery", || node.log("kept.log") == ["first", "later"]).await;
    assert_eq!(daemon.pod(&pod).unwrap().state, PodState::Ready);
    assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
    let stop = || daemon.stop_container(&id, Duration::from_millis(500));
    retry("stop of a container", stop).await;
    assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Exited);
    retry("removal of the pod", || daemon.remove_pod(&pod)).await;
}

async fn start_pod_and_shut_down(node: &TestNode) {
    let daemon = node.daemon_with(config(node)).await;
    let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
    let mut spec = node.container_spec("kept", &["print-forever", "first\n"]);
    spec.volumes = volumes(node);
    let id = daemon.create_container(&pod, spec).await.unwrap();
    daemon.start_container(&id).await.unwrap();
    eventually("output", || node.log("kept.log") == ["first"]).await;
    daemon.shutdown().await;
}

/// Asserts that nothing is left, and that the pod's name and uid are free.
async fn assert_nothing_left(daemon: &Sandboxes, node: &TestNode) {
    let began = Instant::now();
    while !node.leftovers().is_empty() {
        assert!(began.elapsed() < LIMIT, "left: {:?}", node.leftovers());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(daemon.pods(&Filter::default()).is_empty());
    assert!(daemon.containers(&Filter::default()).is_empty());
    let again = retry("another pod of the name", || daemon.run_pod(node.pod_spec("p"))).await;
    let header = node.path("r/pods").join(&again).join("header.json");
    let header: serde_json::Value =
        serde_json::from_slice(&std::fs::read(header).unwrap()).unwrap();
    assert_eq!(header["jail_uid"], node.config().uid_base, "a uid is not free");
    daemon.remove_pod(&again).await.unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Long ping limits, so that a busy machine does not make guests unresponsive.
fn config(node: &TestNode) -> Config {
    Config { ping_interval_ms: 2_000, ping_misses: 15, ..node.config() }
}

async fn daemon_with_hook(node: &TestNode, hook: Arc<FailpointHook>) -> Sandboxes {
    let shared = Arc::new(node.clone());
    let failpoints = Failpoints::new(hook);
    let unobserved = Arc::new(Unobserved);
    let opened = Sandboxes::open_at(config(node), shared.clone(), shared, unobserved, failpoints);
    opened.await.unwrap()
}

/// Runs a scenario in which a step fails, or none; returns the hook.
fn fail(node: &TestNode, scenario: Scenario, failpoint: Option<Failpoint>) -> Arc<FailpointHook> {
    let (hook, _) = FailpointHook::new(failpoint, Action::Fail);
    let runtime = runtime();
    runtime.block_on(async {
        if scenario == Scenario::Recovered {
            start_pod_and_shut_down(node).await;
        }
        let daemon = daemon_with_hook(node, hook.clone()).await;
        match scenario {
            Scenario::Recovered => run_after_recovery(&daemon, node).await,
            Scenario::Vm | Scenario::Host => run_with_retries(&daemon, node, scenario).await,
        }
        hook.over.store(true, Ordering::SeqCst);
        assert_nothing_left(&daemon, node).await;
    });
    runtime.shutdown_background();
    hook
}

/// Runs a scenario until a crash, then the next daemon.
fn crash(node: &TestNode, scenario: Scenario, failpoint: Failpoint) -> Arc<FailpointHook> {
    let acknowledged = Arc::new(Mutex::new(Acknowledged::default()));
    let (hook, crash) = FailpointHook::new(Some(failpoint), Action::Crash);
    let first = runtime();
    first.block_on(async {
        if scenario == Scenario::Recovered {
            start_pod_and_shut_down(node).await;
        }
        let (node, acknowledged, hook) = (node.clone(), acknowledged.clone(), hook.clone());
        let run = tokio::spawn(async move {
            let daemon = daemon_with_hook(&node, hook).await;
            match scenario {
                Scenario::Recovered => run_after_recovery(&daemon, &node).await,
                Scenario::Vm | Scenario::Host => {
                    run_until_failure(&daemon, &node, scenario, &acknowledged).await;
                }
            }
        });
        tokio::select! {
            biased;
            Ok(()) = crash => {}
            _ = run => {}
        }
    });
    first.shutdown_background();

    let acknowledged = acknowledged.lock().unwrap().clone();
    let second = runtime();
    second.block_on(async {
        let daemon = node.daemon_with(config(node)).await;
        assert_acknowledged(&daemon, node, scenario, &acknowledged).await;
        // A caller that lost its replies removes all pods it sees.
        for pod in daemon.pods(&Filter::default()) {
            daemon.stop_pod(&pod.id).await.unwrap();
            assert_eq!(daemon.pod(&pod.id).unwrap().state, PodState::NotReady);
            daemon.remove_pod(&pod.id).await.unwrap();
        }
        assert_nothing_left(&daemon, node).await;
    });
    second.shutdown_background();
    hook
}

async fn assert_acknowledged(
    daemon: &Sandboxes,
    node: &TestNode,
    scenario: Scenario,
    acknowledged: &Acknowledged,
) {
    let Some(pod) = acknowledged.pod.as_ref().filter(|_| !acknowledged.second_started) else {
        return;
    };
    let view = daemon.pod(pod).unwrap();
    assert_eq!(view.state, PodState::Ready, "{acknowledged:?}");
    assert!(!acknowledged.resized || view.spec.memory_mib == Some(1024), "{acknowledged:?}");
    let Some(id) = &acknowledged.container else { return };
    let container = daemon.container(id).unwrap();
    if !acknowledged.started && !acknowledged.exited {
        assert!(container.exit.is_none_or(|exit| exit.code == 0), "{acknowledged:?}");
        return;
    }
    let state = || daemon.container(id).unwrap().state;
    eventually("exit after recovery", || state() == ContainerState::Exited).await;
    assert_eq!(daemon.container(id).unwrap().exit.unwrap().code, 0, "{acknowledged:?}");
    assert_eq!(node.log("app.log"), ["one", "two"], "{acknowledged:?}");
    let servers = node.inner.file_servers.lock().unwrap().len();
    assert_eq!(servers, usize::from(scenario == Scenario::Vm), "{acknowledged:?}");
}

/// All occurrences of record writes; the first and last of other failpoints.
fn reached_failpoints(hook: &FailpointHook) -> Vec<Failpoint> {
    let seen = hook.seen.lock().unwrap();
    let reached = seen.iter().flat_map(|((when, what), count)| {
        let nth: BTreeSet<usize> = match what.as_str() {
            "journal: record" => (1..=*count).collect(),
            what if TIMED.contains(&what) => [1].into(),
            _ => [1, *count].into(),
        };
        nth.into_iter().map(|nth| Failpoint { when: *when, what: what.clone(), nth })
    });
    reached.collect()
}

/// Runs a scenario once per failpoint, with this action.
fn run_at_every_failpoint(scenario: Scenario, action: Action, least: usize) {
    let Some(node) = TestNode::new() else { return };
    let failpoints = reached_failpoints(&fail(&node, scenario, None));
    node.clean();
    assert!(
        failpoints.len() >= least,
        "only {} failpoints are reached: {failpoints:#?}",
        failpoints.len()
    );
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let worker = || {
        while let Some(failpoint) = failpoints.get(next.fetch_add(1, Ordering::SeqCst)) {
            let node = TestNode::new().unwrap();
            let run = std::panic::AssertUnwindSafe(|| match action {
                Action::Crash => crash(&node, scenario, failpoint.clone()),
                _ => fail(&node, scenario, Some(failpoint.clone())),
            });
            let ran = std::panic::catch_unwind(run);
            node.clean();
            let hit = ran.as_ref().is_ok_and(|hook| hook.hit.load(Ordering::SeqCst));
            let may_miss = failpoint.nth > 1 || TIMED.contains(&failpoint.what.as_str());
            if ran.is_err() || !(hit || may_miss) {
                failures.lock().unwrap().push((failpoint.clone(), ran.is_ok()));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..PARALLEL {
            scope.spawn(worker);
        }
    });
    let failures = failures.into_inner().unwrap();
    let total = failpoints.len();
    assert!(failures.is_empty(), "{scenario:?}: {} of {total}: {failures:#?}", failures.len());
}

#[test]
fn a_failed_step_is_retried_and_leaves_nothing() {
    run_at_every_failpoint(Scenario::Vm, Action::Fail, 60);
}

#[test]
fn a_crash_at_any_step_keeps_what_was_acknowledged() {
    run_at_every_failpoint(Scenario::Vm, Action::Crash, 60);
}

#[test]
fn a_host_pod_recovers_from_failures_and_crashes_at_any_step() {
    run_at_every_failpoint(Scenario::Host, Action::Fail, 40);
    run_at_every_failpoint(Scenario::Host, Action::Crash, 40);
}

#[test]
fn recovery_survives_failures_and_crashes_at_any_step() {
    run_at_every_failpoint(Scenario::Recovered, Action::Fail, 20);
    run_at_every_failpoint(Scenario::Recovered, Action::Crash, 20);
}
