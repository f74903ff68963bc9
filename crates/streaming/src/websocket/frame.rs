//! Frame encoding (RFC 6455, section 5). Payload is passed on in pieces as it arrives.

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::io::{CHUNK, CloseReason};

/// Section 5.2.
mod opcode {
    pub(super) const CONTINUATION: u8 = 0;
    pub(super) const TEXT: u8 = 1;
    pub(super) const BINARY: u8 = 2;
    pub(super) const CLOSE: u8 = 8;
    pub(super) const PING: u8 = 9;
    pub(super) const PONG: u8 = 10;
}

const FIN: u8 = 0x80;
const RESERVED: u8 = 0x70;
const MASKED: u8 = 0x80;
/// Section 5.5.
const CONTROL_LIMIT: usize = 125;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum FrameError {
    #[error("reserved bits are set: {first:#04x}")]
    Reserved { first: u8 },
    #[error("opcode {opcode} does not exist")]
    Opcode { opcode: u8 },
    #[error("frame of a client without mask")]
    Unmasked,
    #[error("control frame of {length} bytes, or in fragments")]
    Control { length: u64 },
    #[error("frame of {length} bytes")]
    Length { length: u64 },
    #[error("data frame inside of a message, or continuation without a message")]
    Order,
    #[error("close signal of {length} bytes instead of one")]
    CloseSignal { length: usize },
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    /// A piece of a message; may be empty.
    Piece {
        bytes: Bytes,
        first: bool,
        last: bool,
    },
    Ping(Bytes),
    Pong,
    Close,
}

#[derive(Default)]
pub(crate) struct Decoder {
    /// Inside of a fragmented message.
    in_message: bool,
    frame: Option<DataFrame>,
}

struct DataFrame {
    left: u64,
    mask: [u8; 4],
    first: bool,
    fin: bool,
}

impl Decoder {
    /// Decodes a control frame or a piece of a message. None: more bytes are needed.
    pub(crate) fn decode(&mut self, bytes: &mut BytesMut) -> Result<Option<Event>, FrameError> {
        if let Some(frame) = &mut self.frame {
            let length = usize::try_from(frame.left).unwrap_or(usize::MAX);
            let length = length.min(bytes.len()).min(CHUNK);
            if length == 0 && frame.left > 0 {
                return Ok(None);
            }
            let mut piece = bytes.split_to(length);
            unmask(&mut piece, frame.mask);
            frame.mask.rotate_left(length % 4);
            frame.left -= length as u64;
            let first = std::mem::take(&mut frame.first);
            let mut last = false;
            if frame.left == 0 {
                last = frame.fin;
                self.in_message = !last;
                self.frame = None;
            }
            return Ok(Some(Event::Piece { bytes: piece.freeze(), first, last }));
        }
        let Some(header) = Header::parse(bytes)? else { return Ok(None) };
        match header.opcode {
            opcode::CONTINUATION | opcode::TEXT | opcode::BINARY => {
                let first = header.opcode != opcode::CONTINUATION;
                if first == self.in_message {
                    return Err(FrameError::Order);
                }
                bytes.advance(header.size);
                self.in_message = true;
                let Header { length, mask, fin, .. } = header;
                self.frame = Some(DataFrame { left: length, mask, first, fin });
                self.decode(bytes)
            }
            opcode::CLOSE | opcode::PING | opcode::PONG => {
                let length = match usize::try_from(header.length) {
                    Ok(length) if length <= CONTROL_LIMIT && header.fin => length,
                    _ => return Err(FrameError::Control { length: header.length }),
                };
                if bytes.len() < header.size + length {
                    return Ok(None);
                }
                bytes.advance(header.size);
                let mut payload = bytes.split_to(length);
                unmask(&mut payload, header.mask);
                Ok(Some(match header.opcode {
                    opcode::PING => Event::Ping(payload.freeze()),
                    opcode::PONG => Event::Pong,
                    _ => Event::Close,
                }))
            }
            opcode => Err(FrameError::Opcode { opcode }),
        }
    }
}

struct Header {
    fin: bool,
    opcode: u8,
    length: u64,
    mask: [u8; 4],
    size: usize,
}

impl Header {
    fn parse(bytes: &[u8]) -> Result<Option<Header>, FrameError> {
        let &[first, second, ..] = bytes else { return Ok(None) };
        if first & RESERVED != 0 {
            return Err(FrameError::Reserved { first });
        }
        if second & MASKED == 0 {
            return Err(FrameError::Unmasked);
        }
        let mut rest = &bytes[2..];
        let length = match second & !MASKED {
            126 => rest.try_get_u16().map(u64::from),
            127 => rest.try_get_u64(),
            short => Ok(short.into()),
        };
        let Ok(length) = length else { return Ok(None) };
        if length >> 63 != 0 {
            return Err(FrameError::Length { length });
        }
        let Some((mask, rest)) = rest.split_first_chunk::<4>() else { return Ok(None) };
        Ok(Some(Header {
            fin: first & FIN != 0,
            opcode: first & 0x0f,
            length,
            mask: *mask,
            size: bytes.len() - rest.len(),
        }))
    }
}

fn unmask(bytes: &mut [u8], mask: [u8; 4]) {
    let (message, rest) = bytes.as_chunks_mut::<4>();
    for word in message {
        *word = (u32::from_ne_bytes(*word) ^ u32::from_ne_bytes(mask)).to_ne_bytes();
    }
    for (byte, mask) in rest.iter_mut().zip(mask) {
        *byte ^= mask;
    }
}

fn header(into: &mut BytesMut, opcode: u8, length: usize) {
    into.put_u8(FIN | opcode);
    match (u8::try_from(length), u16::try_from(length)) {
        (Ok(length @ ..=125), _) => into.put_u8(length),
        (_, Ok(length)) => {
            into.put_u8(126);
            into.put_u16(length);
        }
        _ => {
            into.put_u8(127);
            into.put_u64(length as u64);
        }
    }
}

pub(crate) fn put_binary(into: &mut BytesMut, prefix: &[u8], payload: &[u8]) {
    header(into, opcode::BINARY, prefix.len() + payload.len());
    into.put_slice(prefix);
    into.put_slice(payload);
}

pub(crate) fn put_text(into: &mut BytesMut, text: &str) {
    header(into, opcode::TEXT, text.len());
    into.put_slice(text.as_bytes());
}

pub(crate) fn put_pong(into: &mut BytesMut, payload: &[u8]) {
    header(into, opcode::PONG, payload.len());
    into.put_slice(payload);
}

pub(crate) fn put_close(into: &mut BytesMut, reason: CloseReason) {
    // Section 7.4.1.
    let code = match reason {
        CloseReason::Done => 1000,
        CloseReason::ProtocolError => 1002,
    };
    header(into, opcode::CLOSE, 2);
    into.put_u16(code);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn frame(first: u8, payload: &[u8]) -> BytesMut {
        let mask = [0x11, 0x22, 0x33, 0x44];
        let mut bytes = BytesMut::new();
        bytes.put_u8(first);
        match payload.len() {
            length @ ..126 => bytes.put_u8(MASKED | length as u8),
            length => {
                bytes.put_u8(MASKED | 126);
                bytes.put_u16(length as u16);
            }
        }
        bytes.put_slice(&mask);
        let mut masked = payload.to_vec();
        unmask(&mut masked, mask);
        bytes.put_slice(&masked);
        bytes
    }

    /// Messages as (bytes, complete), control events, and whether decoding failed.
    type Decoded = (Vec<(Vec<u8>, bool)>, Vec<Event>, bool);

    fn decode(wire: &[u8], piece: usize) -> Decoded {
        let mut decoder = Decoder::default();
        let mut bytes = BytesMut::new();
        let (mut messages, mut controls) = (Vec::new(), Vec::new());
        for part in wire.chunks(piece) {
            bytes.extend_from_slice(part);
            loop {
                match decoder.decode(&mut bytes) {
                    Ok(None) => break,
                    Ok(Some(Event::Piece { bytes, first, last })) => {
                        if first {
                            messages.push((Vec::new(), false));
                        }
                        let message: &mut (Vec<u8>, bool) = messages.last_mut().unwrap();
                        message.0.extend_from_slice(&bytes);
                        message.1 = last;
                    }
                    Ok(Some(event)) => controls.push(event),
                    Err(_) => return (messages, controls, true),
                }
            }
            assert!(bytes.len() < 14 + CONTROL_LIMIT);
        }
        (messages, controls, false)
    }

    #[test]
    fn fragments_are_joined_with_control_frames_in_between() {
        let mut wire = frame(opcode::BINARY, b"hel");
        wire.extend_from_slice(&frame(FIN | opcode::PING, b"beat"));
        wire.extend_from_slice(&frame(opcode::CONTINUATION, b""));
        wire.extend_from_slice(&frame(FIN | opcode::CONTINUATION, b"lo"));
        wire.extend_from_slice(&frame(FIN | opcode::TEXT, &[b'x'; 300]));
        wire.extend_from_slice(&frame(FIN | opcode::BINARY, b""));
        wire.extend_from_slice(&frame(FIN | opcode::CLOSE, &[3, 232]));
        for piece in [1, 2, 3, 7, 1000] {
            let (messages, controls, failed) = decode(&wire, piece);
            let expected = [(b"hello".to_vec(), true), (vec![b'x'; 300], true), (Vec::new(), true)];
            assert_eq!(messages, expected);
            assert_eq!(controls, [Event::Ping(Bytes::from_static(b"beat")), Event::Close]);
            assert!(!failed);
        }
    }

    #[test]
    fn malformed_frames_are_refused() {
        let table = [
            (frame(FIN | 0x40 | opcode::TEXT, b""), FrameError::Reserved { first: 0xc1 }),
            (frame(FIN | 3, b""), FrameError::Opcode { opcode: 3 }),
            (frame(FIN | 15, b""), FrameError::Opcode { opcode: 15 }),
            (BytesMut::from(&[FIN | opcode::BINARY, 1, 0][..]), FrameError::Unmasked),
            (frame(FIN | opcode::PING, &[0; 126]), FrameError::Control { length: 126 }),
            (frame(opcode::CLOSE, &[]), FrameError::Control { length: 0 }),
            (frame(FIN | opcode::CONTINUATION, b"x"), FrameError::Order),
            (
                BytesMut::from(&[FIN | opcode::BINARY, 255, 128, 0, 0, 0, 0, 0, 0, 0][..]),
                FrameError::Length { length: 1 << 63 },
            ),
        ];
        for (mut wire, error) in table {
            assert_eq!(Decoder::default().decode(&mut wire), Err(error));
        }
        let mut decoder = Decoder::default();
        decoder.decode(&mut frame(opcode::TEXT, b"x")).unwrap();
        assert_eq!(decoder.decode(&mut frame(FIN | opcode::TEXT, b"y")), Err(FrameError::Order));
    }

    #[test]
    fn a_huge_frame_is_passed_on_in_pieces() {
        let mut decoder = Decoder::default();
        let mut bytes = BytesMut::from(&[FIN | opcode::BINARY, 255][..]);
        bytes.put_u64(u64::MAX >> 1);
        bytes.put_slice(&[0; 4]);
        for _ in 0..100 {
            bytes.put_bytes(7, CHUNK);
            let piece = decoder.decode(&mut bytes).unwrap();
            assert!(
                matches!(piece, Some(Event::Piece { bytes, last: false, .. }) if bytes.len() == CHUNK)
            );
            assert!(bytes.is_empty());
        }
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_fail_the_same_in_any_pieces(
            wire in prop::collection::vec(any::<u8>(), 0..400),
            piece in 1usize..60,
        ) {
            let mut wire = wire;
            // Most random bytes would fail for a missing mask.
            if let Some(second) = wire.get_mut(1) {
                *second |= MASKED;
            }
            let (messages, controls, failed) = decode(&wire, piece);
            let whole = wire.len().max(1);
            if whole < 14 + CONTROL_LIMIT {
                prop_assert_eq!((messages, controls, failed), decode(&wire, whole));
            }
        }
    }
}
