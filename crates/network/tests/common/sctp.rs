#![allow(unsafe_code)] // a raw socket of a protocol that nix does not name
//! SCTP INIT packets (RFC 9260) over raw sockets, so that neither end needs a kernel with SCTP.
//! Port mapping and connection tracking are not affected by that.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use nix::sys::socket::{MsgFlags, SockaddrIn, recv, sendto, setsockopt, sockopt};
use nix::sys::time::TimeVal;

/// Common header and an INIT chunk without parameters.
const LENGTH: usize = 12 + 20;

/// A raw socket in the thread's namespace, which receives all SCTP packets.
pub fn socket(timeout: Duration) -> OwnedFd {
    // SAFETY: takes integers only.
    let fd = unsafe { libc::socket(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_SCTP) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just created; nothing else owns it.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let timeout = TimeVal::new(timeout.as_secs() as i64, 0);
    setsockopt(&socket, sockopt::ReceiveTimeout, &timeout).unwrap();
    socket
}

/// Sends an INIT.
pub fn send_init(socket: &OwnedFd, source_port: u16, to: Ipv4Addr, port: u16) {
    let mut packet = Vec::new();
    packet.extend(source_port.to_be_bytes());
    packet.extend(port.to_be_bytes());
    // The verification tag of an INIT is 0; the checksum is added last.
    packet.extend([0; 8]);
    packet.extend([1, 0, 0, 20]);
    // Initiate tag, window, outbound and inbound streams, initial TSN.
    packet.extend(0x1234_5678_u32.to_be_bytes());
    packet.extend(65_536_u32.to_be_bytes());
    packet.extend([0, 1, 0, 1]);
    packet.extend(1_u32.to_be_bytes());
    let sum = crc32c(&packet).to_le_bytes();
    packet[8..12].copy_from_slice(&sum);
    let to = SockaddrIn::from(SocketAddrV4::new(to, 0));
    sendto(socket.as_raw_fd(), &packet, &to, MsgFlags::empty()).unwrap();
}

/// Source address and destination port of the next INIT with a valid checksum; None after the
/// timeout.
pub fn recv_init(socket: &OwnedFd) -> Option<(Ipv4Addr, u16)> {
    let mut buffer = [0; 2048];
    loop {
        let n = recv(socket.as_raw_fd(), &mut buffer, MsgFlags::empty()).ok()?;
        // IPv4 raw sockets include the IP header, of 20 bytes without options.
        let (ip, mut sctp) = (buffer[..20].to_vec(), buffer[20..n].to_vec());
        if sctp.len() != LENGTH || sctp[12] != 1 {
            continue;
        }
        let sum = sctp[8..12].to_vec();
        sctp[8..12].fill(0);
        assert_eq!(sum, crc32c(&sctp).to_le_bytes(), "the checksum was not updated");
        let from = Ipv4Addr::new(ip[12], ip[13], ip[14], ip[15]);
        return Some((from, u16::from_be_bytes([sctp[2], sctp[3]])));
    }
}

/// CRC-32C (Castagnoli), reflected.
fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |sum, byte| {
        (0..8).fold(sum ^ u32::from(*byte), |sum, _| {
            (sum >> 1) ^ if sum & 1 == 1 { 0x82f6_3b78 } else { 0 }
        })
    })
}
