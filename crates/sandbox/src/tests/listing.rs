//! What a node with many pods answers, and how soon.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use super::world::story;
use crate::model::{Filter, PodState};
use crate::pod::{self, Begin, Handle};
use crate::policy::{ContainerPhase, Phase, tests as samples};
use crate::stats::PodStatsView;
use crate::{Error, Sandboxes};

const PODS: usize = 500;
/// Promised to a kubelet that lists; this is a debug build, and it holds there too.
const LIMIT: Duration = Duration::from_millis(10);

/// Enters a pod with a container, as the journal would; nobody works for it.
fn enter(daemon: &Sandboxes, n: usize) -> Arc<Handle> {
    let node = daemon.node();
    let mut pod = samples::pod();
    pod.id = format!("pod{n:04}");
    pod.phase = Phase::Ready;
    let mut container = samples::container(&format!("container{n:04}"));
    container.phase = ContainerPhase::Present;
    container.started_at = Some(SystemTime::now());
    pod.containers.insert(container.id.clone(), container);
    let mut meta = pod.spec.meta.clone();
    meta.name = pod.id.clone();
    node.registry.enter_pod(&pod.id, &meta, n as u32);
    let id = pod.id.clone();
    let (handle, _owner) = pod::new(node.clone(), pod, Begin::Recover);
    node.registry.set_handle(&id, handle.clone());
    handle
}

fn stats(pod: &str) -> Arc<PodStatsView> {
    Arc::new(PodStatsView {
        pod: pod.to_owned(),
        at: SystemTime::now(),
        cpu: Default::default(),
        memory: Default::default(),
        pids: 1,
        interfaces: Vec::new(),
        io_pressure: None,
        containers: Vec::new(),
    })
}

/// The best of some: a machine with other work may be slow once.
fn best(mut work: impl FnMut()) -> Duration {
    let time = || {
        let began = Instant::now();
        work();
        began.elapsed()
    };
    std::iter::repeat_with(time).take(10).min().unwrap()
}

#[test]
fn five_hundred_pods_are_listed_at_once_and_no_guest_is_asked() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let mut guests = Vec::new();
        for n in 0..PODS {
            let handle = enter(&daemon, n);
            if n % 2 == 0 {
                handle.set_stats(stats(&handle.id));
            }
            if n % 100 == 0 {
                std::fs::create_dir_all(&handle.paths.state_dir).unwrap();
                let guest = UnixListener::bind(&handle.paths.vsock).unwrap();
                guest.set_nonblocking(true).unwrap();
                guests.push(guest);
            }
        }
        let all = Filter::default();
        assert_eq!(daemon.pods(&all).len(), PODS);
        assert_eq!(daemon.containers(&all).len(), PODS);
        assert!(daemon.pods(&all).iter().all(|p| p.state == PodState::Ready));
        assert_eq!(daemon.all_stats().len(), PODS / 2);
        for (what, took) in [
            ("pods", best(|| drop(daemon.pods(&all)))),
            ("containers", best(|| drop(daemon.containers(&all)))),
            ("stats", best(|| drop(daemon.all_stats()))),
        ] {
            println!("{PODS} {what}: {took:?}");
            assert!(took < LIMIT, "{PODS} {what} took {took:?}");
        }
        for guest in guests {
            let asked = guest.accept();
            assert_eq!(asked.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        }
    });
}

#[test]
fn a_pod_that_cannot_be_measured_is_waited_for_once() {
    story(|world| async move {
        let daemon = world.daemon().await;
        let handle = enter(&daemon, 0);
        std::fs::create_dir_all(&handle.paths.state_dir).unwrap();
        // Takes connections and never answers.
        let _guest = UnixListener::bind(&handle.paths.vsock).unwrap();
        let ask = || async {
            let began = Instant::now();
            let refused = daemon.pod_stats(&handle.id).await.unwrap_err();
            assert!(matches!(refused, Error::Unavailable { .. }), "{refused:?}");
            began.elapsed()
        };
        let (first, beside) = tokio::join!(ask(), ask());
        assert!(first < Duration::from_secs(2) && beside < Duration::from_secs(2));
        assert!(ask().await < Duration::from_millis(100));
        handle.set_stats(stats(&handle.id));
        assert_eq!(daemon.pod_stats(&handle.id).await.unwrap().pids, 1);
    });
}
