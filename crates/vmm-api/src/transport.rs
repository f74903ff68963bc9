//! Packets of the control socket: JSON on `SOCK_SEQPACKET`, descriptors as `SCM_RIGHTS`.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest packet, bytes. A longer one is refused, so neither side can make the other hold more.
pub const MAX_PACKET: usize = 64 << 10;
/// Most descriptors in a packet.
pub const MAX_FDS: usize = 32;

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("control socket")]
    Socket(#[from] nix::Error),
    #[error("peer closed the control socket")]
    Closed,
    #[error("packet of {len} bytes is over the limit of {MAX_PACKET}")]
    TooLong { len: usize },
    #[error("packet was truncated")]
    Truncated,
    #[error("packet is not the expected JSON")]
    Json(#[from] serde_json::Error),
}

/// Sends one message with the descriptors attached.
pub fn send<T: Serialize>(
    socket: BorrowedFd<'_>,
    message: &T,
    fds: &[BorrowedFd<'_>],
) -> Result<(), TransportError> {
    let bytes = serde_json::to_vec(message)?;
    if bytes.len() > MAX_PACKET {
        return Err(TransportError::TooLong { len: bytes.len() });
    }
    let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
    let rights = [ControlMessage::ScmRights(&raw)];
    let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
    sendmsg::<()>(
        socket.as_raw_fd(),
        &[IoSlice::new(&bytes)],
        control,
        MsgFlags::MSG_NOSIGNAL,
        None,
    )?;
    Ok(())
}

/// Receives one message and the descriptors that came with it.
///
/// A packet that is truncated or not JSON of type `T` consumes (and closes) its descriptors.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<(T, Vec<OwnedFd>), TransportError> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = nix::cmsg_space!([RawFd; MAX_FDS]);
    let (len, flags, fds) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        let mut fds = Vec::new();
        for part in message.cmsgs()? {
            if let ControlMessageOwned::ScmRights(raw) = part {
                fds.extend(raw.into_iter().map(own));
            }
        }
        (message.bytes, message.flags, fds)
    };
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(TransportError::Truncated);
    }
    if len == 0 {
        return Err(TransportError::Closed);
    }
    Ok((serde_json::from_slice(&bytes[..len])?, fds))
}

#[allow(unsafe_code)] // descriptors received by recvmsg are plain numbers in nix
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg has just installed this descriptor in our table for this message; nothing
    // else knows its number, and each number is wrapped once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;

    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};

    use super::*;
    use crate::{Reply, Request};

    fn pair() -> (OwnedFd, OwnedFd) {
        socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap()
    }

    #[test]
    fn a_request_arrives_with_its_descriptor() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        send(a.as_fd(), &Request::Status, &[file.as_fd()]).unwrap();
        let (request, fds) = receive::<Request>(b.as_fd()).unwrap();
        assert_eq!(request, Request::Status);
        assert_eq!(fds.len(), 1);
    }

    #[test]
    fn a_closed_peer_and_rubbish_are_told_apart() {
        let (a, b) = pair();
        nix::unistd::write(&a, b"{\"request\":\"fly\"}").unwrap();
        assert!(matches!(receive::<Request>(b.as_fd()), Err(TransportError::Json(_))));
        drop(a);
        assert!(matches!(receive::<Reply>(b.as_fd()), Err(TransportError::Closed)));
    }
}
