//! What a host program says before it is joined to the guest: `CONNECT <port>\n`, answered with
//! `OK <host port>\n` once the guest has accepted.

/// Longest line, with its newline: any port in decimal, and leading zeroes nobody needs.
/// Attack: a client that never ends its line, to grow the buffer.
pub(super) const MAX_LINE: usize = 32;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum HandshakeError {
    #[error("client's first line is longer than {MAX_LINE} bytes")]
    TooLong,
    #[error("client's first line is not CONNECT <port>: {line:?}")]
    NotConnect { line: String },
}

/// The line as far as it has come.
#[derive(Debug, Default)]
pub(super) struct Line {
    bytes: Vec<u8>,
}

impl Line {
    /// Bytes that may still come.
    pub(super) fn room(&self) -> usize {
        MAX_LINE - self.bytes.len()
    }

    /// How many of the bytes that stand next in the stream belong to the line.
    pub(super) fn take(&self, next: &[u8]) -> usize {
        next.iter().position(|b| *b == b'\n').map_or(next.len(), |at| at + 1)
    }

    /// Takes bytes of the line; the guest port once it is complete.
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
    fn a_line_may_come_in_pieces_and_what_follows_it_is_not_touched() {
        let mut line = Line::default();
        assert_eq!(line.push(b"CONN"), Ok(None));
        let next = b"ECT 1024\nhello";
        let take = line.take(next);
        assert_eq!(line.push(&next[..take]), Ok(Some(1024)));
        assert_eq!(&next[take..], b"hello");
    }

    #[test]
    fn anything_but_a_port_is_refused() {
        for bad in
            ["CONNECT \n", "CONNECT -1\n", "CONNECT +1\n", "CONNECT 4294967296\n", "\n", "GET /\n"]
        {
            let refused = Line::default().push(bad.as_bytes());
            assert!(matches!(refused, Err(HandshakeError::NotConnect { .. })), "{bad:?}");
        }
        assert_eq!(Line::default().push(b"CONNECT 4294967295\n"), Ok(Some(u32::MAX)));
    }

    #[test]
    fn an_endless_line_is_cut_off() {
        let mut line = Line::default();
        assert_eq!(line.push(&[b'C'; MAX_LINE - 1]), Ok(None));
        assert_eq!(line.room(), 1);
        assert_eq!(line.push(b"C"), Err(HandshakeError::TooLong));
    }
}
