//! Minimal rtnetlink client (rtnetlink(7), uapi/linux/rtnetlink.h): one request, one reply. A crate
//! would add much code to the initramfs for five messages.

use std::io::{self, IoSlice};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, recv, sendmsg,
    setsockopt, socket, sockopt,
};

pub(super) const RTM_NEWLINK: u16 = 16;
pub(super) const RTM_NEWADDR: u16 = 20;
pub(super) const RTM_NEWROUTE: u16 = 24;

const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
pub(super) const NLM_F_REPLACE: u16 = 0x100;
pub(super) const NLM_F_CREATE: u16 = 0x400;

const NLMSG_ERROR: u16 = 2;
/// Length of `struct nlmsghdr`.
const HEADER: usize = 16;

pub(super) const IFLA_MTU: u16 = 4;
pub(super) const IFLA_IFNAME: u16 = 3;
pub(super) const IFA_ADDRESS: u16 = 1;
pub(super) const IFA_LOCAL: u16 = 2;
pub(super) const IFA_BROADCAST: u16 = 4;
pub(super) const RTA_DST: u16 = 1;
pub(super) const RTA_OIF: u16 = 4;
pub(super) const RTA_GATEWAY: u16 = 5;

/// A request under construction.
#[derive(Debug)]
pub(super) struct Request {
    bytes: Vec<u8>,
}

impl Request {
    pub(super) fn new(kind: u16, flags: u16) -> Self {
        let mut bytes = vec![0; 4]; // length, set by `finish`
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&(NLM_F_REQUEST | NLM_F_ACK | flags).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]); // sequence and port id; one request at a time
        Self { bytes }
    }

    /// Appends the fixed structure that follows the header.
    pub(super) fn body(mut self, body: &[u8]) -> Self {
        self.bytes.extend_from_slice(body);
        self
    }

    pub(super) fn attribute(mut self, kind: u16, value: &[u8]) -> Self {
        let length = (4 + value.len()) as u16;
        self.bytes.extend_from_slice(&length.to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
        self
    }

    pub(super) fn address(self, kind: u16, address: IpAddr) -> Self {
        match address {
            IpAddr::V4(address) => self.attribute(kind, &address.octets()),
            IpAddr::V6(address) => self.attribute(kind, &address.octets()),
        }
    }

    fn finish(mut self) -> Vec<u8> {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes
    }
}

#[derive(Debug)]
pub(super) struct Netlink(OwnedFd);

impl Netlink {
    pub(super) fn open() -> io::Result<Self> {
        let fd = socket(
            AddressFamily::Netlink,
            SockType::Raw,
            SockFlag::SOCK_CLOEXEC,
            SockProtocol::NetlinkRoute,
        )?;
        // The kernel replies at once; a timeout in case it does not.
        let timeout = nix::sys::time::TimeVal::new(5, 0);
        setsockopt(&fd, sockopt::ReceiveTimeout, &timeout)?;
        Ok(Self(fd))
    }

    /// Sends a request and returns the result of its acknowledgement.
    pub(super) fn call(&self, request: Request) -> io::Result<()> {
        let message = request.finish();
        let kernel = NetlinkAddr::new(0, 0);
        let iov = [IoSlice::new(&message)];
        sendmsg(self.0.as_raw_fd(), &iov, &[], MsgFlags::empty(), Some(&kernel))?;
        let mut answer = [0u8; 4096];
        let n = recv(self.0.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        parse_ack(&answer[..n])
    }
}

fn parse_ack(answer: &[u8]) -> io::Result<()> {
    let short = || io::Error::from(io::ErrorKind::UnexpectedEof);
    let kind = answer.get(4..6).ok_or_else(short)?;
    if kind != NLMSG_ERROR.to_ne_bytes() {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let code = answer.get(HEADER..HEADER + 4).ok_or_else(short)?;
    match i32::from_ne_bytes([code[0], code[1], code[2], code[3]]) {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(-errno)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_padded_to_four_bytes() {
        let bytes =
            Request::new(RTM_NEWLINK, 0).body(&[0; 16]).attribute(IFLA_IFNAME, b"eth0\0").finish();
        assert_eq!(bytes.len(), 16 + 16 + 12);
        assert_eq!(bytes[..4], 44u32.to_ne_bytes());
        assert_eq!(bytes[32..34], 9u16.to_ne_bytes());
    }

    #[test]
    fn a_negative_acknowledgement_is_an_errno() {
        let mut answer = vec![0; 20];
        answer[4..6].copy_from_slice(&NLMSG_ERROR.to_ne_bytes());
        assert!(parse_ack(&answer).is_ok());
        answer[16..20].copy_from_slice(&(-17i32).to_ne_bytes());
        assert_eq!(parse_ack(&answer).unwrap_err().raw_os_error(), Some(17));
        assert!(parse_ack(&answer[..10]).is_err());
    }
}
