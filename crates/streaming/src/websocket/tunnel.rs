//! A byte stream over WebSocket messages, for SPDY inside.

use std::time::Duration;

use bytes::BytesMut;
use tokio::io::{
    AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf,
};

use super::channels::{Channel, Codec, Protocol, open};
use crate::io::{CHUNK, Incoming, Outgoing};
use crate::link::{Link, Peer};

/// The stream ends with the WebSocket, and the WebSocket with the stream.
pub(crate) fn tunnel(
    socket: impl AsyncRead + AsyncWrite + Send + 'static,
    idle_timeout: Duration,
    peer: Peer,
) -> DuplexStream {
    let protocol = Protocol { codec: Codec::Stream, close_signal: false };
    let (link, channels) = open(socket, protocol, 1, idle_timeout, peer);
    let (ours, theirs) = tokio::io::duplex(2 * CHUNK);
    tokio::spawn(copy(link, channels, ours));
    theirs
}

async fn copy(link: Link, channels: Vec<Channel>, stream: DuplexStream) {
    let Some(Channel { incoming, outgoing }) = channels.into_iter().next() else { return };
    let (from_inside, to_inside) = tokio::io::split(stream);
    tokio::select! {
        () = copy_in(incoming, to_inside) => return,
        () = link.closed.cancelled() => return,
        () = copy_out(from_inside, outgoing) => {}
    }
    link.finish().await;
}

async fn copy_in(mut incoming: Incoming, mut inside: WriteHalf<DuplexStream>) {
    while let Ok(Some(chunk)) = incoming.next().await {
        if inside.write_all(&chunk).await.is_err() {
            // The inner connection has ended; its last bytes are still being sent.
            break;
        }
    }
    std::future::pending::<()>().await;
}

async fn copy_out(mut inside: ReadHalf<DuplexStream>, outgoing: Outgoing) {
    let mut bytes = BytesMut::new();
    loop {
        bytes.reserve(CHUNK);
        match inside.read_buf(&mut bytes).await {
            Ok(1..) => {}
            Ok(0) | Err(_) => return,
        }
        if outgoing.send(bytes.split().freeze()).await.is_err() {
            return;
        }
    }
}
