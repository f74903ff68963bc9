//! Channels: the first byte of a message is the channel's number, or its digit where the rest is
//! base64. From version 5 on, number 255 ends the channel that the second byte names.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::mpsc;

use super::frame::{self, Decoder, Event, FrameError};
use crate::io::{self, CHUNK, Incoming, OUT_WAITING, Out, Outgoing, Sender};
use crate::link::{Delivery, Encoder, Link, LinkContext, Peer, ReaderContext, deliver};

/// Number of the message that ends a channel.
const CLOSE_SIGNAL: u8 = 255;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Binary,
    Base64,
    /// No channels: messages are one stream of bytes.
    Stream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protocol {
    pub(crate) codec: Codec,
    /// Whether the client can end a channel.
    pub(crate) close_signal: bool,
}

/// Both directions of a channel; the protocol says which of them is used.
pub(crate) struct Channel {
    pub(crate) incoming: Incoming,
    pub(crate) outgoing: Outgoing,
}

pub(crate) fn open(
    socket: impl AsyncRead + AsyncWrite + Send + 'static,
    protocol: Protocol,
    channels: u8,
    idle_timeout: Duration,
    peer: Peer,
) -> (Link, Vec<Channel>) {
    let (read_half, write_half) = tokio::io::split(socket);
    let (queue, out) = mpsc::channel(OUT_WAITING);
    let (senders, channels) = (0..channels)
        .map(|id| {
            let (sender, incoming) = io::incoming();
            let outgoing = incoming.outgoing(id.into(), &queue);
            (Some(sender), Channel { incoming, outgoing })
        })
        .unzip();
    let context = LinkContext { queue, out, idle_timeout, peer };
    let encoder = ChannelEncoder { codec: protocol.codec };
    let link = Link::start(write_half, encoder, context, |context| {
        Reader { context, protocol, senders, message: Message::Skipped }.run(read_half)
    });
    (link, channels)
}

struct Reader {
    context: ReaderContext,
    protocol: Protocol,
    /// None for channels that the client has ended.
    senders: Vec<Option<Sender>>,
    message: Message,
}

/// Where in a message the reader is.
enum Message {
    Start,
    Of(u8),
    /// What does not make four characters yet.
    Base64(u8, BytesMut),
    CloseSignal,
    Skipped,
}

struct Gone;

impl Reader {
    async fn run(mut self, mut socket: impl AsyncRead + Unpin) -> Result<(), FrameError> {
        let mut decoder = Decoder::default();
        let mut bytes = BytesMut::new();
        loop {
            while let Some(event) = decoder.decode(&mut bytes)? {
                match event {
                    Event::Piece { bytes, first, last } => {
                        if first {
                            self.message = match self.protocol.codec {
                                Codec::Stream => Message::Of(0),
                                Codec::Binary | Codec::Base64 => Message::Start,
                            };
                        }
                        if !bytes.is_empty() {
                            self.context.activity.touch();
                        }
                        if let Err(Gone) = self.piece(bytes, last).await? {
                            return Ok(());
                        }
                    }
                    Event::Ping(payload) => {
                        if self.context.queue.send(Out::Pong(payload)).await.is_err() {
                            return Ok(());
                        }
                    }
                    Event::Pong => {}
                    Event::Close => return Ok(()),
                }
            }
            bytes.reserve(CHUNK);
            match socket.read_buf(&mut bytes).await {
                Ok(0) => return Ok(()),
                Ok(_) => {}
                Err(error) => {
                    tracing::debug!(%error, "streaming client");
                    return Ok(());
                }
            }
        }
    }

    async fn piece(
        &mut self,
        mut bytes: Bytes,
        last: bool,
    ) -> Result<Result<(), Gone>, FrameError> {
        if matches!(self.message, Message::Start) && bytes.has_remaining() {
            let number = bytes.get_u8();
            self.message = match self.protocol {
                Protocol { close_signal: true, .. } if number == CLOSE_SIGNAL => {
                    Message::CloseSignal
                }
                Protocol { codec: Codec::Base64, .. } => {
                    Message::Base64(number.wrapping_sub(b'0'), BytesMut::new())
                }
                Protocol { .. } => Message::Of(number),
            };
            if matches!(self.message, Message::CloseSignal) && last && bytes.is_empty() {
                return Err(FrameError::CloseSignal { length: 0 });
            }
        }
        match &mut self.message {
            Message::Start | Message::Skipped => Ok(Ok(())),
            Message::Of(channel) => {
                let channel = *channel;
                Ok(self.deliver(channel, bytes).await)
            }
            Message::Base64(channel, waiting) => {
                waiting.extend_from_slice(&bytes);
                let length = waiting.len() - waiting.len() % 4;
                let text = waiting.split_to(length);
                let (channel, whole) = (*channel, !last || waiting.is_empty());
                match STANDARD.decode(&text) {
                    Ok(decoded) if whole => Ok(self.deliver(channel, decoded.into()).await),
                    _ => {
                        tracing::debug!(channel, "message is not base64");
                        self.message = Message::Skipped;
                        Ok(Ok(()))
                    }
                }
            }
            Message::CloseSignal if bytes.is_empty() && !last => Ok(Ok(())),
            Message::CloseSignal => {
                let &[channel] = &bytes[..] else {
                    return Err(FrameError::CloseSignal { length: bytes.len() });
                };
                if let Some(sender) = self.senders.get_mut(usize::from(channel)) {
                    *sender = None;
                }
                self.message = Message::Skipped;
                Ok(Ok(()))
            }
        }
    }

    async fn deliver(&mut self, channel: u8, bytes: Bytes) -> Result<(), Gone> {
        // Channels that do not exist, or have ended, are ignored.
        let Some(slot) = self.senders.get_mut(usize::from(channel)) else { return Ok(()) };
        let Some(sender) = slot else { return Ok(()) };
        if bytes.is_empty() {
            return Ok(());
        }
        match deliver(sender, bytes, &self.context).await {
            Delivery::Sent => Ok(()),
            Delivery::Unwanted => {
                *slot = None;
                Ok(())
            }
            Delivery::Gone => Err(Gone),
        }
    }
}

struct ChannelEncoder {
    codec: Codec,
}

impl Encoder for ChannelEncoder {
    fn encode(&mut self, out: Out, into: &mut BytesMut) {
        match out {
            // Only the connection's end ends a channel to the client.
            Out::Data { end: true, .. } => {}
            Out::Data { id, bytes, .. } => {
                let id = u8::try_from(id).expect("channels are counted in a byte");
                match self.codec {
                    Codec::Binary => frame::put_binary(into, &[id], &bytes),
                    Codec::Stream => frame::put_binary(into, &[], &bytes),
                    Codec::Base64 => {
                        let mut text = String::from(char::from(b'0'.wrapping_add(id)));
                        STANDARD.encode_string(&bytes, &mut text);
                        frame::put_text(into, &text);
                    }
                }
            }
            Out::Pong(payload) => frame::put_pong(into, &payload),
            // RFC 6455, section 5.5.3: one that nobody asked for needs no answer.
            Out::Heartbeat => frame::put_pong(into, &[]),
            Out::Close(reason) => frame::put_close(into, reason),
            Out::Reply { .. } | Out::Refuse { .. } => {}
        }
    }
}
