//! Clients that violate the protocol or exhaust limits.

use std::time::Duration;

use bytes::{BufMut, BytesMut};
use futures_util::SinkExt;
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;

use super::{exec, port_forward, server, server_with, wait_for_exit, within};
use crate::client::{Spdy, Websocket, data_frame};
use crate::spdy::frame::{Frame, kind};
use crate::{Config, Limits, Server};

/// A session whose command prints its pid and sleeps.
async fn sleeping_session(server: &Server) -> (Spdy, u32) {
    let url = exec(server, "ioe", "echo $$; exec sleep 1000");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
    let line = client.data_of(ids["stdout"]).await.unwrap();
    (client, std::str::from_utf8(&line).unwrap().trim().parse().unwrap())
}

async fn assert_serves(server: &Server) {
    let mut client = Spdy::connect(&exec(server, "o", "echo here"), "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdout"]).await;
    assert_eq!(client.rest().await.text(ids["stdout"]), "here\n");
}

fn control(version: u16, kind: u16, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut frame = BytesMut::new();
    frame.put_u16(0x8000 | version);
    frame.put_u16(kind);
    frame.put_u32(length);
    frame.put_slice(payload);
    frame.to_vec()
}

#[tokio::test]
async fn a_spdy_protocol_error_ends_only_its_session_with_goaway() {
    let server = server();
    let broken = [
        control(2, kind::PING, 4, &[0; 4]),
        control(3, kind::SYN_STREAM, 0xff_ffff, &[0; 100]),
        control(3, kind::SYN_STREAM, 4, &[0; 4]),
        control(3, kind::SYN_STREAM, 20, &[1; 20]),
        control(3, kind::SYN_REPLY, 2, &[0; 2]),
        control(3, kind::HEADERS, 20, &[1; 20]),
        control(3, kind::RST_STREAM, 8, &[0; 8]),
        control(3, kind::SETTINGS, 4, &[255; 4]),
        control(3, kind::GOAWAY, 1, &[0]),
        control(3, kind::WINDOW_UPDATE, 1, &[0]),
        data_frame(0, b"x", false).to_vec(),
    ];
    for frame in broken {
        let (mut client, pid) = sleeping_session(&server).await;
        client.socket.write_all(&frame).await.unwrap();
        let close = async {
            let mut last = None;
            while let Some(frame) = client.next().await {
                last = Some(frame);
            }
            last
        };
        // The decoder reports GOAWAY as Other.
        assert_eq!(within(close).await, Some(Frame::Other), "{frame:?}");
        wait_for_exit(pid).await;
    }
    assert_serves(&server).await;
}

#[tokio::test]
async fn a_websocket_protocol_error_ends_its_session() {
    let server = server();
    let url = exec(&server, "io", "cat");
    let mut client = Websocket::connect(&url, "v5.channel.k8s.io").await;
    client.0.get_mut().write_all(&[0x82, 0x01, 0x00]).await.unwrap();
    loop {
        match client.next().await {
            Some(Message::Close(Some(frame))) => break assert_eq!(u16::from(frame.code), 1002),
            Some(_) => {}
            None => panic!("no close frame"),
        }
    }
    for signal in [&[255][..], &[255, 0, 0]] {
        let url = exec(&server, "io", "cat");
        let mut client = Websocket::connect(&url, "v5.channel.k8s.io").await;
        client.0.send(Message::binary(signal.to_vec())).await.unwrap();
        while client.next().await.is_some() {}
    }
    // Unknown channels are ignored, also in close signals.
    let url = exec(&server, "io", "cat");
    let mut client = Websocket::connect(&url, "v5.channel.k8s.io").await;
    client.send(9, b"nowhere").await;
    client.send(255, &[200]).await;
    client.send(1, b"not an input").await;
    client.send(0, b"here").await;
    client.send(255, &[0]).await;
    client.send(255, &[0]).await;
    assert_eq!(client.rest().await.text(1), "here");
}

#[test]
fn any_bytes_after_an_upgrade_do_not_affect_the_server() {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let server = runtime.block_on(async { server() });
    let config = ProptestConfig { cases: 64, ..ProptestConfig::default() };
    let frames = prop::collection::vec(
        (0u16..11, prop::collection::vec(any::<u8>(), 0..64), any::<bool>()),
        0..12,
    );
    TestRunner::new(config)
        .run(&frames, |frames| {
            runtime.block_on(async {
                let url = exec(&server, "io", "cat");
                let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
                client.open_all(&["error", "stdin", "stdout"]).await;
                for (kind, payload, data) in &frames {
                    let frame = match data {
                        true => data_frame(u32::from(*kind), payload, false).to_vec(),
                        false => control(3, *kind, payload.len() as u32, payload),
                    };
                    if client.socket.write_all(&frame).await.is_err() {
                        break;
                    }
                }
                let _ = client.socket.shutdown().await;
                while client.next().await.is_some() {}
            });
            Ok(())
        })
        .unwrap();
    runtime.block_on(assert_serves(&server));
}

#[tokio::test]
async fn streams_beyond_the_limit_are_refused_and_closed_ones_free_a_slot() {
    let limits = Limits { streams: 4, ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    let open = async |client: &mut Spdy, request: &str| {
        let headers = [("streamtype", "data"), ("port", "80"), ("requestid", request)];
        let id = client.open(&headers).await;
        let accepted = client.next().await.unwrap();
        (id, accepted == Frame::Other)
    };
    let mut ids = Vec::new();
    for request in ["0", "1", "2", "3"] {
        let (id, accepted) = open(&mut client, request).await;
        assert!(accepted);
        ids.push(id);
    }
    assert!(!open(&mut client, "4").await.1);
    client.reset(ids[0]).await;
    assert!(open(&mut client, "5").await.1);
    assert!(!open(&mut client, "6").await.1);
}

#[tokio::test]
async fn stream_ids_must_be_odd_and_ascending() {
    let server = server();
    let url = exec(&server, "o", "sleep 0.5");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    client.open_with_id(7, &[("streamtype", "error")]).await;
    assert_eq!(client.next().await, Some(Frame::Other));
    for bad in [8, 7, 5] {
        client.open_with_id(bad, &[("streamtype", "stdout")]).await;
        assert_eq!(client.next().await, Some(Frame::Reset { id: bad }));
    }
    // A duplicate type, and an unknown one.
    client.open_with_id(9, &[("streamtype", "error")]).await;
    assert_eq!(client.next().await, Some(Frame::Other));
    client.open_with_id(11, &[("streamtype", "stdlog")]).await;
    let mut refused = false;
    for _ in 0..2 {
        refused |= client.next().await == Some(Frame::Reset { id: 11 });
    }
    assert!(refused);
    client.open_with_id(13, &[("streamtype", "stdout")]).await;
    let received = client.rest().await;
    assert_eq!(received.status(7)["status"], "Success");
}

#[tokio::test]
async fn a_client_that_does_not_open_its_streams_is_disconnected() {
    let limits = Limits { stream_creation: Duration::from_millis(200), ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    let dir = tempfile::tempdir().unwrap();
    let mark = dir.path().join("ran");
    let url = exec(&server, "ioe", &format!("touch {}", mark.display()));
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    client.open_all(&["error", "stdin", "stdout"]).await;
    while client.next().await.is_some() {}
    assert!(!mark.exists(), "the command did not run");
}

#[tokio::test]
async fn an_idle_connection_is_closed() {
    let config = Config { stream_idle_timeout: Duration::from_millis(400), ..Config::default() };
    let server = server_with(config);
    let (mut client, pid) = sleeping_session(&server).await;
    while client.next().await.is_some() {}
    wait_for_exit(pid).await;
    // A connection with traffic stays open.
    let url = exec(&server, "o", "for i in 1 2 3 4 5 6; do echo $i; sleep 0.2; done");
    let mut client = Spdy::connect(&url, "v4.channel.k8s.io").await;
    let ids = client.open_all(&["error", "stdout"]).await;
    assert_eq!(client.rest().await.text(ids["stdout"]), "1\n2\n3\n4\n5\n6\n");
}

#[tokio::test]
async fn connections_beyond_the_limit_wait() {
    let limits = Limits { connections: 2, ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    let first = sleeping_session(&server).await;
    let second = sleeping_session(&server).await;
    let third = tokio::time::timeout(Duration::from_millis(300), assert_serves(&server)).await;
    third.unwrap_err();
    drop(first);
    assert_serves(&server).await;
    drop(second);
}
