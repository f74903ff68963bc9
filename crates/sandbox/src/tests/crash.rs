//! kill -9 of the daemon at every write of its journal, before and after it: the next one
//! converges, keeps what was promised, and leaves nothing.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::volumes::{publish, volume};
use super::world::{World, eventually};
use crate::Sandboxes;
use crate::journal::Probe;
use crate::model::{Access, ContainerState, Filter, PodResources, PodState, Volume, VolumeSource};
use crate::policy::Pod;

struct CrashAt {
    write: usize,
    before: bool,
    seen: AtomicUsize,
    crashed: Mutex<Option<tokio::sync::oneshot::Sender<()>>>,
}

impl CrashAt {
    fn crash(&self) {
        if let Some(crashed) = self.crashed.lock().unwrap().take() {
            let _ = crashed.send(());
        }
        // No hook, no message: the writer is gone, as after SIGKILL.
        std::panic::resume_unwind(Box::new("crash"));
    }
}

impl Probe for CrashAt {
    fn before_write(&self, _: &Pod) -> io::Result<()> {
        let n = self.seen.fetch_add(1, Ordering::SeqCst);
        if n > self.write || (n == self.write && self.before) {
            self.crash();
        }
        Ok(())
    }

    fn after_write(&self, _: &Pod) {
        if !self.before && self.seen.load(Ordering::SeqCst) > self.write {
            self.crash();
        }
    }
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

async fn whole_life(daemon: &Sandboxes, world: &World, promised: &Mutex<Promised>) {
    let Ok(pod) = daemon.run_pod(world.pod_spec("p")).await else { return };
    promised.lock().unwrap().pod = Some(pod.clone());
    let change = PodResources { memory_mib: Some(1024), ..PodResources::default() };
    if daemon.update_pod(&pod, change).await.is_err() {
        return;
    }
    promised.lock().unwrap().resized = true;
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

/// True when the life ended before the crash came.
fn crash_and_recover(write: usize, before: bool) -> Option<bool> {
    let world = World::new()?;
    let promised = Arc::new(Mutex::new(Promised::default()));
    let (crashed, crash) = tokio::sync::oneshot::channel();
    let probe = Arc::new(CrashAt {
        write,
        before,
        seen: AtomicUsize::new(0),
        crashed: Mutex::new(Some(crashed)),
    });
    let runtime = || {
        tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
    };
    let first = runtime();
    let over = first.block_on(async {
        let shared = Arc::new(world.clone());
        let daemon =
            Sandboxes::open_probed(world.config(), shared.clone(), shared, Some(probe)).await;
        let daemon = daemon.unwrap();
        let (world, promised) = (world.clone(), promised.clone());
        let life = tokio::spawn(async move { whole_life(&daemon, &world, &promised).await });
        tokio::select! {
            biased;
            Ok(()) = crash => false,
            _ = life => true,
        }
    });
    first.shutdown_background();

    let promised = promised.lock().unwrap().clone();
    let at = format!("write {write}, before: {before}, {promised:?}");
    let second = runtime();
    second.block_on(async {
        let daemon = world.daemon().await;
        if let Some(pod) = &promised.pod
            && !promised.going
        {
            let view = daemon.pod(pod).unwrap();
            assert_eq!(view.state, PodState::Ready, "{at}");
            assert!(!promised.resized || view.spec.memory_mib == Some(1024), "{at}");
            if let Some(id) = &promised.container {
                let container = daemon.container(id).unwrap();
                if promised.started || promised.exited {
                    eventually("exit after recovery", || {
                        daemon.container(id).unwrap().state == ContainerState::Exited
                    })
                    .await;
                    assert_eq!(daemon.container(id).unwrap().exit.unwrap().code, 0, "{at}");
                    assert_eq!(world.log("app.log"), ["one", "two"], "{at}");
                    assert_eq!(world.inner.file_servers.lock().unwrap().len(), 1, "{at}");
                } else {
                    assert!(container.exit.is_none() || container.exit.unwrap().code == 0, "{at}");
                }
            }
        }
        // What a caller does that lost its answers: everything it sees, away.
        for pod in daemon.pods(&Filter::default()) {
            daemon.stop_pod(&pod.id).await.unwrap();
            daemon.remove_pod(&pod.id).await.unwrap();
        }
        let began = std::time::Instant::now();
        while !world.leftovers().is_empty() {
            assert!(began.elapsed() < Duration::from_secs(10), "{at}: {:?}", world.leftovers());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        // The name is free as soon as nothing is left, give or take a moment.
        let again = loop {
            match daemon.run_pod(world.pod_spec("p")).await {
                Ok(again) => break again,
                Err(e) => assert!(began.elapsed() < Duration::from_secs(10), "{at}: {e}"),
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        daemon.remove_pod(&again).await.unwrap();
    });
    second.shutdown_background();
    world.clean();
    Some(over)
}

#[test]
fn a_crash_at_any_write_of_the_journal_converges() {
    for before in [true, false] {
        let mut write = 0;
        loop {
            match crash_and_recover(write, before) {
                None => return,
                Some(true) => break,
                Some(false) => write += 1,
            }
            assert!(write < 40, "the life never ends");
        }
        assert!(write > 8, "only {write} writes were seen");
    }
}
