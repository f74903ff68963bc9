//! Server side of WebSocket (RFC 6455), with the two uses in Kubernetes: numbered channels (first
//! byte of a message), or SPDY inside.
//!
//! Own framing, as libraries return whole messages only: a client may send a whole file in one
//! message, which must not be buffered.

mod channels;
mod frame;
mod tunnel;

pub(crate) use channels::{Channel, Codec, Protocol, open};
pub(crate) use tunnel::tunnel;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

/// Section 1.3: GUID that is appended to the client's key.
const KEY_SUFFIX: &str = "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";

/// Value of Sec-WebSocket-Accept.
pub(crate) fn accept_key(key: &[u8]) -> String {
    let mut hash = Sha1::new();
    hash.update(key);
    hash.update(KEY_SUFFIX);
    STANDARD.encode(hash.finalize())
}

#[cfg(test)]
mod tests {
    #[test]
    fn the_accept_key_matches_the_specification() {
        assert_eq!(super::accept_key(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
