use proptest::prelude::*;

use super::*;

fn decoder() -> Decoder {
    Decoder::new(1 << 10, 1 << 12)
}

fn control_frame(version: u16, kind: u16, flags: u8, payload: &[u8]) -> BytesMut {
    let mut bytes = BytesMut::new();
    bytes.put_u16(0x8000 | version);
    bytes.put_u16(kind);
    bytes.put_u32(u32::from(flags) << 24 | payload.len() as u32);
    bytes.put_slice(payload);
    bytes
}

fn open_frame(deflater: &mut Deflater, id: u32, headers: &[(&str, &str)]) -> BytesMut {
    let mut payload = BytesMut::new();
    payload.put_u32(id);
    payload.put_bytes(0, 6);
    payload.put_slice(&deflater.deflate(headers));
    control_frame(3, kind::SYN_STREAM, 0, &payload)
}

#[test]
fn malformed_frames_are_refused() {
    use FrameError::{Headers, Length, Settings, TooLong, Version, ZeroData, ZeroStream};
    use kind::*;
    let table: Vec<(BytesMut, FrameError)> = vec![
        (control_frame(2, PING, 0, &[0; 4]), Version { version: 2 }),
        (
            control_frame(3, SYN_STREAM, 0, &[0; 1025]),
            TooLong { kind: SYN_STREAM, length: 1025, limit: 1024 },
        ),
        (control_frame(3, 77, 0, &[0; 1025]), TooLong { kind: 77, length: 1025, limit: 1024 }),
        (control_frame(3, SYN_STREAM, 0, &[0; 9]), Length { kind: SYN_STREAM, length: 9 }),
        (control_frame(3, SYN_STREAM, 0, &[0; 10]), Headers(HeaderError::Short)),
        (
            control_frame(3, SYN_STREAM, 0, &[1; 30]),
            Headers(HeaderError::Zlib { at: 2, length: 20 }),
        ),
        (open_frame(&mut Deflater::new(), 0, &[]), ZeroStream { kind: SYN_STREAM }),
        (control_frame(3, SYN_REPLY, 0, &[0; 3]), Length { kind: SYN_REPLY, length: 3 }),
        (control_frame(3, HEADERS, 0, &[0; 3]), Length { kind: HEADERS, length: 3 }),
        (control_frame(3, RST_STREAM, 0, &[1; 7]), Length { kind: RST_STREAM, length: 7 }),
        (control_frame(3, RST_STREAM, 0, &[0; 8]), ZeroStream { kind: RST_STREAM }),
        (control_frame(3, PING, 0, &[0; 5]), Length { kind: PING, length: 5 }),
        (control_frame(3, SETTINGS, 0, &[0; 3]), Length { kind: SETTINGS, length: 3 }),
        (control_frame(3, SETTINGS, 0, &[255; 12]), Settings { entries: u32::MAX, length: 12 }),
        (control_frame(3, GOAWAY, 0, &[0; 9]), Length { kind: GOAWAY, length: 9 }),
        (control_frame(3, WINDOW_UPDATE, 0, &[0; 4]), Length { kind: WINDOW_UPDATE, length: 4 }),
        (BytesMut::from(&[0u8; 8][..]), ZeroData),
    ];
    for (mut bytes, error) in table {
        let shown = format!("{bytes:?}");
        match (decoder().decode(&mut bytes), &error) {
            (Err(Headers(HeaderError::Zlib { .. })), Headers(HeaderError::Zlib { .. })) => {}
            (result, _) => assert_eq!(result, Err(error), "{shown}"),
        }
    }
}

#[test]
fn frames_without_effect_are_skipped() {
    for (kind, payload) in [
        (kind::SETTINGS, &[0, 0, 0, 1, 0, 0, 0, 7, 0, 1, 0, 0][..]),
        (kind::WINDOW_UPDATE, &[0; 8]),
        (kind::GOAWAY, &[0; 8]),
        (10, b"credential"),
        (0xffff, b""),
    ] {
        let mut bytes = control_frame(3, kind, 0, payload);
        assert_eq!(decoder().decode(&mut bytes), Ok(Some(Frame::Other)));
        assert!(bytes.is_empty());
    }
}

#[test]
fn a_long_data_frame_is_passed_on_in_pieces() {
    let mut decoder = decoder();
    let mut bytes = BytesMut::new();
    bytes.put_u32(5);
    bytes.put_u32(1 << 24 | 0xff_ffff);
    let mut received = 0;
    while received < 0xff_ffff {
        bytes.put_bytes(7, 1000.min(0xff_ffff - received));
        let Frame::Data { id: 5, bytes: piece, end } = decoder.decode(&mut bytes).unwrap().unwrap()
        else {
            panic!("data")
        };
        received += piece.len();
        assert_eq!(end, received == 0xff_ffff);
        assert!(bytes.is_empty());
    }
    assert_eq!(decoder.decode(&mut bytes), Ok(None));
}

#[test]
fn encoded_frames_can_be_decoded() {
    let mut encoder = FrameEncoder::new();
    let mut bytes = BytesMut::new();
    for out in [
        Out::Reply { id: 3 },
        Out::Data { id: 3, bytes: Bytes::from_static(b"hello"), end: false },
        Out::Data { id: 3, bytes: Bytes::new(), end: true },
        Out::Refuse { id: 5, status: reset::REFUSED_STREAM },
        Out::Pong(Bytes::from_static(&[0, 0, 0, 9])),
        Out::Close(CloseReason::Done),
    ] {
        encoder.encode(out, &mut bytes);
    }
    let mut decoder = decoder();
    let mut frames = Vec::new();
    while let Some(frame) = decoder.decode(&mut bytes).unwrap() {
        frames.push(frame);
    }
    assert_eq!(
        frames,
        [
            Frame::Other,
            Frame::Data { id: 3, bytes: Bytes::from_static(b"hello"), end: false },
            Frame::Data { id: 3, bytes: Bytes::new(), end: true },
            Frame::Reset { id: 5 },
            Frame::Ping { id: 9 },
            Frame::Other,
        ]
    );
    assert!(bytes.is_empty());
}

/// Feeds a decoder in pieces, like a socket, and joins the pieces of data frames.
fn decode_in_pieces(wire: &[u8], piece: usize) -> (Vec<(u32, Vec<u8>, bool)>, bool) {
    let mut decoder = decoder();
    let mut bytes = BytesMut::new();
    let mut data: Vec<(u32, Vec<u8>, bool)> = Vec::new();
    for part in wire.chunks(piece) {
        bytes.extend_from_slice(part);
        loop {
            match decoder.decode(&mut bytes) {
                Ok(None) => break,
                Ok(Some(Frame::Data { id, bytes, end })) => match data.last_mut() {
                    Some((last, joined, over)) if *last == id && !*over => {
                        joined.extend_from_slice(&bytes);
                        *over = end;
                    }
                    _ => data.push((id, bytes.to_vec(), end)),
                },
                Ok(Some(_)) => {}
                Err(_) => return (data, true),
            }
            assert!(bytes.len() <= wire.len());
        }
        // Only an incomplete control frame is buffered.
        assert!(bytes.len() <= HEADER_LENGTH + (1 << 10), "{}", bytes.len());
    }
    (data, false)
}

proptest! {
    #[test]
    fn any_bytes_decode_or_fail(
        wire in prop::collection::vec(any::<u8>(), 0..600),
        piece in 1usize..100,
    ) {
        let _ = decode_in_pieces(&wire, piece);
    }

    #[test]
    fn broken_frames_decode_or_fail_the_same_in_any_pieces(
        frames in prop::collection::vec((0u16..12, any::<u8>(), prop::collection::vec(any::<u8>(), 0..40)), 1..8),
        piece in 1usize..50,
    ) {
        let mut wire = BytesMut::new();
        let mut deflater = Deflater::new();
        for (kind, flags, payload) in &frames {
            match kind {
                0 => {
                    wire.put_u32(1 + u32::from(*flags >> 4));
                    wire.put_u32(u32::from(flags & 1) << 24 | payload.len() as u32);
                    wire.put_slice(payload);
                }
                11 => wire.extend_from_slice(&open_frame(&mut deflater, 1, &[("a", "b")])),
                _ => wire.extend_from_slice(&control_frame(3, *kind, *flags, payload)),
            }
        }
        prop_assert_eq!(decode_in_pieces(&wire, piece), decode_in_pieces(&wire, wire.len()));
    }
}
