//! Constants of the socket device (virtio 1.2, section 5.10).

/// Section 5.10.4: the host's CID.
pub(super) const HOST_CID: u64 = 2;
/// Bytes of `struct virtio_vsock_hdr`.
pub(super) const HEADER_LEN: usize = 44;
/// Section 5.10.6.1: the only socket type implemented here.
pub(super) const TYPE_STREAM: u16 = 1;

/// Section 5.10.6: operations.
pub(super) mod op {
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESPONSE: u16 = 2;
    pub(crate) const RST: u16 = 3;
    pub(crate) const SHUTDOWN: u16 = 4;
    pub(crate) const RW: u16 = 5;
    pub(crate) const CREDIT_UPDATE: u16 = 6;
    pub(crate) const CREDIT_REQUEST: u16 = 7;
}

/// Section 5.10.6.6.1: flags of SHUTDOWN: what the sender of the packet will no longer do.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
pub(super) const SHUTDOWN_SEND: u32 = 2;
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    pub(super) len: u32,
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    pub(super) buf_alloc: u32,
    pub(super) fwd_cnt: u32,
}

impl Header {
    pub(super) fn bytes(&self) -> [u8; HEADER_LEN] {
        let Self { src_cid, dst_cid, src_port, dst_port, len, kind, op, flags, buf_alloc, fwd_cnt } =
            *self;
        let mut bytes = [0; HEADER_LEN];
        bytes[..8].copy_from_slice(&src_cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&dst_cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&src_port.to_le_bytes());
        bytes[20..24].copy_from_slice(&dst_port.to_le_bytes());
        bytes[24..28].copy_from_slice(&len.to_le_bytes());
        bytes[28..30].copy_from_slice(&kind.to_le_bytes());
        bytes[30..32].copy_from_slice(&op.to_le_bytes());
        bytes[32..36].copy_from_slice(&flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&buf_alloc.to_le_bytes());
        bytes[40..].copy_from_slice(&fwd_cnt.to_le_bytes());
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8; HEADER_LEN]) -> Self {
        let half = |at: usize| u16::from_le_bytes([0, 1].map(|n| bytes[at + n]));
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| bytes[at + n]));
        let long = |at: usize| u64::from(word(at)) | u64::from(word(at + 4)) << 32;
        Self {
            src_cid: long(0),
            dst_cid: long(8),
            src_port: word(16),
            dst_port: word(20),
            len: word(24),
            kind: half(28),
            op: half(30),
            flags: word(32),
            buf_alloc: word(36),
            fwd_cnt: word(40),
        }
    }
}

const _: () = assert!(HEADER_LEN == 2 * 8 + 3 * 4 + 2 * 2 + 3 * 4);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_is_encoded_in_the_order_of_the_specification_and_decoded_again() {
        let header = Header {
            src_cid: 1,
            dst_cid: 2,
            src_port: 3,
            dst_port: 4,
            len: 5,
            kind: 6,
            op: 7,
            flags: 8,
            buf_alloc: 9,
            fwd_cnt: 10,
        };
        let bytes = header.bytes();
        assert_eq!(Header::from_bytes(&bytes), header);
        let firsts = [0, 8, 16, 20, 24, 28, 30, 32, 36, 40].map(|at| bytes[at]);
        assert_eq!(firsts, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]);
    }
}
