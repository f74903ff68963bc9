//! Channels: the first byte of a message is the channel number, or its digit if the rest is base64.
//! From version 5 on, number 255 closes the channel in the second byte.

use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::mpsc;

use super::frame::{self, Decoder, Event, FrameError};
use crate::io::{self, CHUNK, Incoming, OUT_QUEUE, Out, Outgoing, Sender};
use crate::link::{Delivery, Encoder, Link, LinkContext, Peer, ReaderContext, deliver};

/// Channel number of a message that closes a channel.
const CLOSE_SIGNAL: u8 = 255;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    Binary,
    Base64,
    /// No channels: the messages are one byte stream.
    Stream,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Protocol {
    pub(crate) codec: Codec,
    /// Whether the client can close a channel.
    pub(crate) close_signal: bool,
}

/// Both directions of a channel; the protocol uses one of them.
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
    let (queue, out) = mpsc::channel(OUT_QUEUE);
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
    /// None for channels that the client has closed.
    senders: Vec<Option<Sender>>,
    message: Message,
}

/// Position of the reader in a message.
enum Message {
    Start,
    Of(u8),
    /// Bytes of an incomplete group of four characters.
    Base64(u8, BytesMut),
    CloseSignal,
    Skipped,
}

struct Disconnected;

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
                        if let Err(Disconnected) = self.piece(bytes, last).await? {
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
    ) -> Result<Result<(), Disconnected>, FrameError> {
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
                        tracing::debug!(channel, "invalid base64 in a message");
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

    async fn deliver(&mut self, channel: u8, bytes: Bytes) -> Result<(), Disconnected> {
        // Unknown and closed channels are ignored.
        let Some(slot) = self.senders.get_mut(usize::from(channel)) else { return Ok(()) };
        let Some(sender) = slot else { return Ok(()) };
        if bytes.is_empty() {
            return Ok(());
        }
        match deliver(sender, bytes, &self.context).await {
            Delivery::Sent => Ok(()),
            Delivery::Closed => {
                *slot = None;
                Ok(())
            }
            Delivery::Disconnected => Err(Disconnected),
        }
    }
}

struct ChannelEncoder {
    codec: Codec,
}

impl Encoder for ChannelEncoder {
    fn encode(&mut self, out: Out, into: &mut BytesMut) {
        match out {
            // A channel to the client ends with the connection only.
            Out::Data { end: true, .. } => {}
            Out::Data { id, bytes, .. } => {
                let id = u8::try_from(id).expect("channel numbers are bytes");
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
            // RFC 6455, section 5.5.3: an unsolicited pong needs no reply.
            Out::Heartbeat => frame::put_pong(into, &[]),
            Out::Close(reason) => frame::put_close(into, reason),
            Out::Reply { .. } | Out::Refuse { .. } => {}
        }
    }
}
