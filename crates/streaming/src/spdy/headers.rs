//! Name/value header blocks: compressed with one zlib stream for each direction of a connection, so
//! every block must be inflated, also of refused streams (section 2.6.10).

use bytes::{Buf, BufMut, BytesMut};
use flate2::{Compress, Compression, Decompress, FlushCompress, FlushDecompress, Status};

use super::dictionary::DICTIONARY;

/// Maximum pairs in a block; Kubernetes clients send three.
const PAIRS_LIMIT: u32 = 64;

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HeaderError {
    #[error("cannot inflate the header block at byte {at} of {length}")]
    Zlib { at: usize, length: usize },
    #[error("header block inflates to more than {limit} bytes")]
    TooLong { limit: usize },
    #[error("header block has {pairs} pairs, more than {PAIRS_LIMIT}")]
    TooMany { pairs: u32 },
    #[error("header block ends inside a pair")]
    Short,
}

/// Headers with names in lower case.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Headers(Vec<(String, String)>);

impl Headers {
    pub(crate) fn get(&self, name: &str) -> Option<&str> {
        self.0.iter().find(|(n, _)| n == name).map(|(_, value)| value.as_str())
    }

    fn parse(mut block: &[u8]) -> Result<Headers, HeaderError> {
        let pairs = block.try_get_u32().map_err(|_| HeaderError::Short)?;
        if pairs > PAIRS_LIMIT {
            return Err(HeaderError::TooMany { pairs });
        }
        let mut headers = Vec::new();
        for _ in 0..pairs {
            let name = string(&mut block)?.to_ascii_lowercase();
            headers.push((name, string(&mut block)?));
        }
        Ok(Headers(headers))
    }
}

fn string(block: &mut &[u8]) -> Result<String, HeaderError> {
    let length = block.try_get_u32().map_err(|_| HeaderError::Short)?;
    let length = usize::try_from(length).map_err(|_| HeaderError::Short)?;
    let (string, rest) = block.split_at_checked(length).ok_or(HeaderError::Short)?;
    *block = rest;
    Ok(String::from_utf8_lossy(string).into_owned())
}

pub(crate) struct Inflater {
    zlib: Decompress,
    limit: usize,
}

impl Inflater {
    pub(crate) fn new(limit: usize) -> Self {
        Inflater { zlib: Decompress::new(true), limit }
    }

    pub(crate) fn headers(&mut self, compressed: &[u8]) -> Result<Headers, HeaderError> {
        Headers::parse(&self.inflate(compressed)?)
    }

    fn inflate(&mut self, compressed: &[u8]) -> Result<Vec<u8>, HeaderError> {
        let broken = |at| HeaderError::Zlib { at, length: compressed.len() };
        let mut block = Vec::new();
        let mut at = 0;
        loop {
            if block.len() > self.limit {
                return Err(HeaderError::TooLong { limit: self.limit });
            }
            if block.len() == block.capacity() {
                block.reserve(512);
            }
            let (in_before, out_before) = (self.zlib.total_in(), block.len());
            let inflated =
                self.zlib.decompress_vec(&compressed[at..], &mut block, FlushDecompress::Sync);
            let used = usize::try_from(self.zlib.total_in() - in_before).unwrap_or(usize::MAX);
            at = at.saturating_add(used).min(compressed.len());
            match inflated {
                Ok(Status::StreamEnd) => return Err(broken(at)),
                Ok(Status::Ok | Status::BufError) => {
                    let full = block.len() == block.capacity();
                    let moved = used > 0 || block.len() > out_before;
                    match (at == compressed.len(), full) {
                        (true, false) => return Ok(block),
                        (false, false) if !moved => return Err(broken(at)),
                        _ => {}
                    }
                }
                Err(error) if error.needs_dictionary().is_some() => {
                    self.zlib.set_dictionary(&DICTIONARY).map_err(|_| broken(at))?;
                }
                Err(_) => return Err(broken(at)),
            }
        }
    }
}

pub(crate) struct Deflater {
    zlib: Compress,
}

impl Deflater {
    pub(crate) fn new() -> Self {
        let mut zlib = Compress::new(Compression::fast(), true);
        zlib.set_dictionary(&DICTIONARY).expect("a new zlib stream accepts a dictionary");
        Deflater { zlib }
    }

    pub(crate) fn deflate(&mut self, pairs: &[(&str, &str)]) -> Vec<u8> {
        let length = |text: &str| u32::try_from(text.len()).expect("own headers are short");
        let mut block = BytesMut::new();
        block.put_u32(u32::try_from(pairs.len()).expect("own headers are few"));
        for text in pairs.iter().flat_map(|(name, value)| [name, value]) {
            block.put_u32(length(text));
            block.put_slice(text.as_bytes());
        }
        let mut compressed = Vec::with_capacity(block.len() + 64);
        let mut at = 0;
        loop {
            let before = self.zlib.total_in();
            self.zlib
                .compress_vec(&block[at..], &mut compressed, FlushCompress::Sync)
                .expect("compression into memory does not fail");
            at += usize::try_from(self.zlib.total_in() - before).expect("within the block");
            if at == block.len() && compressed.len() < compressed.capacity() {
                return compressed;
            }
            compressed.reserve(256);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_blocks_use_one_zlib_stream() {
        let (mut deflater, mut inflater) = (Deflater::new(), Inflater::new(1 << 16));
        for _ in 0..3 {
            let block = deflater.deflate(&[("streamType", "error"), ("port", "80")]);
            let headers = inflater.headers(&block).unwrap();
            assert_eq!(headers.get("streamtype"), Some("error"));
            assert_eq!(headers.get("port"), Some("80"));
            assert_eq!(headers.get("requestid"), None);
        }
        assert_eq!(inflater.headers(&deflater.deflate(&[])).unwrap(), Headers::default());
    }

    #[test]
    fn a_block_that_inflates_beyond_the_limit_is_refused() {
        let value = "a".repeat(1 << 20);
        let block = Deflater::new().deflate(&[("x", &value)]);
        assert!(block.len() < 16 << 10, "the bomb is small: {}", block.len());
        let refused = Inflater::new(1 << 16).headers(&block);
        assert_eq!(refused, Err(HeaderError::TooLong { limit: 1 << 16 }));
    }

    #[test]
    fn malformed_blocks_are_refused() {
        let table: [(&[u8], HeaderError); 6] = [
            (&[], HeaderError::Short),
            (&[0, 0, 0], HeaderError::Short),
            (&[0, 0, 0, 1], HeaderError::Short),
            (&[0, 0, 0, 1, 0, 0, 0, 9, b'x'], HeaderError::Short),
            (&[0, 0, 0, 1, 0, 0, 0, 1, b'x', 255, 255, 255, 255], HeaderError::Short),
            (&[255, 255, 255, 255], HeaderError::TooMany { pairs: u32::MAX }),
        ];
        for (block, error) in table {
            assert_eq!(Headers::parse(block), Err(error), "{block:?}");
        }
        for garbage in [&[0u8; 20][..], &[0x78, 0xbb, 1, 2, 3, 4, 5], b"hello, world"] {
            assert!(matches!(
                Inflater::new(1 << 16).headers(garbage),
                Err(HeaderError::Zlib { .. })
            ));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_inflate_or_fail_within_the_limit(
            blocks in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..200), 1..4),
            flip in any::<prop::sample::Index>(),
        ) {
            let mut inflater = Inflater::new(1 << 12);
            for block in &blocks {
                let _ = inflater.headers(block);
            }
            let mut block = Deflater::new().deflate(&[("streamtype", "stdin"), ("a", "bbbbbb")]);
            let at = flip.index(block.len());
            block[at] ^= 0x55;
            let _ = Inflater::new(1 << 12).headers(&block);
        }

        #[test]
        fn any_plain_block_parses_or_fails(block in prop::collection::vec(any::<u8>(), 0..300)) {
            let _ = Headers::parse(&block);
        }
    }
}
