//! Packets of the control socket: JSON on `SOCK_SEQPACKET`, file descriptors as `SCM_RIGHTS`.

use std::io::{IoSlice, IoSliceMut};
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use nix::libc;
use nix::sys::socket::{ControlMessage, MsgFlags, recvmsg, sendmsg};
use serde::Serialize;
use serde::de::DeserializeOwned;

/// Largest packet, bytes. Longer ones are refused, which limits the memory per connection.
pub const MAX_PACKET: usize = 64 << 10;
/// Most file descriptors in a packet.
pub const MAX_FDS: usize = 32;
/// Most file descriptors that Linux passes in a packet (`SCM_MAX_FD`). The buffer has space for all
/// of them, so that more than [`MAX_FDS`] are noticed and closed.
const SCM_MAX_FD: usize = 253;

#[derive(Debug, thiserror::Error)]
pub enum TransportError {
    #[error("control socket")]
    Socket(#[from] nix::Error),
    #[error("peer closed the control socket")]
    Closed,
    #[error("packet of {len} bytes is over the limit of {MAX_PACKET}")]
    TooLong { len: usize },
    #[error("packet has {got} file descriptors, over the limit of {MAX_FDS}")]
    TooManyFds { got: usize },
    #[error("packet was truncated")]
    Truncated,
    #[error("packet is not the expected JSON")]
    Json(#[from] serde_json::Error),
}

/// Sends one message with file descriptors attached. Fails if it exceeds [`MAX_PACKET`] or the
/// socket does.
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

/// Receives one message and its file descriptors.
///
/// The file descriptors of a packet that is truncated, has too many of them or is not JSON of type
/// `T` are closed.
pub fn receive<T: DeserializeOwned>(
    socket: BorrowedFd<'_>,
) -> Result<(T, Vec<OwnedFd>), TransportError> {
    let mut bytes = vec![0; MAX_PACKET];
    let mut space = nix::cmsg_space!([RawFd; SCM_MAX_FD]);
    let (len, flags) = {
        let mut parts = [IoSliceMut::new(&mut bytes)];
        let message = recvmsg::<()>(
            socket.as_raw_fd(),
            &mut parts,
            Some(&mut space),
            MsgFlags::MSG_CMSG_CLOEXEC,
        )?;
        (message.bytes, message.flags)
    };
    // First, so that every error below closes them.
    let fds = rights(&space);
    if flags.intersects(MsgFlags::MSG_TRUNC | MsgFlags::MSG_CTRUNC) {
        return Err(TransportError::Truncated);
    }
    if fds.len() > MAX_FDS {
        return Err(TransportError::TooManyFds { got: fds.len() });
    }
    if len == 0 {
        return Err(TransportError::Closed);
    }
    Ok((serde_json::from_slice(&bytes[..len])?, fds))
}

/// Takes ownership of the file descriptors in the control data of recvmsg, whose buffer was zeroed.
///
/// nix returns none of them if the kernel could not install all (EMFILE): those that it did install
/// would leak.
fn rights(mut control: &[u8]) -> Vec<OwnedFd> {
    /// `struct cmsghdr` (cmsg(3)): length including the header, level, type.
    const HEADER: usize = 16;
    let mut fds = Vec::new();
    while control.len() >= HEADER {
        let word = |at: usize| i32::from_ne_bytes([0, 1, 2, 3].map(|n| control[at + n]));
        let kind = (word(8), word(12));
        let len = usize::from_ne_bytes([0, 1, 2, 3, 4, 5, 6, 7].map(|n: usize| control[n]));
        // Length 0: the unused rest of the buffer.
        let Some(data) = control.get(HEADER..len) else { break };
        if kind == (libc::SOL_SOCKET, libc::SCM_RIGHTS) {
            let (numbers, _) = data.as_chunks::<4>();
            fds.extend(numbers.iter().map(|number| own(RawFd::from_ne_bytes(*number))));
        }
        control = control.get(len.next_multiple_of(8)..).unwrap_or_default();
    }
    fds
}

#[allow(unsafe_code)] // descriptors received by recvmsg are plain numbers
fn own(fd: RawFd) -> OwnedFd {
    // SAFETY: recvmsg has just installed this file descriptor for this message; nothing else owns
    // it, and each number is wrapped once.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

#[cfg(test)]
mod tests {
    use std::fs::{self, File, Metadata};
    use std::os::fd::AsFd;
    use std::os::linux::fs::MetadataExt;

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

    /// Number of file descriptors of this process that are open on `file`.
    fn open_on(file: &File) -> usize {
        let place = |m: &Metadata| (m.st_dev(), m.st_ino());
        let wanted = place(&file.metadata().unwrap());
        let fds = fs::read_dir("/proc/self/fd").unwrap();
        // Other tests close file descriptors concurrently.
        fds.filter_map(|fd| fs::metadata(fd.ok()?.path()).ok())
            .filter(|m| place(m) == wanted)
            .count()
    }

    #[test]
    fn descriptors_of_a_refused_packet_are_closed() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        for count in [MAX_FDS + 1, SCM_MAX_FD] {
            send(a.as_fd(), &Request::Status, &vec![file.as_fd(); count]).unwrap();
            let refused = receive::<Request>(b.as_fd()).unwrap_err();
            assert!(matches!(refused, TransportError::TooManyFds { got } if got == count));
            assert_eq!(open_on(&file), 1);
        }
        send(a.as_fd(), &"no request", &[file.as_fd(); MAX_FDS]).unwrap();
        assert!(matches!(receive::<Request>(b.as_fd()), Err(TransportError::Json(_))));
        assert_eq!(open_on(&file), 1);
        send(a.as_fd(), &Request::Status, &[file.as_fd(); MAX_FDS]).unwrap();
        let (_, fds) = receive::<Request>(b.as_fd()).unwrap();
        assert_eq!((fds.len(), open_on(&file)), (MAX_FDS, 1 + MAX_FDS));
    }

    #[test]
    fn installed_file_descriptors_are_owned_when_others_of_the_packet_are_lost() {
        let (a, b) = pair();
        let file = tempfile::tempfile().unwrap();
        send(a.as_fd(), &Request::Status, &[file.as_fd(); 5]).unwrap();
        let mut space = nix::cmsg_space!([RawFd; 2]);
        let mut bytes = [0; 64];
        let flags = {
            let mut parts = [IoSliceMut::new(&mut bytes)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(b.as_raw_fd(), &mut parts, Some(&mut space), flags);
            message.unwrap().flags
        };
        assert!(flags.contains(MsgFlags::MSG_CTRUNC));
        let fds = rights(&space);
        assert_eq!((fds.len(), open_on(&file)), (2, 3));
        drop(fds);
        assert_eq!(open_on(&file), 1);
    }

    #[test]
    fn a_closed_peer_and_an_invalid_packet_are_different_errors() {
        let (a, b) = pair();
        nix::unistd::write(&a, b"{\"request\":\"fly\"}").unwrap();
        assert!(matches!(receive::<Request>(b.as_fd()), Err(TransportError::Json(_))));
        drop(a);
        assert!(matches!(receive::<Reply>(b.as_fd()), Err(TransportError::Closed)));
    }
}
