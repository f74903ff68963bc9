//! The handshake of a host client, as in Firecracker: `CONNECT <port>\n`, answered with
//! `OK <host port>\n` once the guest has accepted the connection.

/// Longest line with its newline, bytes; enough for any decimal port.
/// Attack: a client never ends its line, to grow the buffer.
pub(super) const MAX_LINE: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("client's first line is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("client's first line is not CONNECT <port>: {line:?}")]
    NotConnect { line: String },
}

/// The bytes of the line received so far.
#[derive(Debug, Default)]
pub(super) struct ConnectLine {
    bytes: Vec<u8>,
}

impl ConnectLine {
    /// Bytes until [`MAX_LINE`].
    pub(super) fn remaining(&self) -> usize {
        MAX_LINE - self.bytes.len()
    }

    /// How many of the next bytes of the stream belong to the line.
    pub(super) fn take(&self, next: &[u8]) -> usize {
        next.iter().position(|b| *b == b'\n').map_or(next.len(), |at| at + 1)
    }

    /// Appends bytes of the line; returns the guest port once the line is complete.
    pub(super) fn push(&mut self, bytes: &[u8]) -> Result<Option<u32>, HandshakeError> {
        self.bytes.extend_from_slice(bytes);
        if self.bytes.len() > MAX_LINE {
            return Err(HandshakeError::TooLong);
        }
        let Some(line) = self.bytes.strip_suffix(b"\n") else {
            let full = self.bytes.len() == MAX_LINE;
            return if full { Err(HandshakeError::TooLong) } else { Ok(None) };
        };
        let port = line
            .strip_prefix(b"CONNECT ")
            .and_then(|port| std::str::from_utf8(port).ok())
            .filter(|port| port.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|port| port.parse().ok());
        port.map(Some).ok_or_else(|| HandshakeError::NotConnect {
            line: String::from_utf8_lossy(line).into_owned(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_may_arrive_in_parts_and_the_bytes_after_it_are_not_consumed() {
        let mut line = ConnectLine::default();
        assert_eq!(line.push(b"CONN"), Ok(None));
        let next = b"ECT 1024\nhello";
        let take = line.take(next);
        assert_eq!(line.push(&next[..take]), Ok(Some(1024)));
        assert_eq!(&next[take..], b"hello");
    }

    #[test]
    fn a_line_without_a_valid_port_is_refused() {
        for bad in
            ["CONNECT \n", "CONNECT -1\n", "CONNECT +1\n", "CONNECT 4294967296\n", "\n", "GET /\n"]
        {
            let refused = ConnectLine::default().push(bad.as_bytes());
            assert!(matches!(refused, Err(HandshakeError::NotConnect { .. })), "{bad:?}");
        }
        assert_eq!(ConnectLine::default().push(b"CONNECT 4294967295\n"), Ok(Some(u32::MAX)));
    }

    #[test]
    fn a_line_longer_than_the_limit_is_refused() {
        let mut line = ConnectLine::default();
        assert_eq!(line.push(&[b'C'; MAX_LINE - 1]), Ok(None));
        assert_eq!(line.remaining(), 1);
        assert_eq!(line.push(b"C"), Err(HandshakeError::TooLong));
    }
}
