//! Port-forward. Over SPDY, bare or inside a WebSocket, each forwarded connection is a pair of
//! streams, data and error, joined by a request id; any number share a client's connection. The
//! old WebSocket form has two channels a port, and one connection each.

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

/// Headers of a SPDY stream, in lower case as all of them.
const STREAM_TYPE: &str = "streamtype";
const PORT: &str = "port";
const REQUEST_ID: &str = "requestid";
/// Clients count their requests; what is longer is no number.
const REQUEST_ID_LIMIT: usize = 64;
/// Streams of a connection that wait for the other of their pair. Each may hold some 64 KiB, and
/// clients open a pair's streams one right after the other.
const WAITING_LIMIT: usize = 32;
/// Forwards under way on one connection.
const FORWARDS_LIMIT: usize = 256;
/// Ports of the old WebSocket form: channel numbers are bytes.
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

/// Clients that send no request id open a pair's streams one after the other: error, data.
fn request_id(stream: &spdy::Stream, part: Part) -> String {
    match (stream.headers.get(REQUEST_ID), part) {
        (Some(id), _) if !id.is_empty() => id.to_owned(),
        (_, Part::Error) => format!("stream {}", stream.id),
        (_, Part::Data) => format!("stream {}", stream.id.saturating_sub(2)),
    }
}

/// Pairs of which one stream is there.
#[derive(Default)]
struct Halves {
    waiting: HashMap<String, (Part, spdy::Stream)>,
    deadlines: VecDeque<(Instant, String)>,
}

impl Halves {
    /// A whole pair, data first.
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
            // The older one is dropped: its client waits for it in vain, as it must with an id
            // that is not its own.
            Some(_) | None => {
                self.deadlines.retain(|(_, waiting)| *waiting != id);
                self.deadlines.push_back((Instant::now() + limit, id.clone()));
                self.waiting.insert(id, (part, stream));
                None
            }
        }
    }

    /// The one that waits longest, where too many wait.
    fn excess(&mut self) -> Option<(Part, spdy::Stream)> {
        if self.waiting.len() <= WAITING_LIMIT {
            return None;
        }
        let (_, id) = self.deadlines.pop_front()?;
        self.waiting.remove(&id)
    }

    async fn late(&mut self) -> Option<(Part, spdy::Stream)> {
        let Some((deadline, id)) = self.deadlines.front() else {
            return std::future::pending().await;
        };
        tokio::time::sleep_until(*deadline).await;
        let late = self.waiting.remove(id);
        self.deadlines.pop_front();
        late
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
    let mut halves = Halves::default();
    let mut forwards = JoinSet::new();
    loop {
        tokio::select! {
            stream = streams.recv() => {
                let Some(stream) = stream else { break };
                let pair = halves.add(stream, creation_limit);
                if let Some((part, stream)) = halves.excess() {
                    tracing::debug!(?part, "too many streams wait for the other of their pair");
                    let words = b"too many connections wait for their data stream";
                    let ended = give_up(part, stream, words);
                    tokio::select! {
                        () = ended => {}
                        () = link.gone.cancelled() => break,
                    }
                }
                let Some(Pair { data, error }) = pair else { continue };
                let Some(port) = port(&data.headers) else { continue };
                while forwards.try_join_next().is_some() {}
                if forwards.len() >= FORWARDS_LIMIT {
                    tracing::debug!(pod, port, "too many forwards on one connection");
                    let words = format!(
                        "error forwarding port {port} to pod {pod}: {FORWARDS_LIMIT} connections \
                         are open already"
                    );
                    tokio::select! {
                        () = refuse(words, &data.outgoing, &error.outgoing) => {}
                        () = link.gone.cancelled() => break,
                    }
                    continue;
                }
                let (backend, pod) = (backend.clone(), pod.to_owned());
                let (data, error) = ((data.incoming, data.outgoing), error.outgoing);
                forwards.spawn(async move {
                    forward(&*backend, &pod, port, data, error, HalfClose::Yes).await;
                });
            }
            late = halves.late() => {
                if let Some((part, stream)) = late {
                    tracing::debug!(?part, "the other stream of a pair did not come");
                    let ended = give_up(part, stream, b"timed out waiting for the data stream");
                    tokio::select! {
                        () = ended => {}
                        () = link.gone.cancelled() => break,
                    }
                }
            }
            Some(_) = forwards.join_next() => {}
            () = link.gone.cancelled() => break,
        }
    }
}

/// Ends a stream whose other one is not there.
async fn give_up(part: Part, stream: spdy::Stream, words: &'static [u8]) {
    let spdy::Stream { incoming, outgoing, .. } = stream;
    drop(incoming);
    if part == Part::Error {
        let _ = outgoing.send(Bytes::from_static(words)).await;
    }
    outgoing.finish().await;
}

/// Ends a pair with words for its user.
async fn refuse(words: String, data: &Outgoing, error: &Outgoing) {
    let _ = error.send(words.into()).await;
    data.finish().await;
    error.finish().await;
}

/// The old form: channels 2n and 2n + 1 are data and error of the nth port, each of which begins
/// with the port's number in little endian.
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
        () = link.gone.cancelled() => return,
    }
    link.finish().await;
}

/// Whether the client can end its direction.
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
            () = join(stream, incoming, &outgoing, half_close) => {}
            () = outgoing.reset() => {}
        },
        Err(refused) => {
            tracing::debug!(pod, port, error = %refused, "port-forward");
            let words = format!("error forwarding port {port} to pod {pod}: {refused}");
            return refuse(words, &outgoing, &error).await;
        }
    }
    error.finish().await;
}

/// Until both directions have ended, each on its own.
async fn join(stream: ByteStream, incoming: Incoming, outgoing: &Outgoing, half_close: HalfClose) {
    let (from_pod, to_pod) = tokio::io::split(stream);
    let inwards = inwards(incoming, to_pod);
    let outwards = outwards(from_pod, outgoing);
    match half_close {
        HalfClose::Yes => {
            // An error is a reset, which ends both.
            let _ = tokio::try_join!(inwards, outwards);
        }
        HalfClose::No => tokio::select! {
            _ = outwards => {}
            () = async {
                let _ = inwards.await;
                std::future::pending::<()>().await;
            } => {}
        },
    }
}

async fn inwards(mut incoming: Incoming, mut to_pod: WriteHalf<ByteStream>) -> Result<(), Reset> {
    while let Some(chunk) = incoming.next().await? {
        let written = async {
            to_pod.write_all(&chunk).await?;
            to_pod.flush().await
        };
        if let Err(error) = written.await {
            tracing::debug!(%error, "port-forward: the pod takes no more");
            return Ok(());
        }
    }
    if let Err(error) = to_pod.shutdown().await {
        tracing::debug!(%error, "port-forward: end of input");
    }
    Ok(())
}

async fn outwards(mut from_pod: ReadHalf<ByteStream>, outgoing: &Outgoing) -> Result<(), Reset> {
    let mut bytes = BytesMut::new();
    loop {
        bytes.reserve(CHUNK);
        match from_pod.read_buf(&mut bytes).await {
            Ok(1..) => outgoing.send(bytes.split().freeze()).await?,
            Ok(0) => break,
            Err(error) => {
                tracing::debug!(%error, "port-forward: output of the pod");
                break;
            }
        }
    }
    outgoing.finish().await;
    Ok(())
}
