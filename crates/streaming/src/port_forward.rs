//! Port-forward. With SPDY, directly or inside a WebSocket, each forwarded connection is a pair of
//! streams, data and error, with the same request id; a client's connection may have any number of
//! pairs. The older WebSocket protocol has two channels and one connection for each port.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, ReadHalf, WriteHalf};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

use crate::backend::{Backend, ByteStream};
use crate::io::{CHUNK, Incoming, Outgoing, Reset};
use crate::link::Link;
use crate::spdy::{self, Headers};
use crate::websocket::Channel;

/// SPDY headers of a stream; names are in lower case.
const STREAM_TYPE: &str = "streamtype";
const PORT: &str = "port";
const REQUEST_ID: &str = "requestid";
/// Maximum length of a request id, bytes; clients send a number.
const REQUEST_ID_LIMIT: usize = 64;
/// Maximum streams of a connection that wait for the other of their pair. Each may hold about 64
/// KiB, and clients open both streams of a pair directly after each other.
const WAITING_LIMIT: usize = 32;
/// Maximum forwarded connections of one client connection.
const FORWARDS_LIMIT: usize = 256;
/// Maximum ports of the older WebSocket protocol, whose channel numbers are bytes.
pub(crate) const PORTS_LIMIT: usize = 127;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Part {
    Data,
    Error,
}

fn part(headers: &Headers) -> Option<Part> {
    match headers.get(STREAM_TYPE)? {
        "data" => Some(Part::Data),
        "error" => Some(Part::Error),
        _ => None,
    }
}

fn port(headers: &Headers) -> Option<u16> {
    headers.get(PORT)?.parse().ok().filter(|port| *port != 0)
}

pub(crate) fn accept(headers: &Headers) -> bool {
    part(headers).is_some()
        && port(headers).is_some()
        && headers.get(REQUEST_ID).is_none_or(|id| id.len() <= REQUEST_ID_LIMIT)
}

/// Key of a pair. Clients that send no request id open the streams in the order error, data.
fn request_id(stream: &spdy::Stream, part: Part) -> String {
    match (stream.headers.get(REQUEST_ID), part) {
        (Some(id), _) if !id.is_empty() => id.to_owned(),
        (_, Part::Error) => format!("stream {}", stream.id),
        (_, Part::Data) => format!("stream {}", stream.id.saturating_sub(2)),
    }
}

/// Pairs with one open stream.
#[derive(Default)]
struct IncompletePairs {
    waiting: HashMap<String, (Part, spdy::Stream)>,
    deadlines: VecDeque<(Instant, String)>,
}

impl IncompletePairs {
    /// Adds a stream; returns the pair if it is complete.
    fn add(&mut self, stream: spdy::Stream, limit: Duration) -> Option<Pair> {
        let part = part(&stream.headers)?;
        let id = request_id(&stream, part);
        match self.waiting.remove(&id) {
            Some((other, first)) if other != part => {
                self.deadlines.retain(|(_, waiting)| *waiting != id);
                Some(match part {
                    Part::Data => Pair { data: stream, error: first },
                    Part::Error => Pair { data: first, error: stream },
                })
            }
            // A duplicate replaces the older stream, which is dropped: the client has reused an id.
            Some(_) | None => {
                self.deadlines.retain(|(_, waiting)| *waiting != id);
                self.deadlines.push_back((Instant::now() + limit, id.clone()));
                self.waiting.insert(id, (part, stream));
                None
            }
        }
    }

    /// Removes the stream that has waited longest if too many wait.
    fn excess(&mut self) -> Option<(Part, spdy::Stream)> {
        if self.waiting.len() <= WAITING_LIMIT {
            return None;
        }
        let (_, id) = self.deadlines.pop_front()?;
        self.waiting.remove(&id)
    }

    async fn timed_out(&mut self) -> Option<(Part, spdy::Stream)> {
        let Some((deadline, id)) = self.deadlines.front() else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(*deadline).await;
        let timed_out = self.waiting.remove(id);
        self.deadlines.pop_front();
        timed_out
    }
}

struct Pair {
    data: spdy::Stream,
    error: spdy::Stream,
}

pub(crate) async fn over_spdy(
    backend: Arc<dyn Backend>,
    pod: &str,
    (link, mut streams): (Link, mpsc::Receiver<spdy::Stream>),
    creation_limit: Duration,
) {
    let mut incomplete = IncompletePairs::default();
    let mut forwards = JoinSet::new();
    loop {
        tokio::select! {
            stream = streams.recv() => {
                let Some(stream) = stream else { break };
                let pair = incomplete.add(stream, creation_limit);
                if let Some((part, stream)) = incomplete.excess() {
                    tracing::debug!(?part, "too many incomplete stream pairs");
                    let message = b"too many connections wait for their data stream";
                    let ended = end_incomplete(part, stream, message);
                    tokio::select! {
                        () = ended => {}
                        () = link.closed.cancelled() => break,
                    }
                }
                let Some(Pair { data, error }) = pair else { continue };
                let Some(port) = port(&data.headers) else { continue };
                while forwards.try_join_next().is_some() {}
                if forwards.len() >= FORWARDS_LIMIT {
                    tracing::debug!(pod, port, "too many forwards on one connection");
                    let message = format!(
                        "error forwarding port {port} to pod {pod}: the maximum of \
                         {FORWARDS_LIMIT} connections is reached"
                    );
                    tokio::select! {
                        () = refuse(message, &data.outgoing, &error.outgoing) => {}
                        () = link.closed.cancelled() => break,
                    }
                    continue;
                }
                let (backend, pod) = (backend.clone(), pod.to_owned());
                let (data, error) = ((data.incoming, data.outgoing), error.outgoing);
                forwards.spawn(async move {
                    forward(&*backend, &pod, port, data, error, HalfClose::Yes).await;
                });
            }
            timed_out = incomplete.timed_out() => {
                if let Some((part, stream)) = timed_out {
                    tracing::debug!(?part, "timeout waiting for the other stream of a pair");
                    let ended = end_incomplete(part, stream, b"timed out waiting for the data stream");
                    tokio::select! {
                        () = ended => {}
                        () = link.closed.cancelled() => break,
                    }
                }
            }
            Some(_) = forwards.join_next() => {}
            () = link.closed.cancelled() => break,
        }
    }
}

/// Ends a stream without the other of its pair.
async fn end_incomplete(part: Part, stream: spdy::Stream, message: &'static [u8]) {
    let spdy::Stream { incoming, outgoing, .. } = stream;
    drop(incoming);
    if part == Part::Error {
        let _ = outgoing.send(Bytes::from_static(message)).await;
    }
    outgoing.finish().await;
}

/// Ends a pair with an error text.
async fn refuse(message: String, data: &Outgoing, error: &Outgoing) {
    let _ = error.send(message.into()).await;
    data.finish().await;
    error.finish().await;
}

/// The older WebSocket protocol: channels 2n and 2n + 1 are data and error of the nth port; each
/// starts with the port number, little-endian.
pub(crate) async fn over_websocket(
    backend: Arc<dyn Backend>,
    pod: &str,
    ports: &[u16],
    (link, channels): (Link, Vec<Channel>),
) {
    let mut forwards = JoinSet::new();
    let mut channels = channels.into_iter();
    for &port in ports {
        let (Some(data), Some(error)) = (channels.next(), channels.next()) else { break };
        let (backend, pod) = (backend.clone(), pod.to_owned());
        forwards.spawn(async move {
            let number = Bytes::copy_from_slice(&port.to_le_bytes());
            let _ = data.outgoing.send(number.clone()).await;
            let _ = error.outgoing.send(number).await;
            let data = (data.incoming, data.outgoing);
            forward(&*backend, &pod, port, data, error.outgoing, HalfClose::No).await;
        });
    }
    tokio::select! {
        () = async { while forwards.join_next().await.is_some() {} } => {}
        () = link.closed.cancelled() => return,
    }
    link.finish().await;
}

/// Whether the client can close its direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum HalfClose {
    Yes,
    No,
}

async fn forward(
    backend: &dyn Backend,
    pod: &str,
    port: u16,
    (incoming, outgoing): (Incoming, Outgoing),
    error: Outgoing,
    half_close: HalfClose,
) {
    let connected = tokio::select! {
        connected = backend.port_forward(pod, port) => connected,
        () = outgoing.reset() => return error.finish().await,
    };
    match connected {
        Ok(stream) => tokio::select! {
            () = copy_both(stream, incoming, &outgoing, half_close) => {}
            () = outgoing.reset() => {}
        },
        Err(refused) => {
            tracing::debug!(pod, port, error = %refused, "port-forward");
            let message = format!("error forwarding port {port} to pod {pod}: {refused}");
            return refuse(message, &outgoing, &error).await;
        }
    }
    error.finish().await;
}

/// Copies until both directions have ended.
async fn copy_both(
    stream: ByteStream,
    incoming: Incoming,
    outgoing: &Outgoing,
    half_close: HalfClose,
) {
    let (from_pod, to_pod) = tokio::io::split(stream);
    let copy_to_pod = copy_to_pod(incoming, to_pod);
    let copy_from_pod = copy_from_pod(from_pod, outgoing);
    match half_close {
        HalfClose::Yes => {
            // An error is a reset, which ends both directions.
            let _ = tokio::try_join!(copy_to_pod, copy_from_pod);
        }
        HalfClose::No => tokio::select! {
            _ = copy_from_pod => {}
            () = async {
                let _ = copy_to_pod.await;
                std::future::pending::<()>().await;
            } => {}
        },
    }
}

async fn copy_to_pod(
    mut incoming: Incoming,
    mut to_pod: WriteHalf<ByteStream>,
) -> Result<(), Reset> {
    while let Some(chunk) = incoming.next().await? {
        let written = async {
            to_pod.write_all(&chunk).await?;
            to_pod.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "port-forward: cannot write to the pod");
            return Ok(());
        }
    }
    if let Err(error) = to_pod.shutdown().await {
        tracing::debug!(%error, "port-forward: cannot shut down");
    }
    Ok(())
}

async fn copy_from_pod(
    mut from_pod: ReadHalf<ByteStream>,
    outgoing: &Outgoing,
) -> Result<(), Reset> {
    let mut bytes = BytesMut::new();
    loop {
        bytes.reserve(CHUNK);
        match from_pod.read_buf(&mut bytes).await {
            Ok(1..) => outgoing.send(bytes.split().freeze()).await?,
            Ok(0) => break,
            Err(error) => {
                tracing::debug!(%error, "port-forward: cannot read from the pod");
                break;
            }
        }
    }
    outgoing.finish().await;
    Ok(())
}
