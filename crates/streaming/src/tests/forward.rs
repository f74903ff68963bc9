//! Port-forward with every protocol, to ports of the host.

use std::time::Duration;

use futures_util::SinkExt;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_tungstenite::tungstenite::Message;

use super::{noise, port_forward, server, server_with, within};
use crate::client::{Pair, Spdy, Websocket};
use crate::spdy::frame::Frame;
use crate::{Config, Limits};

/// Reads each connection to its end, then sends everything back and closes.
async fn echo_after_end() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((mut socket, _)) = listener.accept().await {
            tokio::spawn(async move {
                let mut bytes = Vec::new();
                socket.read_to_end(&mut bytes).await.unwrap();
                socket.write_all(&bytes).await.unwrap();
            });
        }
    });
    port
}

async fn listen() -> (TcpListener, u16) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    (listener, port)
}

/// A port without a listener.
async fn closed_port() -> u16 {
    listen().await.1
}

async fn many_and_refused(mut client: Spdy) {
    let port = echo_after_end().await;
    let mut pairs = Vec::new();
    for request in 0..20 {
        pairs.push(client.open_pair(port, request).await);
    }
    let refused = client.open_pair(closed_port().await, 99).await;
    for (n, pair) in pairs.iter().enumerate() {
        let payload = noise(1000 * n);
        client.send(pair.data, &payload, false).await;
        client.send(pair.data, b"end", true).await;
    }
    pairs.push(refused);
    let received = client.until_ended(&pairs).await;
    let refused = pairs.pop().unwrap();
    for (n, pair) in pairs.iter().enumerate() {
        let expected = [&noise(1000 * n)[..], b"end"].concat();
        assert!(received.of(pair.data) == expected, "connection {n}");
        assert_eq!(received.text(pair.error), "");
    }
    assert_eq!(received.text(refused.data), "");
    let message = received.text(refused.error);
    assert!(message.starts_with("error forwarding port"), "{message}");
    assert!(message.contains("to pod pod: Connection refused"), "{message}");
    // The client connection is still usable.
    let next_pair = client.open_pair(port, 100).await;
    client.send(next_pair.data, b"again", true).await;
    let received = client.until_ended(std::slice::from_ref(&next_pair)).await;
    assert_eq!(received.text(next_pair.data), "again");
}

#[tokio::test]
async fn spdy_multiplexes_many_connections_and_a_refused_one_affects_no_other() {
    let server = server();
    many_and_refused(Spdy::connect(&port_forward(&server, &[]), "portforward.k8s.io").await).await;
}

#[tokio::test]
async fn spdy_inside_a_websocket_multiplexes_many_connections() {
    let server = server();
    for protocol in ["SPDY/3.1+portforward.k8s.io", "v2.portforward.k8s.io"] {
        many_and_refused(Spdy::through_websocket(&port_forward(&server, &[]), protocol).await)
            .await;
    }
}

#[tokio::test]
async fn each_direction_is_closed_separately() {
    let server = server();
    let (listener, port) = listen().await;
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    let pair = client.open_pair(port, 0).await;
    let (mut pod, _) = within(listener.accept()).await.unwrap();
    // The pod closes first and still reads.
    pod.shutdown().await.unwrap();
    assert_eq!(client.data_of(pair.data).await, None);
    client.send(pair.data, b"late", true).await;
    let mut input = String::new();
    within(pod.read_to_string(&mut input)).await.unwrap();
    assert_eq!(input, "late");
}

#[tokio::test]
async fn a_stream_reset_by_the_client_closes_the_connection_to_the_pod() {
    let server = server();
    let (listener, port) = listen().await;
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    for end_first in [false, true] {
        let pair = client.open_pair(port, u32::from(end_first)).await;
        let (mut pod, _) = within(listener.accept()).await.unwrap();
        if end_first {
            client.send(pair.data, b"", true).await;
        }
        client.reset(pair.data).await;
        let mut input = Vec::new();
        let _ = within(pod.read_to_end(&mut input)).await;
        // The connection is fully closed: writing fails eventually.
        within(async { while pod.write_all(&[0; 1024]).await.is_ok() {} }).await;
    }
}

#[tokio::test]
async fn a_disconnect_of_the_client_closes_the_connections_to_the_pod() {
    let server = server();
    let (listener, port) = listen().await;
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    client.open_pair(port, 0).await;
    let (mut pod, _) = within(listener.accept()).await.unwrap();
    drop(client);
    let mut input = Vec::new();
    let _ = within(pod.read_to_end(&mut input)).await;
    assert!(input.is_empty());
}

#[tokio::test]
async fn streams_without_a_valid_port_are_refused_and_incomplete_pairs_time_out() {
    let limits = Limits { stream_creation: Duration::from_millis(100), ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    for headers in [
        &[("streamtype", "data")][..],
        &[("streamtype", "data"), ("port", "0")],
        &[("streamtype", "data"), ("port", "65536")],
        &[("streamtype", "data"), ("port", "http")],
        &[("streamtype", "stdin"), ("port", "80")],
        &[("streamtype", "data"), ("port", "80"), ("requestid", &"1".repeat(65))],
        &[],
    ] {
        let id = client.open(headers).await;
        assert_eq!(client.next().await, Some(Frame::Reset { id }), "{headers:?}");
    }
    let incomplete =
        client.open(&[("streamtype", "error"), ("port", "80"), ("requestid", "1")]).await;
    let message = client.data_of(incomplete).await.unwrap();
    assert_eq!(message, "timed out waiting for the data stream");
    // An old client without request ids.
    let port = echo_after_end().await.to_string();
    let error = client.open(&[("streamtype", "error"), ("port", &port)]).await;
    let data = client.open(&[("streamtype", "data"), ("port", &port)]).await;
    client.send(data, b"old", true).await;
    let received = client.until_ended(&[Pair { error, data }]).await;
    assert_eq!(received.text(data), "old");
}

#[tokio::test]
async fn the_oldest_of_too_many_incomplete_pairs_is_ended() {
    let limits = Limits { stream_creation: Duration::from_secs(3600), ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    let port = echo_after_end().await.to_string();
    let mut incomplete = Vec::new();
    for request in 0..34 {
        // The first waits for its data stream, the others for their error stream.
        let kind = if request == 0 { "error" } else { "data" };
        let request = request.to_string();
        let headers =
            [("streamtype", kind), ("port", port.as_str()), ("requestid", request.as_str())];
        incomplete.push(client.open(&headers).await);
    }
    let ended = client.until_ended(&[Pair { error: incomplete[0], data: incomplete[1] }]).await;
    assert_eq!(ended.text(incomplete[0]), "too many connections wait for their data stream");
    assert_eq!(ended.text(incomplete[1]), "");
    // The others still wait.
    let error = client.open(&[("streamtype", "error"), ("port", &port), ("requestid", "2")]).await;
    let pair = Pair { error, data: incomplete[2] };
    client.send(pair.data, b"waited", true).await;
    let received = client.until_ended(std::slice::from_ref(&pair)).await;
    assert_eq!(received.text(pair.data), "waited");
}

#[tokio::test]
async fn forwards_beyond_the_limit_are_refused_and_closed_ones_free_a_slot() {
    let server = server();
    let (_listener, port) = listen().await;
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    let mut pairs = Vec::new();
    for request in 0..257 {
        pairs.push(client.open_pair(port, request).await);
    }
    let refused = client.until_ended(&pairs[256..]).await;
    let message = refused.text(pairs[256].error);
    assert!(message.ends_with("the maximum of 256 connections is reached"), "{message:?}");
    client.reset(pairs[0].data).await;
    let echo = echo_after_end().await;
    within(async {
        for request in 1000.. {
            let pair = client.open_pair(echo, request).await;
            client.send(pair.data, b"again", true).await;
            if client.data_of(pair.data).await.is_some() {
                break;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn the_older_websocket_protocol_has_two_channels_for_each_port() {
    let server = server();
    for protocol in ["v4.channel.k8s.io", "v4.base64.channel.k8s.io", "portforward.k8s.io", ""] {
        let (listener, port) = listen().await;
        let refused = closed_port().await;
        let url = port_forward(&server, &[port, refused]);
        let mut client = Websocket::connect(&url, protocol).await;
        let (mut pod, _) = within(listener.accept()).await.unwrap();
        if protocol.contains("base64") {
            client.0.send(Message::text("0aGVsbG8=")).await.unwrap();
        } else {
            client.send(0, b"hello").await;
        }
        let mut input = [0; 5];
        within(pod.read_exact(&mut input)).await.unwrap();
        assert_eq!(&input, b"hello");
        pod.write_all(b"world").await.unwrap();
        drop::<TcpStream>(pod);
        let received = client.rest().await;
        let number = port.to_le_bytes();
        assert_eq!(received.of(0), [&number[..], b"world"].concat(), "{protocol}");
        assert_eq!(received.of(1), number);
        assert_eq!(received.of(2), refused.to_le_bytes());
        let message = &received.of(3)[2..];
        assert!(message.starts_with(b"error forwarding port"), "{received:?}");
    }
}
