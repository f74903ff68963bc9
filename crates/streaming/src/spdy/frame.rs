//! Frame encoding. Control frames are buffered up to a limit; data frames are passed on in pieces
//! as they arrive, whatever their length.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use super::headers::{Deflater, HeaderError, Headers, Inflater};
use crate::io::{CHUNK, CloseReason, Out};
use crate::link::Encoder;

const VERSION: u16 = 3;
const HEADER_LENGTH: usize = 8;
pub(crate) const FLAG_FIN: u8 = 0x01;

/// Control frame types, section 2.6.
pub(crate) mod kind {
    pub(crate) const SYN_STREAM: u16 = 1;
    pub(crate) const SYN_REPLY: u16 = 2;
    pub(crate) const RST_STREAM: u16 = 3;
    pub(crate) const SETTINGS: u16 = 4;
    pub(crate) const PING: u16 = 6;
    pub(crate) const GOAWAY: u16 = 7;
    pub(crate) const HEADERS: u16 = 8;
    pub(crate) const WINDOW_UPDATE: u16 = 9;
}

/// Status of RST_STREAM, section 2.6.3.
pub(crate) mod reset {
    pub(crate) const PROTOCOL_ERROR: u32 = 1;
    pub(crate) const REFUSED_STREAM: u32 = 3;
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("SPDY version {version} instead of {VERSION}")]
    Version { version: u16 },
    #[error("control frame of type {kind} has {length} bytes, more than {limit}")]
    TooLong { kind: u16, length: usize, limit: usize },
    #[error("control frame of type {kind} cannot have {length} bytes")]
    Length { kind: u16, length: usize },
    #[error("settings frame of {length} bytes claims {entries} entries")]
    Settings { entries: u32, length: usize },
    #[error("frame of type {kind} on stream 0")]
    ZeroStream { kind: u16 },
    #[error("data on stream 0")]
    ZeroData,
    #[error(transparent)]
    Headers(#[from] HeaderError),
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Frame {
    Open {
        id: u32,
        headers: Headers,
        end: bool,
    },
    /// A piece of a data frame; `end` is set on the last piece only.
    Data {
        id: u32,
        bytes: Bytes,
        end: bool,
    },
    Reset {
        id: u32,
    },
    Ping {
        id: u32,
    },
    /// HEADERS with FLAG_FIN; its content is not used.
    End {
        id: u32,
    },
    /// A frame that needs no action by the server.
    Other,
}

pub(crate) struct Decoder {
    inflater: Inflater,
    control_limit: usize,
    /// Remainder of the current data frame.
    data: Option<Data>,
}

struct Data {
    id: u32,
    left: usize,
    end: bool,
}

impl Decoder {
    pub(crate) fn new(control_limit: usize, header_limit: usize) -> Self {
        Decoder { inflater: Inflater::new(header_limit), control_limit, data: None }
    }

    /// Decodes a frame, or a piece of a data frame. None: more bytes are needed.
    pub(crate) fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Frame>, FrameError> {
        if let Some(data) = &mut self.data {
            let length = data.left.min(bytes.len()).min(CHUNK);
            if length == 0 {
                return Ok(None);
            }
            data.left -= length;
            let (id, end, whole) = (data.id, data.end && data.left == 0, data.left == 0);
            if whole {
                self.data = None;
            }
            return Ok(Some(Frame::Data { id, bytes: bytes.split_to(length).freeze(), end }));
        }
        let Some(mut header) = bytes.get(..HEADER_LENGTH) else { return Ok(None) };
        let first = header.get_u32();
        let flags_and_length = header.get_u32();
        let flags = (flags_and_length >> 24) as u8;
        let length = (flags_and_length & 0xff_ffff) as usize;
        if first >> 31 == 0 {
            if first == 0 {
                return Err(FrameError::ZeroData);
            }
            bytes.advance(HEADER_LENGTH);
            let end = flags & FLAG_FIN != 0;
            if length == 0 {
                return Ok(Some(Frame::Data { id: first, bytes: Bytes::new(), end }));
            }
            self.data = Some(Data { id: first, left: length, end });
            return self.decode(bytes);
        }
        let version = (first >> 16 & 0x7fff) as u16;
        let kind = (first & 0xffff) as u16;
        if version != VERSION {
            return Err(FrameError::Version { version });
        }
        if length > self.control_limit {
            return Err(FrameError::TooLong { kind, length, limit: self.control_limit });
        }
        if bytes.len() < HEADER_LENGTH + length {
            return Ok(None);
        }
        bytes.advance(HEADER_LENGTH);
        let payload = bytes.split_to(length);
        self.control(kind, flags, &payload).map(Some)
    }

    fn control(&mut self, kind: u16, flags: u8, payload: &[u8]) -> Result<Frame, FrameError> {
        let length = payload.len();
        let wrong = FrameError::Length { kind, length };
        let exactly = |expected: usize| {
            if length == expected { Ok(()) } else { Err(FrameError::Length { kind, length }) }
        };
        let end = flags & FLAG_FIN != 0;
        let mut rest = payload;
        match kind {
            kind::SYN_STREAM => {
                // Stream id, associated stream id, priority and slot; then the header block.
                let (fixed, block) = payload.split_at_checked(10).ok_or(wrong)?;
                let headers = self.inflater.headers(block)?;
                let id = stream(kind, fixed)?;
                Ok(Frame::Open { id, headers, end })
            }
            kind::SYN_REPLY | kind::HEADERS => {
                let (fixed, block) = payload.split_at_checked(4).ok_or(wrong)?;
                self.inflater.headers(block)?;
                let id = stream(kind, fixed)?;
                Ok(if kind == kind::HEADERS && end { Frame::End { id } } else { Frame::Other })
            }
            kind::RST_STREAM => {
                exactly(8)?;
                Ok(Frame::Reset { id: stream(kind, payload)? })
            }
            kind::PING => {
                exactly(4)?;
                Ok(Frame::Ping { id: rest.get_u32() })
            }
            kind::SETTINGS => {
                let entries = rest.try_get_u32().map_err(|_| wrong)?;
                if u64::from(entries) * 8 != rest.len() as u64 {
                    return Err(FrameError::Settings { entries, length });
                }
                Ok(Frame::Other)
            }
            kind::GOAWAY | kind::WINDOW_UPDATE => exactly(8).map(|()| Frame::Other),
            // Section 2.2.1: unknown types are ignored.
            _ => Ok(Frame::Other),
        }
    }
}

fn stream(kind: u16, mut fixed: &[u8]) -> Result<u32, FrameError> {
    match fixed.get_u32() & 0x7fff_ffff {
        0 => Err(FrameError::ZeroStream { kind }),
        id => Ok(id),
    }
}

pub(crate) struct FrameEncoder {
    deflater: Deflater,
    last_stream: u32,
}

impl FrameEncoder {
    pub(crate) fn new() -> Self {
        FrameEncoder { deflater: Deflater::new(), last_stream: 0 }
    }
}

fn control(into: &mut BytesMut, kind: u16, length: usize) {
    into.put_u16(0x8000 | VERSION);
    into.put_u16(kind);
    into.put_u32(u32::try_from(length).expect("own control frames are short"));
}

impl Encoder for FrameEncoder {
    fn encode(&mut self, out: Out, into: &mut BytesMut) {
        match out {
            Out::Data { id, bytes, end } => {
                let length = u32::try_from(bytes.len()).unwrap_or(u32::MAX);
                assert!(length < 1 << 24, "own chunks are short");
                let flags = if end { u32::from(FLAG_FIN) << 24 } else { 0 };
                into.put_u32(id);
                into.put_u32(flags | length);
                into.put_slice(&bytes);
            }
            Out::Reply { id } => {
                self.last_stream = self.last_stream.max(id);
                let block = self.deflater.deflate(&[]);
                control(into, kind::SYN_REPLY, 4 + block.len());
                into.put_u32(id);
                into.put_slice(&block);
            }
            Out::Refuse { id, status } => {
                control(into, kind::RST_STREAM, 8);
                into.put_u32(id);
                into.put_u32(status);
            }
            Out::Pong(id) => {
                control(into, kind::PING, id.len());
                into.put_slice(&id);
            }
            // Not a PING: spdystream would queue the reply behind the blocked input, and with it
            // the following frames. It ignores SETTINGS without entries.
            Out::Heartbeat => {
                control(into, kind::SETTINGS, 4);
                into.put_u32(0);
            }
            Out::Close(reason) => {
                control(into, kind::GOAWAY, 8);
                into.put_u32(self.last_stream);
                into.put_u32(u32::from(reason == CloseReason::ProtocolError));
            }
        }
    }
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
