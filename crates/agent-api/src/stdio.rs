//! Framing of process streams on vsock port [`crate::STDIO_PORT`].
//!
//! Each connection carries one stream of one process. The host opens it and sends an [`Open`]
//! header; the agent replies with one [`Status`] byte. Then:
//!
//! - `Stdin`: the host sends raw bytes; its half-close closes the process' stdin.
//! - `Stdout`, `Stderr` (with a tty `Stdout` only): the agent sends raw bytes from the header's
//!   `offset` on, and half-closes after the last. The host sends cumulative acknowledgements, each
//!   a little-endian `u64`: all bytes before this offset are stored. The agent keeps unacknowledged
//!   bytes (at most [`WINDOW`]; then it stops reading the pipe and the process blocks in write(2)),
//!   so a restarted host resumes at its stored offset without loss or duplication. A second
//!   connection for the same stream replaces the first.
//!
//! With [`Open::framed`] the agent sends frames: a length (little-endian `u32`, at most
//! [`MAX_FRAME`]) and that number of bytes. Length 0 is the end of the stream. A connection that
//! ends without it is broken, and the stream continues at the same offset on a new one. Agents
//! without framing reply [`Status::BadHeader`]; the host then reconnects without it, and the end of
//! the connection is the end of the stream.

/// Maximum unacknowledged bytes that the agent keeps for a stream.
pub const WINDOW: usize = 256 << 10;
/// Maximum length of an id in a header, bytes; bounds the allocation of the parser.
pub const MAX_ID: usize = 256;
/// Maximum bytes of a frame. A frame is written in one call with its length, for which the guest's
/// kernel allocates one contiguous buffer: 28 KiB and the packet header are an order-3 allocation,
/// which succeeds also with fragmented memory.
pub const MAX_FRAME: usize = (28 << 10) - FRAME_HEADER;
/// Size of a frame's length, bytes.
pub const FRAME_HEADER: usize = 4;
/// Flag in the kind's byte: framing requested.
const FRAMED: u8 = 0x80;
const MAGIC: [u8; 4] = *b"NCS1";
/// Length of the fixed part of a header, bytes.
pub const FIXED: usize = 4 + 1 + 8 + 2 + 2;

/// A stream of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    Stdin = 0,
    Stdout = 1,
    Stderr = 2,
}

/// Header that the host sends first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Open {
    pub kind: Kind,
    /// First byte to send, counted from the start of the process.
    pub offset: u64,
    pub container_id: String,
    /// Empty for the container's init process.
    pub exec_id: String,
    /// Output is sent in frames.
    pub framed: bool,
}

/// The agent's reply to [`Open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    /// The process does not exist or has no such stream.
    NoSuchStream = 1,
    /// The offset is outside of the agent's window.
    BadOffset = 2,
    BadHeader = 3,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed stream header")]
pub struct BadHeader;

impl TryFrom<u8> for Status {
    type Error = BadHeader;
    fn try_from(byte: u8) -> Result<Self, BadHeader> {
        Ok(match byte {
            0 => Self::Ok,
            1 => Self::NoSuchStream,
            2 => Self::BadOffset,
            3 => Self::BadHeader,
            _ => return Err(BadHeader),
        })
    }
}

impl Open {
    /// Encodes magic, kind, offset, both id lengths (little-endian), both ids.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(FIXED + self.container_id.len() + self.exec_id.len());
        out.extend_from_slice(&MAGIC);
        out.push(self.kind as u8 | if self.framed { FRAMED } else { 0 });
        out.extend_from_slice(&self.offset.to_le_bytes());
        out.extend_from_slice(&(self.container_id.len() as u16).to_le_bytes());
        out.extend_from_slice(&(self.exec_id.len() as u16).to_le_bytes());
        out.extend_from_slice(self.container_id.as_bytes());
        out.extend_from_slice(self.exec_id.as_bytes());
        out
    }

    /// Returns the lengths of the two ids that follow the fixed part.
    pub fn id_lengths(fixed: &[u8; FIXED]) -> Result<(usize, usize), BadHeader> {
        let a = usize::from(u16::from_le_bytes([fixed[13], fixed[14]]));
        let b = usize::from(u16::from_le_bytes([fixed[15], fixed[16]]));
        if fixed[..4] != MAGIC || a > MAX_ID || b > MAX_ID { Err(BadHeader) } else { Ok((a, b)) }
    }

    /// Parses the fixed part and the ids.
    pub fn decode(fixed: &[u8; FIXED], ids: &[u8]) -> Result<Self, BadHeader> {
        let (a, b) = Self::id_lengths(fixed)?;
        if ids.len() != a + b {
            return Err(BadHeader);
        }
        let framed = fixed[4] & FRAMED != 0;
        let kind = match fixed[4] & !FRAMED {
            // Not for stdin: its end is the half-close of the host, which is trusted.
            0 if framed => return Err(BadHeader),
            0 => Kind::Stdin,
            1 => Kind::Stdout,
            2 => Kind::Stderr,
            _ => return Err(BadHeader),
        };
        let mut offset = [0; 8];
        offset.copy_from_slice(&fixed[5..13]);
        let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).map_err(|_| BadHeader);
        Ok(Self {
            kind,
            offset: u64::from_le_bytes(offset),
            container_id: text(&ids[..a])?,
            exec_id: text(&ids[a..])?,
            framed,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open() -> Open {
        Open {
            kind: Kind::Stderr,
            offset: 1 << 40,
            container_id: "abc".into(),
            exec_id: "e1".into(),
            framed: false,
        }
    }

    #[test]
    fn a_header_round_trips() {
        let wire = open().encode();
        let fixed: [u8; FIXED] = wire[..FIXED].try_into().unwrap();
        assert_eq!(Open::decode(&fixed, &wire[FIXED..]), Ok(open()));
        assert_eq!(fixed[4], 2, "same encoding as before framing");
        let framed = Open { framed: true, ..open() };
        let fixed: [u8; FIXED] = framed.encode()[..FIXED].try_into().unwrap();
        assert!(fixed[4] > 2, "agents without framing refuse it");
        assert_eq!(Open::decode(&fixed, &wire[FIXED..]), Ok(framed));
    }

    #[test]
    fn an_oversized_id_is_refused_before_it_is_read() {
        let mut wire = open().encode();
        wire[13] = 0xff;
        wire[14] = 0xff;
        let fixed: [u8; FIXED] = wire[..FIXED].try_into().unwrap();
        assert_eq!(Open::id_lengths(&fixed), Err(BadHeader));
    }

    #[test]
    fn a_wrong_magic_and_a_wrong_kind_are_refused() {
        let wire = open().encode();
        let mut fixed: [u8; FIXED] = wire[..FIXED].try_into().unwrap();
        fixed[4] = 9;
        assert_eq!(Open::decode(&fixed, &wire[FIXED..]), Err(BadHeader));
        fixed[0] = b'X';
        assert_eq!(Open::id_lengths(&fixed), Err(BadHeader));
    }
}
