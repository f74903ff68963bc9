//! Port-forward: both loopback addresses, half-close, maximum number of connections.
//!
//! Needs the same as `containers.rs`.

mod common;

use agent_api::forward::{Open, Status};
use common::{TIMEOUT, guest};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

/// Maximum connections of the agent.
const LIMIT: usize = 256;

/// Echoes each connection; with `whole` only after its end.
fn echo(listener: tokio::net::TcpListener, whole: bool) {
    tokio::spawn(async move {
        loop {
            let (mut conn, _) = listener.accept().await.unwrap();
            tokio::spawn(async move {
                if whole {
                    let mut all = Vec::new();
                    conn.read_to_end(&mut all).await.unwrap();
                    conn.write_all(&all).await.unwrap();
                } else {
                    let (mut read, mut write) = conn.split();
                    let _ = tokio::io::copy(&mut read, &mut write).await;
                }
            });
        }
    });
}

#[tokio::test]
async fn data_flows_in_both_directions_and_each_is_closed_separately() {
    let Some(guest) = guest().await else { return };
    for (address, port) in [("127.0.0.1", 7001), ("[::1]", 7002)] {
        // The echo starts after the half-close of the request.
        echo(guest.listen(&format!("{address}:{port}")), true);
        let (status, mut conn) = guest.forward(&Open { port }.encode()).await;
        assert_eq!(status, Status::Ok);
        let data: Vec<u8> = (0..3_000_000_u32).map(|n| (n % 251) as u8).collect();
        let mut answer = Vec::new();
        let talk = async {
            conn.write_all(&data).await.unwrap();
            conn.shutdown().await.unwrap();
            conn.read_to_end(&mut answer).await.unwrap();
        };
        tokio::time::timeout(TIMEOUT, talk).await.expect("the connection hangs");
        assert!(answer == data, "{} bytes came back", answer.len());
    }
}

#[tokio::test]
async fn a_close_by_the_server_reaches_the_client() {
    let Some(guest) = guest().await else { return };
    let listener = guest.listen("127.0.0.1:7004");
    let (status, mut conn) = guest.forward(&Open { port: 7004 }.encode()).await;
    assert_eq!(status, Status::Ok);
    let (mut server, _) = listener.accept().await.unwrap();
    server.write_all(b"bye").await.unwrap();
    server.shutdown().await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(TIMEOUT, conn.read_to_string(&mut answer)).await.unwrap().unwrap();
    assert_eq!(answer, "bye");
    // The other direction is still open.
    conn.write_all(b"after").await.unwrap();
    conn.shutdown().await.unwrap();
    let mut rest = String::new();
    tokio::time::timeout(TIMEOUT, server.read_to_string(&mut rest)).await.unwrap().unwrap();
    assert_eq!(rest, "after");
}

#[tokio::test]
async fn connections_that_cannot_be_forwarded_get_a_status() {
    let Some(guest) = guest().await else { return };
    assert_eq!(guest.forward(&Open { port: 9 }.encode()).await.0, Status::Refused);
    assert_eq!(guest.forward(b"GET / ").await.0, Status::BadHeader);
    assert_eq!(guest.forward(&Open { port: 0 }.encode()).await.0, Status::BadHeader);
}

#[tokio::test]
async fn the_number_of_connections_is_limited_and_closed_ones_free_a_slot() {
    let Some(guest) = guest().await else { return };
    echo(guest.listen("127.0.0.1:7003"), false);
    let header = Open { port: 7003 }.encode();
    let mut held = Vec::new();
    loop {
        let (status, conn) = guest.forward(&header).await;
        match status {
            Status::Ok => held.push(conn),
            Status::Failed => break,
            other => panic!("{other:?}"),
        }
    }
    assert_eq!(held.len(), LIMIT);
    held.truncate(LIMIT / 2);
    let start = std::time::Instant::now();
    while guest.forward(&header).await.0 != Status::Ok {
        assert!(start.elapsed() < TIMEOUT, "closed connections keep their slots");
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    // Idle connections still work.
    let conn = &mut held[0];
    conn.write_all(b"still here").await.unwrap();
    let mut answer = [0; 10];
    tokio::time::timeout(TIMEOUT, conn.read_exact(&mut answer)).await.unwrap().unwrap();
    assert_eq!(&answer, b"still here");
}
