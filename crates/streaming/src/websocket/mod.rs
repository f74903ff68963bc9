//! WebSocket (RFC 6455), the server's side, and the two things that Kubernetes' clients do with
//! it: numbered channels (the first byte of a message), or a SPDY connection inside.
//!
//! Framing is ours because messages must not be gathered: a client may put a whole file into one,
//! and libraries hand on whole messages only.

mod channels;
mod frame;
mod tunnel;

pub(crate) use channels::{Channel, Codec, Protocol, open};
pub(crate) use tunnel::tunnel;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use sha1::{Digest, Sha1};

/// Section 1.3: what a server appends to the client's key.
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
    fn the_key_of_the_specification_is_accepted_with_its_answer() {
        assert_eq!(super::accept_key(b"dGhlIHNhbXBsZSBub25jZQ=="), "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=");
    }
}
