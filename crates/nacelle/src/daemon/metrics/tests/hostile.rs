//! Clients that do not behave.

use std::sync::Arc;
use std::time::Duration;

use prometheus_client::registry::Registry;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{Counters, Endpoint, Fake, Node, meta, registry, stats};
use crate::daemon::metrics::server::MAX_CONNECTIONS;

const REQUEST: &[u8] = b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n";
/// Of a connection. A scrape in a debug build on a busy machine takes less.
const LIMIT: Duration = Duration::from_secs(4);

fn small() -> Arc<Registry> {
    registry(&Counters::new(), Node::new(Fake::default()))
}

/// Except for the one of the next connection, which is taken before it is accepted.
async fn all_slots_are_free(endpoint: &Endpoint) {
    let free = async {
        while endpoint.server.slots.available_permits() < MAX_CONNECTIONS - 1 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    tokio::time::timeout(Duration::from_secs(60), free).await.expect("all connections end");
}

#[tokio::test]
async fn a_client_that_never_reads_is_dropped_and_blocks_nobody() {
    let fake = Fake::default();
    // More than the buffers of a socket hold.
    for n in 0..2000 {
        let id = format!("pod-{n}");
        fake.add(&id, meta(&id, 0), Some(stats(&id, &[])));
    }
    let registry = registry(&Counters::new(), Node::new(fake.clone()));
    let endpoint = Endpoint::start_with(registry, LIMIT).await;
    let mut silent = Vec::new();
    for _ in 0..3 {
        let mut stream = UnixStream::connect(&endpoint.socket).await.unwrap();
        stream.write_all(REQUEST).await.unwrap();
        // The reply has begun.
        stream.readable().await.unwrap();
        silent.push(stream);
    }
    fake.pods.lock().unwrap().truncate(1);
    endpoint.scrape().await;
    all_slots_are_free(&endpoint).await;
    let mut got = String::new();
    silent[0].read_to_string(&mut got).await.unwrap();
    assert!(!got.contains("process_start_time_seconds"), "the whole reply fits into the buffers");
}

#[tokio::test]
async fn garbage_is_refused_and_the_next_scrape_succeeds() {
    let endpoint = Endpoint::start_with(small(), LIMIT).await;
    let long = format!("GET /metrics HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(100_000));
    for (request, status) in [
        ("\0\u{1}\u{2}garbage\r\n\r\n", "400"),
        ("GET / HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("GET /metrics/../etc HTTP/1.1\r\nHost: x\r\n\r\n", "404"),
        ("POST /metrics HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc", "405"),
        ("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "400"),
        (&long, "431"),
    ] {
        let mut stream = UnixStream::connect(&endpoint.socket).await.unwrap();
        // The server may close before it has read all of it.
        let _ = stream.write_all(request.as_bytes()).await;
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply).await;
        let reply = String::from_utf8_lossy(&reply).into_owned();
        let line = reply.lines().next().unwrap_or_default();
        // What cannot be parsed may be answered by the end of the connection alone.
        let silent = line.is_empty() && ["400", "431"].contains(&status);
        assert!(silent || line.contains(status), "{request:.40?}: {reply}");
        endpoint.scrape().await;
    }
    let head = endpoint.ask("HEAD /metrics HTTP/1.1\r\nHost: x\r\n\r\n").await;
    assert!(head.starts_with("HTTP/1.1 200 ") && !head.contains("nacelle_"), "{head}");
}

#[tokio::test]
async fn the_number_of_connections_is_bounded_and_idle_ones_end() {
    let endpoint = Endpoint::start_with(small(), LIMIT).await;
    let mut idle = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        let mut stream = UnixStream::connect(&endpoint.socket).await.unwrap();
        stream.write_all(b"GET /met").await.unwrap();
        idle.push(stream);
    }
    let taken = async {
        while endpoint.server.slots.available_permits() > 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(LIMIT, taken).await.expect("every idle client has a connection");
    // One more waits, and is served when the idle ones have reached their limit.
    let mut waiting = UnixStream::connect(&endpoint.socket).await.unwrap();
    waiting.write_all(REQUEST).await.unwrap();
    let mut byte = [0];
    let early = tokio::time::timeout(Duration::from_millis(200), waiting.read(&mut byte)).await;
    assert!(early.is_err(), "it is served beside {MAX_CONNECTIONS} others");
    let mut reply = String::new();
    waiting.read_to_string(&mut reply).await.unwrap();
    assert!(reply.starts_with("HTTP/1.1 200 "), "{reply}");
    all_slots_are_free(&endpoint).await;
}
