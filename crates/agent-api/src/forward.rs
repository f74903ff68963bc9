//! Framing of port-forward connections on vsock port [`crate::FORWARD_PORT`].
//!
//! Each connection carries one TCP connection to a port of the pod's loopback interface. The host
//! sends [`Open`]; the agent connects to 127.0.0.1, then to ::1 if that is refused, and replies
//! with one [`Status`] byte. After [`Status::Ok`] both directions are raw bytes with half-close.

const MAGIC: [u8; 4] = *b"NCF1";
/// Length of the header, bytes.
pub const LENGTH: usize = 6;

/// Header that the host sends first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Open {
    pub port: u16,
}

/// The agent's reply to [`Open`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Status {
    Ok = 0,
    /// No program listens on the port.
    Refused = 1,
    BadHeader = 2,
    /// Too many forwarded connections, or another error in the guest.
    Failed = 3,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("malformed header of a forwarded connection")]
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
    /// Magic and port, little-endian.
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
    fn a_header_round_trips_and_garbage_is_refused() {
        let open = Open { port: 8080 };
        assert_eq!(Open::decode(open.encode()), Ok(open));
        assert_eq!(Open::decode(Open { port: 0 }.encode()), Err(BadHeader));
        assert_eq!(Open::decode(*b"NCS1\x01\x01"), Err(BadHeader));
        assert_eq!(Status::try_from(9), Err(BadHeader));
    }
}
