//! Port-forward and lifecycle events.

use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::broadcast::Receiver;

use super::agent::LISTENING;
use super::test_node::{eventually, run_test};
use crate::Error;
use crate::model::{ContainerState, Event, EventKind};

#[test]
fn port_forward_is_bidirectional_and_reports_a_closed_port() {
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let mut stream = daemon.port_forward(&pod, LISTENING).await.unwrap();
        stream.write_all(b"ping").await.unwrap();
        stream.shutdown().await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "ping");
        let refused = daemon.port_forward(&pod, 81).await.err().unwrap();
        assert!(matches!(refused, Error::NotListening { port: 81, .. }), "{refused:?}");
        daemon.stop_pod(&pod).await.unwrap();
        let stopped = daemon.port_forward(&pod, LISTENING).await.err().unwrap();
        assert!(matches!(stopped, Error::FailedPrecondition { .. }), "{stopped:?}");
        daemon.remove_pod(&pod).await.unwrap();
    });
}

fn received(events: &mut Receiver<Event>) -> Vec<(EventKind, Option<String>)> {
    let mut all = Vec::new();
    while let Ok(event) = events.try_recv() {
        all.push((event.kind, event.container));
    }
    all
}

#[test]
fn every_lifecycle_event_is_sent_once_and_in_order() {
    use EventKind::{Created, Deleted, Started, Stopped};
    run_test(|node| async move {
        let daemon = node.daemon().await;
        let mut events = daemon.events();
        let _lags = daemon.events();
        let pod = daemon.run_pod(node.pod_spec("p")).await.unwrap();
        let a = daemon.create_container(&pod, node.container_spec("a", &["print", "x"])).await;
        let a = a.unwrap();
        daemon.start_container(&a).await.unwrap();
        eventually("exit", || daemon.container(&a).unwrap().state == ContainerState::Exited).await;
        daemon.remove_container(&a).await.unwrap();
        let b = daemon.create_container(&pod, node.container_spec("b", &["forever"])).await;
        let b = b.unwrap();
        daemon.start_container(&b).await.unwrap();
        node.guest(&pod).lock().refuse_create = true;
        daemon.create_container(&pod, node.container_spec("c", &["x"])).await.unwrap_err();
        daemon.stop_pod(&pod).await.unwrap();
        daemon.stop_pod(&pod).await.unwrap();
        daemon.remove_pod(&pod).await.unwrap();
        tokio::time::sleep(Duration::from_millis(50)).await;
        let (a, b) = (Some(a), Some(b));
        let expected = [
            (Created, None),
            (Started, None),
            (Created, a.clone()),
            (Started, a.clone()),
            (Stopped, a.clone()),
            (Deleted, a),
            (Created, b.clone()),
            (Started, b.clone()),
            (Stopped, b.clone()),
            (Stopped, None),
            (Deleted, b),
            (Deleted, None),
        ];
        assert_eq!(received(&mut events), expected);
    });
}
