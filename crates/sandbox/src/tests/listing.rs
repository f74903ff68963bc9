//! What a node with many pods answers, and how soon.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::world::story;
use crate::model::{Filter, PodState};
use crate::pod::Handle;
use crate::{Error, Sandboxes, crowd};

const PODS: usize = 500;
/// Promised to a kubelet that lists; this is a debug build, and it holds there too.
const LIMIT: Duration = Duration::from_millis(10);

fn enter(daemon: &Sandboxes, n: usize) -> Arc<Handle> {
    crowd::enter(daemon, n, serde_json::Value::Null, serde_json::Value::Null)
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
                handle.set_stats(crowd::stats(&handle.pod()));
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
        handle.set_stats(crowd::stats(&handle.pod()));
        assert_eq!(daemon.pod_stats(&handle.id).await.unwrap().pids, 1);
    });
}
