//! Port-forward through every protocol, to ports of the host.

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

/// A port on which nobody listens.
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
    let words = received.text(refused.error);
    assert!(words.starts_with("error forwarding port"), "{words}");
    assert!(words.contains("to pod pod: Connection refused"), "{words}");
    // The connection is as good as before.
    let again = client.open_pair(port, 100).await;
    client.send(again.data, b"again", true).await;
    let received = client.until_ended(std::slice::from_ref(&again)).await;
    assert_eq!(received.text(again.data), "again");
}

#[tokio::test]
async fn many_connections_share_one_of_spdy_and_a_refused_one_does_no_harm() {
    let server = server();
    many_and_refused(Spdy::connect(&port_forward(&server, &[]), "portforward.k8s.io").await).await;
}

#[tokio::test]
async fn many_connections_share_one_of_spdy_inside_a_websocket() {
    let server = server();
    for protocol in ["SPDY/3.1+portforward.k8s.io", "v2.portforward.k8s.io"] {
        many_and_refused(Spdy::through_websocket(&port_forward(&server, &[]), protocol).await)
            .await;
    }
}

#[tokio::test]
async fn each_direction_ends_on_its_own() {
    let server = server();
    let (listener, port) = listen().await;
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    let pair = client.open_pair(port, 0).await;
    let (mut pod, _) = within(listener.accept()).await.unwrap();
    // The pod ends first, and still listens.
    pod.shutdown().await.unwrap();
    assert_eq!(client.data_of(pair.data).await, None);
    client.send(pair.data, b"late", true).await;
    let mut heard = String::new();
    within(pod.read_to_string(&mut heard)).await.unwrap();
    assert_eq!(heard, "late");
}

#[tokio::test]
async fn a_stream_that_the_client_resets_closes_the_pods_connection() {
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
        let mut heard = Vec::new();
        let _ = within(pod.read_to_end(&mut heard)).await;
        // Our side is closed, not half of it: writing fails sooner or later.
        within(async { while pod.write_all(&[0; 1024]).await.is_ok() {} }).await;
    }
}

#[tokio::test]
async fn a_client_that_vanishes_closes_the_pods_connections() {
    let server = server();
    let (listener, port) = listen().await;
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    client.open_pair(port, 0).await;
    let (mut pod, _) = within(listener.accept()).await.unwrap();
    drop(client);
    let mut heard = Vec::new();
    let _ = within(pod.read_to_end(&mut heard)).await;
    assert!(heard.is_empty());
}

#[tokio::test]
async fn streams_that_are_no_ports_are_refused_and_lonely_ones_time_out() {
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
    let lonely = client.open(&[("streamtype", "error"), ("port", "80"), ("requestid", "1")]).await;
    let words = client.data_of(lonely).await.unwrap();
    assert_eq!(words, "timed out waiting for the data stream");
    // An old client, which sends no request id.
    let port = echo_after_end().await.to_string();
    let error = client.open(&[("streamtype", "error"), ("port", &port)]).await;
    let data = client.open(&[("streamtype", "data"), ("port", &port)]).await;
    client.send(data, b"old", true).await;
    let received = client.until_ended(&[Pair { error, data }]).await;
    assert_eq!(received.text(data), "old");
}

#[tokio::test]
async fn of_too_many_lonely_streams_the_oldest_is_ended() {
    let limits = Limits { stream_creation: Duration::from_secs(3600), ..Limits::default() };
    let server = server_with(Config { limits, ..Config::default() });
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    let port = echo_after_end().await.to_string();
    let mut lonely = Vec::new();
    for request in 0..34 {
        // The first would wait for its data, the others for the stream of errors.
        let kind = if request == 0 { "error" } else { "data" };
        let request = request.to_string();
        let headers =
            [("streamtype", kind), ("port", port.as_str()), ("requestid", request.as_str())];
        lonely.push(client.open(&headers).await);
    }
    let ended = client.until_ended(&[Pair { error: lonely[0], data: lonely[1] }]).await;
    assert_eq!(ended.text(lonely[0]), "too many connections wait for their data stream");
    assert_eq!(ended.text(lonely[1]), "");
    // The others still wait.
    let error = client.open(&[("streamtype", "error"), ("port", &port), ("requestid", "2")]).await;
    let pair = Pair { error, data: lonely[2] };
    client.send(pair.data, b"waited", true).await;
    let received = client.until_ended(std::slice::from_ref(&pair)).await;
    assert_eq!(received.text(pair.data), "waited");
}

#[tokio::test]
async fn forwards_beyond_their_limit_are_refused_and_ended_ones_make_room() {
    let server = server();
    let (_listener, port) = listen().await;
    let url = port_forward(&server, &[]);
    let mut client = Spdy::connect(&url, "portforward.k8s.io").await;
    let mut pairs = Vec::new();
    for request in 0..257 {
        pairs.push(client.open_pair(port, request).await);
    }
    let refused = client.until_ended(&pairs[256..]).await;
    let words = refused.text(pairs[256].error);
    assert!(words.ends_with("256 connections are open already"), "{words:?}");
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
async fn the_old_websocket_form_has_two_channels_a_port() {
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
        let mut heard = [0; 5];
        within(pod.read_exact(&mut heard)).await.unwrap();
        assert_eq!(&heard, b"hello");
        pod.write_all(b"world").await.unwrap();
        drop::<TcpStream>(pod);
        let received = client.rest().await;
        let number = port.to_le_bytes();
        assert_eq!(received.of(0), [&number[..], b"world"].concat(), "{protocol}");
        assert_eq!(received.of(1), number);
        assert_eq!(received.of(2), refused.to_le_bytes());
        let words = &received.of(3)[2..];
        assert!(words.starts_with(b"error forwarding port"), "{received:?}");
    }
}
