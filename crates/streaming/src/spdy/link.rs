//! A SPDY connection: the table of open streams and the dispatch of their data.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::Headers;
use super::frame::{Decoder, Frame, FrameEncoder, FrameError, reset};
use crate::config::Limits;
use crate::io::{self, CHUNK, Incoming, OUT_QUEUE, Out, Outgoing, Sender};
use crate::link::{Delivery, Link, LinkContext, Peer, ReaderContext, deliver};

/// Queue length of opened streams to the session.
const OPEN_QUEUE: usize = 8;

pub(crate) struct Options {
    /// Decides by the headers whether a stream is accepted.
    pub(crate) accept: fn(&Headers) -> bool,
    pub(crate) limits: Limits,
    pub(crate) idle_timeout: Duration,
    pub(crate) peer: Peer,
}

/// An accepted stream of the client.
pub(crate) struct Stream {
    pub(crate) id: u32,
    pub(crate) headers: Headers,
    pub(crate) incoming: Incoming,
    pub(crate) outgoing: Outgoing,
}

pub(crate) fn start(
    socket: impl AsyncRead + AsyncWrite + Send + 'static,
    options: Options,
) -> (Link, mpsc::Receiver<Stream>) {
    let (read_half, write_half) = tokio::io::split(socket);
    let (opened, streams) = mpsc::channel(OPEN_QUEUE);
    let (queue, out) = mpsc::channel(OUT_QUEUE);
    let Options { accept, limits, idle_timeout, peer } = options;
    let context = LinkContext { queue, out, idle_timeout, peer };
    let link = Link::start(write_half, FrameEncoder::new(), context, |context| {
        let decoder = Decoder::new(limits.control_frame_bytes, limits.header_block_bytes);
        let reader = Reader {
            context,
            opened,
            accept,
            streams_limit: limits.streams,
            streams: HashMap::new(),
            last_opened: 0,
        };
        reader.run(read_half, decoder)
    });
    (link, streams)
}

struct Reader {
    context: ReaderContext,
    opened: mpsc::Sender<Stream>,
    accept: fn(&Headers) -> bool,
    streams_limit: usize,
    streams: HashMap<u32, Entry>,
    last_opened: u32,
}

struct Entry {
    /// None after the end of the client's input.
    sender: Option<Sender>,
    reset: Arc<CancellationToken>,
}

impl Entry {
    /// Whether the session has dropped both directions.
    fn is_closed(&self) -> bool {
        let ours = 1 + usize::from(self.sender.is_some());
        Arc::strong_count(&self.reset) <= ours
    }
}

/// The client has disconnected, or the session has ended.
struct Stop;

impl Reader {
    async fn run(
        mut self,
        mut socket: impl AsyncRead + Unpin,
        mut decoder: Decoder,
    ) -> Result<(), FrameError> {
        let mut bytes = BytesMut::new();
        loop {
            while let Some(frame) = decoder.decode(&mut bytes)? {
                if let Err(Stop) = self.handle(frame).await {
                    return Ok(());
                }
            }
            bytes.reserve(CHUNK);
            match socket.read_buf(&mut bytes).await {
                Ok(0) => return Ok(()),
                Ok(_) => self.context.activity.touch(),
                Err(error) => {
                    tracing::debug!(%error, "streaming client");
                    return Ok(());
                }
            }
        }
    }

    async fn handle(&mut self, frame: Frame) -> Result<(), Stop> {
        match frame {
            Frame::Open { id, headers, end } => self.open(id, headers, end).await,
            Frame::Data { id, bytes, end } => self.data(id, bytes, end).await,
            Frame::End { id } => self.data(id, Bytes::new(), true).await,
            Frame::Reset { id } => {
                if let Some(entry) = self.streams.remove(&id) {
                    entry.reset.cancel();
                }
                Ok(())
            }
            // Even ids are replies to pings of the server, which sends none.
            Frame::Ping { id } if id % 2 == 1 => {
                self.send(Out::Pong(Bytes::copy_from_slice(&id.to_be_bytes()))).await
            }
            Frame::Ping { .. } | Frame::Other => Ok(()),
        }
    }

    async fn open(&mut self, id: u32, headers: Headers, end: bool) -> Result<(), Stop> {
        if id.is_multiple_of(2) || id <= self.last_opened {
            return self.send(Out::Refuse { id, status: reset::PROTOCOL_ERROR }).await;
        }
        self.last_opened = id;
        if self.streams.len() >= self.streams_limit {
            self.streams.retain(|_, entry| !entry.is_closed());
        }
        if self.streams.len() >= self.streams_limit || !(self.accept)(&headers) {
            return self.send(Out::Refuse { id, status: reset::REFUSED_STREAM }).await;
        }
        let (sender, incoming) = io::incoming();
        let outgoing = incoming.outgoing(id, &self.context.queue);
        let entry = Entry { reset: sender.reset.clone(), sender: (!end).then_some(sender) };
        self.streams.insert(id, entry);
        self.send(Out::Reply { id }).await?;
        // Fails if the session has ended.
        let _ = self.opened.send(Stream { id, headers, incoming, outgoing }).await;
        Ok(())
    }

    async fn data(&mut self, id: u32, bytes: Bytes, end: bool) -> Result<(), Stop> {
        // Data of a closed stream may still arrive.
        let Some(entry) = self.streams.get_mut(&id) else { return Ok(()) };
        if let Some(sender) = &entry.sender
            && !bytes.is_empty()
        {
            match deliver(sender, bytes, &self.context).await {
                Delivery::Sent => {}
                Delivery::Closed => entry.sender = None,
                Delivery::Disconnected => return Err(Stop),
            }
        }
        if end {
            entry.sender = None;
            if entry.is_closed() {
                self.streams.remove(&id);
            }
        }
        Ok(())
    }

    async fn send(&self, out: Out) -> Result<(), Stop> {
        self.context.queue.send(out).await.map_err(|_| Stop)
    }
}
