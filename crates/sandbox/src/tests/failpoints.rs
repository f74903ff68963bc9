//! Every place of [`crate::failpoint`], one at a time: there a step fails once, or the daemon ends as
//! by SIGKILL. After a failure a caller that tries again gets what it wants; after a crash the next
//! daemon keeps what was promised. Both times nothing is left in the end: no process, cgroup, file or
//! network, and names and uids are free.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::volumes::{publish, volume};
use super::world::{World, eventually};
use crate::failpoint::{Failpoints, Hook, Verdict, When};
use crate::model::{
    Access, ContainerState, Filter, HostNamespaces, PodResources, PodSpec, PodState, Volume,
    VolumeSource,
};
use crate::observe::Unobserved;
use crate::{Config, Error, Sandboxes};

/// Runs at a time: most of each is waiting.
const AT_ONCE: usize = 4;
/// What is not done after so long never is.
const LIMIT: Duration = Duration::from_secs(15);
/// What happens by the clock: a life may end before it.
const BY_THE_CLOCK: [&str; 4] =
    ["guest: stats", "guest: events", "guest: acknowledge events", "guest: shut down"];

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    when: When,
    what: String,
    /// The n-th time that it is reached, from 1.
    nth: usize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Life {
    Vm,
    /// Of a pod without a VM.
    Host,
    /// Of a pod that a former daemon has made.
    Recovered,
}

/// Counts what is reached, and acts at one place.
struct At {
    place: Option<Place>,
    verdict: Verdict,
    seen: Mutex<BTreeMap<(When, String), usize>>,
    hit: AtomicBool,
    over: AtomicBool,
    crashed: AtomicBool,
    tell: Mutex<Option<oneshot::Sender<()>>>,
}

impl At {
    fn new(place: Option<Place>, verdict: Verdict) -> (Arc<Self>, oneshot::Receiver<()>) {
        let (tell, crash) = oneshot::channel();
        let at = Self {
            place,
            verdict,
            seen: Mutex::default(),
            hit: AtomicBool::new(false),
            over: AtomicBool::new(false),
            crashed: AtomicBool::new(false),
            tell: Mutex::new(Some(tell)),
        };
        (Arc::new(at), crash)
    }
}

impl Hook for At {
    fn reached(&self, when: When, what: &str) -> Verdict {
        if self.crashed.load(Ordering::SeqCst) {
            return Verdict::Crash;
        }
        if self.over.load(Ordering::SeqCst) {
            return Verdict::Pass;
        }
        let nth = {
            let mut seen = self.seen.lock().unwrap();
            let count = seen.entry((when, what.to_owned())).or_default();
            *count += 1;
            *count
        };
        let here = |p: &Place| p.when == when && p.what == what && p.nth == nth;
        if !self.place.as_ref().is_some_and(here) {
            return Verdict::Pass;
        }
        self.hit.store(true, Ordering::SeqCst);
        if self.verdict == Verdict::Crash {
            self.crashed.store(true, Ordering::SeqCst);
            if let Some(tell) = self.tell.lock().unwrap().take() {
                let _ = tell.send(());
            }
        }
        self.verdict
    }
}

fn pod_spec(world: &World, life: Life) -> PodSpec {
    let host = HostNamespaces { network: true, pid: true, ipc: false };
    PodSpec { host: (life == Life::Host).then_some(host), ..world.pod_spec("p") }
}

/// One of each kind that lives on the host's side too.
fn volumes(world: &World) -> Vec<Volume> {
    let (config, message, shared) =
        (world.path("config"), world.path("message"), world.path("shared"));
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

/// What the caller has been promised by the time of the crash.
#[derive(Debug, Default, Clone)]
struct Promised {
    pod: Option<String>,
    resized: bool,
    container: Option<String>,
    started: bool,
    exited: bool,
    going: bool,
}

/// A caller that gives up at the first failure.
async fn whole_life(daemon: &Sandboxes, world: &World, life: Life, promised: &Mutex<Promised>) {
    let Ok(pod) = daemon.run_pod(pod_spec(world, life)).await else { return };
    promised.lock().unwrap().pod = Some(pod.clone());
    let change = PodResources { memory_mib: Some(1024), ..PodResources::default() };
    if daemon.update_pod(&pod, change).await.is_err() {
        return;
    }
    promised.lock().unwrap().resized = life == Life::Vm;
    let mut spec = world.container_spec("app", &["print", "one\ntwo\n"]);
    spec.volumes = volumes(world);
    let Ok(id) = daemon.create_container(&pod, spec).await else { return };
    promised.lock().unwrap().container = Some(id.clone());
    if daemon.start_container(&id).await.is_err() {
        return;
    }
    promised.lock().unwrap().started = true;
    eventually("exit", || daemon.container(&id).is_ok_and(|c| c.exit.is_some())).await;
    promised.lock().unwrap().exited = true;
    let other = world.container_spec("other", &["forever"]);
    let Ok(other) = daemon.create_container(&pod, other).await else { return };
    if daemon.start_container(&other).await.is_err() {
        return;
    }
    promised.lock().unwrap().going = true;
    if daemon.remove_container(&id).await.is_err() || daemon.stop_pod(&pod).await.is_err() {
        return;
    }
    let _ = daemon.remove_pod(&pod).await;
}

/// Tries until it succeeds, as a kubelet does.
async fn persist<T, F: Future<Output = Result<T, Error>>>(what: &str, call: impl Fn() -> F) -> T {
    let began = Instant::now();
    loop {
        match call().await {
            Ok(done) => return done,
            Err(error) => assert!(began.elapsed() < LIMIT, "never: {what}: {error}"),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A container that runs: one whose start has failed is removed, and made again with the next attempt.
async fn running(
    daemon: &Sandboxes,
    world: &World,
    pod: &str,
    name: &str,
    args: &[&str],
) -> String {
    for attempt in 0.. {
        let mut spec = world.container_spec(name, args);
        (spec.meta.attempt, spec.log_path) = (attempt, format!("{name}-{attempt}.log"));
        if name == "app" {
            spec.volumes = volumes(world);
        }
        let id = persist("create", || daemon.create_container(pod, spec.clone())).await;
        assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Created);
        if daemon.start_container(&id).await.is_ok() {
            return id;
        }
        persist("removal of a container", || daemon.remove_container(&id)).await;
        assert!(daemon.container(&id).is_err());
    }
    unreachable!()
}

/// A caller that tries again.
async fn stubborn_life(daemon: &Sandboxes, world: &World, life: Life) {
    let pod = persist("start of a pod", || daemon.run_pod(pod_spec(world, life))).await;
    let state = |pod: &str| daemon.pod(pod).unwrap().state;
    assert_eq!(state(&pod), PodState::Ready);
    let change = PodResources { memory_mib: Some(1024), ..PodResources::default() };
    persist("resizing", || daemon.update_pod(&pod, change)).await;
    let id = running(daemon, world, &pod, "app", &["print", "one\ntwo\n"]).await;
    let exited = |id: &str| daemon.container(id).unwrap().state == ContainerState::Exited;
    eventually("exit", || exited(&id)).await;
    let container = daemon.container(&id).unwrap();
    assert_eq!(container.exit.unwrap().code, 0);
    assert_eq!(world.log(&container.spec.log_path), ["one", "two"]);
    let other = running(daemon, world, &pod, "other", &["forever"]).await;
    assert_eq!(daemon.container(&other).unwrap().state, ContainerState::Running);
    persist("removal of a container", || daemon.remove_container(&id)).await;
    assert_eq!(daemon.containers(&Filter::default()).len(), 1);
    persist("stop of the pod", || daemon.stop_pod(&pod)).await;
    assert_eq!(state(&pod), PodState::NotReady);
    assert!(exited(&other), "a container goes on in a pod that was stopped");
    persist("removal of the pod", || daemon.remove_pod(&pod)).await;
}

/// Takes over what another daemon has left: a pod with a container that runs, and ends it.
async fn recovered_life(daemon: &Sandboxes, world: &World) {
    let pod = daemon.pods(&Filter::default()).remove(0).id;
    let id = daemon.containers(&Filter::default()).remove(0).id;
    world.guest(&pod).print(&id, "later\n");
    eventually("output after recovery", || world.log("kept.log") == ["first", "later"]).await;
    assert_eq!(daemon.pod(&pod).unwrap().state, PodState::Ready);
    assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Running);
    let stop = || daemon.stop_container(&id, Duration::from_millis(500));
    persist("stop of a container", stop).await;
    assert_eq!(daemon.container(&id).unwrap().state, ContainerState::Exited);
    persist("removal of the pod", || daemon.remove_pod(&pod)).await;
}

async fn leave_a_pod(world: &World) {
    let daemon = world.daemon_with(config(world)).await;
    let pod = daemon.run_pod(world.pod_spec("p")).await.unwrap();
    let mut spec = world.container_spec("kept", &["print-forever", "first\n"]);
    spec.volumes = volumes(world);
    let id = daemon.create_container(&pod, spec).await.unwrap();
    daemon.start_container(&id).await.unwrap();
    eventually("output", || world.log("kept.log") == ["first"]).await;
    daemon.shutdown().await;
}

/// Nothing is there, and what a pod had is free for the next one.
async fn all_is_free(daemon: &Sandboxes, world: &World) {
    let began = Instant::now();
    while !world.leftovers().is_empty() {
        assert!(began.elapsed() < LIMIT, "left: {:?}", world.leftovers());
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(daemon.pods(&Filter::default()).is_empty());
    assert!(daemon.containers(&Filter::default()).is_empty());
    let again = persist("another pod of the name", || daemon.run_pod(world.pod_spec("p"))).await;
    let header = world.path("r/pods").join(&again).join("header.json");
    let header: serde_json::Value =
        serde_json::from_slice(&std::fs::read(header).unwrap()).unwrap();
    assert_eq!(header["jail_uid"], world.config().uid_base, "a uid is not free");
    daemon.remove_pod(&again).await.unwrap();
}

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// Guests are not taken for silent because this machine is busy.
fn config(world: &World) -> Config {
    Config { ping_interval_ms: 2_000, ping_misses: 15, ..world.config() }
}

async fn daemon_at(world: &World, at: Arc<At>) -> Sandboxes {
    let shared = Arc::new(world.clone());
    let failpoints = Failpoints::new(at);
    Sandboxes::open_at(config(world), shared.clone(), shared, Arc::new(Unobserved), failpoints)
        .await
        .unwrap()
}

/// Runs a life in which a step fails, or none; gives what it has reached.
fn fail(world: &World, life: Life, place: Option<Place>) -> Arc<At> {
    let (at, _) = At::new(place, Verdict::Fail);
    let runtime = runtime();
    runtime.block_on(async {
        if life == Life::Recovered {
            leave_a_pod(world).await;
        }
        let daemon = daemon_at(world, at.clone()).await;
        match life {
            Life::Recovered => recovered_life(&daemon, world).await,
            Life::Vm | Life::Host => stubborn_life(&daemon, world, life).await,
        }
        at.over.store(true, Ordering::SeqCst);
        all_is_free(&daemon, world).await;
    });
    runtime.shutdown_background();
    at
}

/// Runs a life that a crash ends, then the next daemon.
fn crash(world: &World, life: Life, place: Place) -> Arc<At> {
    let promised = Arc::new(Mutex::new(Promised::default()));
    let (at, crash) = At::new(Some(place), Verdict::Crash);
    let first = runtime();
    first.block_on(async {
        if life == Life::Recovered {
            leave_a_pod(world).await;
        }
        let (world, promised, at) = (world.clone(), promised.clone(), at.clone());
        let life = tokio::spawn(async move {
            let daemon = daemon_at(&world, at).await;
            match life {
                Life::Recovered => recovered_life(&daemon, &world).await,
                Life::Vm | Life::Host => whole_life(&daemon, &world, life, &promised).await,
            }
        });
        tokio::select! {
            biased;
            Ok(()) = crash => {}
            _ = life => {}
        }
    });
    first.shutdown_background();

    let promised = promised.lock().unwrap().clone();
    let second = runtime();
    second.block_on(async {
        let daemon = world.daemon_with(config(world)).await;
        keeps_promises(&daemon, world, life, &promised).await;
        // What a caller does that lost its answers: everything it sees, away.
        for pod in daemon.pods(&Filter::default()) {
            daemon.stop_pod(&pod.id).await.unwrap();
            assert_eq!(daemon.pod(&pod.id).unwrap().state, PodState::NotReady);
            daemon.remove_pod(&pod.id).await.unwrap();
        }
        all_is_free(&daemon, world).await;
    });
    second.shutdown_background();
    at
}

async fn keeps_promises(daemon: &Sandboxes, world: &World, life: Life, promised: &Promised) {
    let Some(pod) = promised.pod.as_ref().filter(|_| !promised.going) else { return };
    let view = daemon.pod(pod).unwrap();
    assert_eq!(view.state, PodState::Ready, "{promised:?}");
    assert!(!promised.resized || view.spec.memory_mib == Some(1024), "{promised:?}");
    let Some(id) = &promised.container else { return };
    let container = daemon.container(id).unwrap();
    if !promised.started && !promised.exited {
        assert!(container.exit.is_none_or(|exit| exit.code == 0), "{promised:?}");
        return;
    }
    let state = || daemon.container(id).unwrap().state;
    eventually("exit after recovery", || state() == ContainerState::Exited).await;
    assert_eq!(daemon.container(id).unwrap().exit.unwrap().code, 0, "{promised:?}");
    assert_eq!(world.log("app.log"), ["one", "two"], "{promised:?}");
    let servers = world.inner.file_servers.lock().unwrap().len();
    assert_eq!(servers, usize::from(life == Life::Vm), "{promised:?}");
}

/// All records, and of what else is reached more than once the first time and the last.
fn places(at: &At) -> Vec<Place> {
    let seen = at.seen.lock().unwrap();
    let places = seen.iter().flat_map(|((when, what), count)| {
        let nth: BTreeSet<usize> = match what.as_str() {
            "journal: record" => (1..=*count).collect(),
            what if BY_THE_CLOCK.contains(&what) => [1].into(),
            _ => [1, *count].into(),
        };
        nth.into_iter().map(|nth| Place { when: *when, what: what.clone(), nth })
    });
    places.collect()
}

/// Runs a life once for each place, with that verdict there.
fn walk(life: Life, verdict: Verdict, least: usize) {
    let Some(world) = World::new() else { return };
    let places = places(&fail(&world, life, None));
    world.clean();
    assert!(places.len() >= least, "only {} places are reached: {places:#?}", places.len());
    let next = AtomicUsize::new(0);
    let failures = Mutex::new(Vec::new());
    let worker = || {
        while let Some(place) = places.get(next.fetch_add(1, Ordering::SeqCst)) {
            let world = World::new().unwrap();
            let run = std::panic::AssertUnwindSafe(|| match verdict {
                Verdict::Crash => crash(&world, life, place.clone()),
                _ => fail(&world, life, Some(place.clone())),
            });
            let ran = std::panic::catch_unwind(run);
            world.clean();
            let hit = ran.as_ref().is_ok_and(|at| at.hit.load(Ordering::SeqCst));
            let may_miss = place.nth > 1 || BY_THE_CLOCK.contains(&place.what.as_str());
            if ran.is_err() || !(hit || may_miss) {
                failures.lock().unwrap().push((place.clone(), ran.is_ok()));
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..AT_ONCE {
            scope.spawn(worker);
        }
    });
    let failures = failures.into_inner().unwrap();
    let total = places.len();
    assert!(failures.is_empty(), "{life:?}: {} of {total}: {failures:#?}", failures.len());
}

#[test]
fn a_step_that_fails_is_made_up_for_and_leaves_nothing() {
    walk(Life::Vm, Verdict::Fail, 60);
}

#[test]
fn a_crash_at_any_step_converges_and_keeps_what_was_promised() {
    walk(Life::Vm, Verdict::Crash, 60);
}

#[test]
fn a_pod_without_a_vm_converges_after_failures_and_crashes() {
    walk(Life::Host, Verdict::Fail, 40);
    walk(Life::Host, Verdict::Crash, 40);
}

#[test]
fn a_recovery_that_fails_or_crashes_at_any_step_is_made_up_for() {
    walk(Life::Recovered, Verdict::Fail, 20);
    walk(Life::Recovered, Verdict::Crash, 20);
}
