//! Framing of forwarded connections on vsock port [`crate::FORWARD_PORT`].
//!
//! One connection carries one TCP connection to a port of the pod's loopback interface. The host
//! sends [`Open`]; the agent connects to 127.0.0.1, and to ::1 where that is refused, and answers
//! one [`Status`] byte. After [`Status::Ok`] both directions are raw bytes, each with its own
//! half-close.

const MAGIC: [u8; 4] = *b"NCF1";
/// Length of a header, bytes.
pub const LENGTH: usize = 6;

/// First bytes of a connection, from the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    pub port: u16,
}

/// The agent's answer to [`Open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    /// Nobody listens at the port.
    Refused = 1,
    BadHeader = 2,
    /// Too many connections are forwarded, or the guest is out of something.
    Failed = 3,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("header of a forwarded connection is malformed")]
pub struct BadHeader;

impl TryFrom<u8> for Status {
    type Error = BadHeader;
    fn try_from(byte: u8) -> Result<Self, BadHeader> {
        Ok(match byte {
            0 => Self::Ok,
            1 => Self::Refused,
            2 => Self::BadHeader,
            3 => Self::Failed,
            _ => return Err(BadHeader),
        })
    }
}

impl Open {
    /// Magic and port (little-endian).
    pub fn encode(self) -> [u8; LENGTH] {
        let [low, high] = self.port.to_le_bytes();
        let [a, b, c, d] = MAGIC;
        [a, b, c, d, low, high]
    }

    pub fn decode(bytes: [u8; LENGTH]) -> Result<Self, BadHeader> {
        let [a, b, c, d, low, high] = bytes;
        let port = u16::from_le_bytes([low, high]);
        if [a, b, c, d] == MAGIC && port != 0 { Ok(Self { port }) } else { Err(BadHeader) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_comes_back_as_it_was_and_rubbish_does_not() {
        let open = Open { port: 8080 };
        assert_eq!(Open::decode(open.encode()), Ok(open));
        assert_eq!(Open::decode(Open { port: 0 }.encode()), Err(BadHeader));
        assert_eq!(Open::decode(*b"NCS1\x01\x01"), Err(BadHeader));
        assert_eq!(Status::try_from(9), Err(BadHeader));
    }
}
