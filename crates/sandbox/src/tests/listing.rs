//! Listings of a node with many pods, and their duration.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::test_node::run_test;
use crate::model::{Filter, PodState};
use crate::pod::Handle;
use crate::{Error, Sandboxes, synthetic_pods};

const PODS: usize = 500;
/// Longest listing; also holds in a debug build.
const LIMIT: Duration = Duration::from_millis(10);

fn add_pod(daemon: &Sandboxes, n: usize) -> Arc<Handle> {
    synthetic_pods::add_pod(daemon, n, serde_json::Value::Null, serde_json::Value::Null)
}

/// The shortest of several runs.
fn best(mut work: impl FnMut()) -> Duration {
    let time = || {
        let began = Instant::now();
        work();
        began.elapsed()
    };
    std::iter::repeat_with(time).take(10).min().unwrap()
}

#[test]
fn five_hundred_pods_are_listed_without_calling_a_guest() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let mut guests = Vec::new();
        for n in 0..PODS {
            let handle = add_pod(&daemon, n);
            if n % 2 == 0 {
                handle.set_stats(synthetic_pods::stats(&handle.pod()));
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
            let connection = guest.accept();
            assert_eq!(connection.unwrap_err().kind(), std::io::ErrorKind::WouldBlock);
        }
    });
}

#[test]
fn only_the_first_read_waits_for_a_pod_without_statistics() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let handle = add_pod(&daemon, 0);
        std::fs::create_dir_all(&handle.paths.state_dir).unwrap();
        // Accepts connections and never replies.
        let _guest = UnixListener::bind(&handle.paths.vsock).unwrap();
        let read = || async {
            let began = Instant::now();
            let refused = daemon.pod_stats(&handle.id).await.unwrap_err();
            assert!(matches!(refused, Error::Unavailable { .. }), "{refused:?}");
            began.elapsed()
        };
        let (first, second) = tokio::join!(read(), read());
        assert!(first < Duration::from_secs(2) && second < Duration::from_secs(2));
        assert!(read().await < Duration::from_millis(100));
        handle.set_stats(synthetic_pods::stats(&handle.pod()));
        assert_eq!(daemon.pod_stats(&handle.id).await.unwrap().pids, 1);
    });
}
