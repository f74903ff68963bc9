//! Constants of the network device (virtio 1.2, section 5.1) and of Linux taps (linux/if_tun.h).

/// Section 5.1.3: feature bits.
pub(super) const F_CSUM: u64 = 1 << 0;
pub(super) const F_GUEST_CSUM: u64 = 1 << 1;
pub(super) const F_MTU: u64 = 1 << 3;
pub(super) const F_MAC: u64 = 1 << 5;
pub(super) const F_GUEST_TSO4: u64 = 1 << 7;
pub(super) const F_GUEST_TSO6: u64 = 1 << 8;
pub(super) const F_HOST_TSO4: u64 = 1 << 11;
pub(super) const F_HOST_TSO6: u64 = 1 << 12;
pub(super) const F_MRG_RXBUF: u64 = 1 << 15;
pub(super) const F_STATUS: u64 = 1 << 16;

/// Section 5.1.6: `struct virtio_net_hdr` with num_buffers, which VERSION_1 always has.
pub(super) const HEADER_LEN: usize = 12;
/// Offset of num_buffers in it.
pub(super) const NUM_BUFFERS: usize = 10;
/// Section 5.1.6.3.1: the largest packet with its header.
pub(super) const MAX_PACKET: usize = 65562;
/// Length of an Ethernet header, the shortest frame.
pub(super) const MIN_FRAME: usize = 14;
/// Bit in the status field.
const STATUS_LINK_UP: u16 = 1;
/// Section 5.1.4.1: at least the minimum MTU of IPv4.
pub(super) const MIN_MTU: u16 = 68;

/// Section 5.1.4: `struct virtio_net_config` up to the MTU.
pub(super) fn config(mac: [u8; 6], mtu: u16) -> [u8; 12] {
    let mut bytes = [0; 12];
    bytes[..6].copy_from_slice(&mac);
    bytes[6..8].copy_from_slice(&STATUS_LINK_UP.to_le_bytes());
    bytes[8..10].copy_from_slice(&1u16.to_le_bytes());
    bytes[10..].copy_from_slice(&mtu.to_le_bytes());
    bytes
}

/// TUNSETOFFLOAD flags for the negotiated features: what packets read from the tap may use.
pub(super) fn tap_offloads(features: u64) -> libc::c_uint {
    const TUN_F_CSUM: libc::c_uint = 1;
    const TUN_F_TSO4: libc::c_uint = 2;
    const TUN_F_TSO6: libc::c_uint = 4;
    // Segmentation needs checksum offload (section 5.1.3.1); the tap refuses it otherwise.
    if features & F_GUEST_CSUM == 0 {
        return 0;
    }
    let tso4 = if features & F_GUEST_TSO4 != 0 { TUN_F_TSO4 } else { 0 };
    let tso6 = if features & F_GUEST_TSO6 != 0 { TUN_F_TSO6 } else { 0 };
    TUN_F_CSUM | tso4 | tso6
}
