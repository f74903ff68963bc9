//! The vhost-user socket of the front end: sends messages and receives replies, without blocking.
//!
//! The front end of rust-vmm's `vhost` crate blocks for each reply, which would stop all devices of
//! the worker while a back end does not answer; so the few messages needed are implemented here.
//!
//! The back end is trusted with guest memory only: an unexpected or malformed reply ends the
//! connection.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::socket::{ControlMessage, MsgFlags, recv, sendmsg};
use vm_memory::{GuestMemoryBackend, GuestMemoryMmap, GuestMemoryRegion};

use super::spec::{FLAGS_REPLY, FLAGS_VERSION, HEADER_LEN, REPLY_PAYLOAD, request};

const REPLY_LEN: usize = HEADER_LEN + REPLY_PAYLOAD;

#[derive(Debug, thiserror::Error)]
pub(super) enum BackendError {
    #[error("backend has closed its socket")]
    Closed,
    #[error("socket of the backend")]
    Socket(#[from] Errno),
    #[error("backend does not take its messages")]
    Full,
    #[error("backend sent {got:02x?}, which answers nothing")]
    Reply { got: [u8; HEADER_LEN] },
    #[error("guest memory at {addr:#x} has no file to share")]
    Memory { addr: u64 },
    #[error("backend does not offer features {missing:#x}")]
    Features { missing: u64 },
    #[error("backend answered for queue {got}")]
    Queue { got: u32 },
    #[error("backend did not answer in time")]
    Deadline,
    #[error("event descriptor")]
    Event(#[source] io::Error),
}

/// A reply: message type and payload.
pub(super) type Reply = (u32, [u8; REPLY_PAYLOAD]);

/// A connected socket and the replies that are outstanding.
#[derive(Debug)]
pub(super) struct Connection {
    socket: OwnedFd,
    /// SET_OWNER was sent; it is sent once per connection.
    pub(super) owned: bool,
    expected: VecDeque<u32>,
    buffer: [u8; REPLY_LEN],
    filled: usize,
}

impl Connection {
    pub(super) fn new(socket: OwnedFd) -> Self {
        Self { socket, owned: false, expected: VecDeque::new(), buffer: [0; REPLY_LEN], filled: 0 }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }

    pub(super) fn send(
        &mut self,
        request: u32,
        payload: &[u8],
        fds: &[BorrowedFd<'_>],
    ) -> Result<(), BackendError> {
        let mut message = Vec::with_capacity(HEADER_LEN + payload.len());
        for word in [request, FLAGS_VERSION, payload.len() as u32] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload);
        let raw: Vec<RawFd> = fds.iter().map(AsRawFd::as_raw_fd).collect();
        let rights = [ControlMessage::ScmRights(&raw)];
        let control: &[ControlMessage<'_>] = if raw.is_empty() { &[] } else { &rights };
        let parts = [io::IoSlice::new(&message)];
        let flags = MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL;
        match sendmsg::<()>(self.fd(), &parts, control, flags, None) {
            Ok(sent) if sent == message.len() => {}
            // The socket buffer has space for all messages of a start, so the back end does not
            // read.
            Ok(_) | Err(Errno::EAGAIN) => return Err(BackendError::Full),
            Err(Errno::EPIPE | Errno::ECONNRESET) => return Err(BackendError::Closed),
            Err(e) => return Err(e.into()),
        }
        if matches!(request, request::GET_FEATURES | request::GET_VRING_BASE) {
            self.expected.push_back(request);
        }
        Ok(())
    }

    /// Sends a message with a u64 payload.
    pub(super) fn send_u64(&mut self, request: u32, value: u64) -> Result<(), BackendError> {
        self.send(request, &value.to_ne_bytes(), &[])
    }

    /// Sends a message with a `struct vhost_vring_state`: queue index and number.
    pub(super) fn send_state(
        &mut self,
        request: u32,
        queue: u32,
        number: u32,
    ) -> Result<(), BackendError> {
        self.send(request, &join(queue, number), &[])
    }

    /// Sends a queue's eventfd.
    pub(super) fn send_event(
        &mut self,
        request: u32,
        queue: u32,
        event: BorrowedFd<'_>,
    ) -> Result<(), BackendError> {
        self.send(request, &u64::from(queue).to_ne_bytes(), &[event])
    }

    /// Sends SET_MEM_TABLE with all regions of guest memory and their files. User addresses, which
    /// ring addresses are given in, equal guest addresses: the back end does not learn the
    /// addresses of the VMM's mappings.
    pub(super) fn send_memory(&mut self, mem: &GuestMemoryMmap) -> Result<(), BackendError> {
        let mut payload = join(mem.num_regions() as u32, 0).to_vec();
        let mut files = Vec::new();
        for region in mem.iter() {
            let addr = region.start_addr().0;
            let file = region.file_offset().ok_or(BackendError::Memory { addr })?;
            for word in [addr, region.len(), addr, file.start()] {
                payload.extend(word.to_ne_bytes());
            }
            files.push(std::os::fd::AsFd::as_fd(file.file()));
        }
        self.send(request::SET_MEM_TABLE, &payload, &files)
    }

    /// The next reply, if it has arrived.
    pub(super) fn receive(&mut self) -> Result<Option<Reply>, BackendError> {
        while self.filled < REPLY_LEN {
            let rest = &mut self.buffer[self.filled..];
            match recv(self.socket.as_raw_fd(), rest, MsgFlags::MSG_DONTWAIT) {
                Ok(0) | Err(Errno::ECONNRESET) => return Err(BackendError::Closed),
                Ok(got) => self.filled += got,
                Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
                Err(e) => return Err(e.into()),
            }
        }
        self.filled = 0;
        let word = |n: usize| {
            let at = 4 * n;
            u32::from_ne_bytes([0, 1, 2, 3].map(|m| self.buffer[at + m]))
        };
        let wanted = self.expected.pop_front();
        let shape = (word(1), word(2)) == (FLAGS_REPLY, REPLY_PAYLOAD as u32);
        match wanted {
            Some(request) if shape && word(0) == request => {
                let mut payload = [0; REPLY_PAYLOAD];
                payload.copy_from_slice(&self.buffer[HEADER_LEN..]);
                Ok(Some((request, payload)))
            }
            _ => {
                let mut got = [0; HEADER_LEN];
                got.copy_from_slice(&self.buffer[..HEADER_LEN]);
                Err(BackendError::Reply { got })
            }
        }
    }
}

/// Two 32-bit numbers as a payload.
fn join(first: u32, second: u32) -> [u8; 8] {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    bytes
}

/// The inverse of [`join`].
pub(super) fn split(payload: [u8; REPLY_PAYLOAD]) -> (u32, u32) {
    let wide = u64::from_ne_bytes(payload);
    if cfg!(target_endian = "little") {
        (wide as u32, (wide >> 32) as u32)
    } else {
        ((wide >> 32) as u32, wide as u32)
    }
}
