//! Decompression of layer blobs: plain tar, gzip (RFC 1952) or zstd (RFC 8878). Detected by the
//! first bytes, because media types are often wrong.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;

/// Largest accepted zstd window as a power of two: the maximum of `zstd --ultra` without `--long`.
/// Limited because the decoder allocates it.
const MAX_ZSTD_WINDOW_LOG: u32 = 27;

pub fn decompress<'a>(mut blob: impl BufRead + 'a) -> io::Result<Box<dyn Read + 'a>> {
    let unsupported =
        |name: &str| Err(io::Error::new(io::ErrorKind::Unsupported, format!("{name} layer")));
    match blob.fill_buf()? {
        [0x1f, 0x8b, ..] => Ok(Box::new(MultiGzDecoder::new(blob))),
        // A zstd frame, or a skippable frame as at the start of zstd:chunked.
        [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => {
            let mut decoder = zstd::stream::read::Decoder::with_buffer(blob)?;
            decoder.window_log_max(MAX_ZSTD_WINDOW_LOG)?;
            Ok(Box::new(decoder))
        }
        [b'B', b'Z', b'h', ..] => unsupported("bzip2"),
        [0xfd, b'7', b'z', b'X', b'Z', ..] => unsupported("xz"),
        _ => Ok(Box::new(blob)),
    }
}
