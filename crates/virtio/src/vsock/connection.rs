//! One host client connected to one guest socket: its phase, its buffers, and its credit.
//!
//! Phases:
//! ```text
//!  Handshake --CONNECT--> Requested --RESPONSE--> Open --SHUTDOWN(both)--> Closing --RST--> end
//!   | bad line, timeout    | RST, timeout          | SHUTDOWN(both) or RST from the guest,
//!   v                      v                       v data still buffered
//!  end                    end                     Linger --flushed or client gone--> end
//! ```
//! Without buffered data, SHUTDOWN(both) or RST from the guest removes an Open or Closing
//! connection at once. A packet that the phase does not allow resets the connection.
//!
//! Within Open and Closing each direction has a state of its own:
//! ```text
//!  client to guest (ReadState):  Readable <--EAGAIN / EPOLLIN--> Blocked
//!      Readable --end of stream--> Closed   SHUTDOWN(send) follows the last data packet
//!      any --guest SHUTDOWN(receive)--> Closed   and shutdown(SHUT_RD) on the client's socket
//!  guest to client (write_closed):  open --guest SHUTDOWN(send), buffer flushed--> closed
//!                                   open --EPIPE, client gone--> closed   buffered data is dropped
//!  shutdown flags:  our_shutdown is what the guest has to be sent, sent_shutdown what it was sent
//!  client gone (hung_up and end of stream):  our_shutdown becomes SHUTDOWN(both)
//! ```
//! Client sockets are polled edge-triggered, so readability is kept here until a read returns
//! EAGAIN.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::sys::socket::{MsgFlags, recv, send};

use super::credit::{LocalCredit, PeerCredit};
use super::handshake::{ConnectLine, HandshakeError};
use super::spec::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// Bytes buffered for a client that does not read; announced to the guest as `buf_alloc`.
/// Attack: a guest sends to many slow clients to grow the VMM. The worst case is this times
/// [`super::MAX_CONNECTIONS`].
pub(super) const BUFFER: u32 = 128 << 10;

#[derive(Debug)]
pub(super) enum Phase {
    /// The client has not sent its complete CONNECT line yet.
    Handshake {
        line: ConnectLine,
        deadline: Instant,
    },
    /// The guest has not answered REQUEST yet.
    Requested {
        deadline: Instant,
    },
    Open,
    /// SHUTDOWN(both) was sent; the guest answers with RST.
    Closing {
        deadline: Instant,
    },
    /// The guest has closed the connection; buffered data is still written to the client.
    Linger,
}

/// The direction from the client to the guest; see the module header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ReadState {
    /// The client's socket may have data.
    Readable,
    /// The last read returned EAGAIN.
    Blocked,
    /// End of stream, or the guest has shut down its receiving side.
    Closed,
}

/// The next packet of a connection to the guest. Data is read from the client when the guest has a
/// buffer for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Packet {
    Control { op: u16, flags: u32 },
    Data { limit: usize },
}

pub(super) struct Connection {
    // Fixed.
    stream: UnixStream,
    pub(super) host_port: u32,
    pub(super) guest_port: u32,
    // Volatile.
    pub(super) phase: Phase,
    /// Its port is in the engine's `rx_ready`.
    pub(super) rx_scheduled: bool,
    pub(super) peer_credit: PeerCredit,
    pub(super) local_credit: LocalCredit,
    pub(super) request_sent: bool,
    /// The guest has sent a CREDIT_REQUEST that is not answered yet.
    pub(super) credit_requested: bool,
    read: ReadState,
    /// EPOLLHUP or EPOLLERR was seen on the client's socket.
    hung_up: bool,
    /// Data from the guest that the socket has not taken yet.
    buffer: VecDeque<u8>,
    /// The socket takes no more writes.
    write_closed: bool,
    /// Flags of the guest's SHUTDOWN packets.
    guest_shutdown: u32,
    /// Flags that the guest has to be sent.
    our_shutdown: u32,
    /// Flags of the last SHUTDOWN packet sent.
    sent_shutdown: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, host_port: u32, deadline: Instant) -> Self {
        Self {
            stream,
            host_port,
            guest_port: 0,
            phase: Phase::Handshake { line: ConnectLine::default(), deadline },
            rx_scheduled: false,
            peer_credit: PeerCredit::default(),
            local_credit: LocalCredit::new(BUFFER),
            request_sent: false,
            credit_requested: false,
            read: ReadState::Readable,
            hung_up: false,
            buffer: VecDeque::new(),
            write_closed: false,
            guest_shutdown: 0,
            our_shutdown: 0,
            sent_shutdown: 0,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        match self.phase {
            Phase::Handshake { deadline, .. }
            | Phase::Requested { deadline }
            | Phase::Closing { deadline } => Some(deadline),
            Phase::Open | Phase::Linger => None,
        }
    }

    /// EPOLLIN or EPOLLRDHUP on the client's socket.
    pub(super) fn set_readable(&mut self) {
        if self.read == ReadState::Blocked {
            self.read = ReadState::Readable;
        }
    }

    /// EPOLLHUP or EPOLLERR on the client's socket. Remaining data is read first; the end of stream
    /// then closes both directions.
    pub(super) fn set_hung_up(&mut self) {
        self.hung_up = true;
        self.set_readable();
    }

    pub(super) fn hung_up(&self) -> bool {
        self.hung_up
    }

    /// Reads more of the CONNECT line. Returns the guest port once the line is complete.
    pub(super) fn handshake(&mut self) -> Result<Option<u32>, HandshakeFailed> {
        let fd = self.fd();
        let Phase::Handshake { line, .. } = &mut self.phase else { return Ok(None) };
        loop {
            let mut next = [0; super::handshake::MAX_LINE];
            let remaining = line.remaining();
            let seen = match recv(fd, &mut next[..remaining], MsgFlags::MSG_PEEK) {
                Ok(0) => return Err(HandshakeFailed::Gone),
                Ok(seen) => seen,
                Err(nix::Error::EAGAIN) => return Ok(None),
                Err(nix::Error::EINTR) => continue,
                Err(_) => return Err(HandshakeFailed::Gone),
            };
            let take = line.take(&next[..seen]);
            let Ok(took) = recv(fd, &mut next[..take], MsgFlags::empty()) else {
                return Err(HandshakeFailed::Gone);
            };
            if let Some(port) = line.push(&next[..took])? {
                return Ok(Some(port));
            }
        }
    }

    /// The guest has sent RESPONSE: writes the OK line to the client.
    pub(super) fn open(&mut self) -> io::Result<()> {
        self.phase = Phase::Open;
        let answer = format!("OK {}\n", self.host_port);
        // Nothing was written to the socket before, so its buffer has space for the line.
        let sent = send(self.fd(), answer.as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
        if sent == answer.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// The next packet for the guest, if there is one.
    pub(super) fn next_packet(&self) -> Option<Packet> {
        let control = |op, flags| Some(Packet::Control { op, flags });
        match self.phase {
            Phase::Requested { .. } if !self.request_sent => control(op::REQUEST, 0),
            // A flag is set only after the last data packet of its direction, so SHUTDOWN never
            // overtakes data.
            Phase::Open | Phase::Closing { .. } if self.our_shutdown != self.sent_shutdown => {
                control(op::SHUTDOWN, self.our_shutdown)
            }
            Phase::Open | Phase::Closing { .. } => {
                if self.read == ReadState::Readable {
                    let limit = self.peer_credit.available() as usize;
                    if limit > 0 {
                        return Some(Packet::Data { limit });
                    }
                    if self.peer_credit.needs_request() {
                        return control(op::CREDIT_REQUEST, 0);
                    }
                }
                let update = self.credit_requested || self.local_credit.needs_update();
                if update { control(op::CREDIT_UPDATE, 0) } else { None }
            }
            Phase::Handshake { .. } | Phase::Requested { .. } | Phase::Linger => None,
        }
    }

    /// Records that a control packet was sent.
    pub(super) fn control_sent(&mut self, op: u16, flags: u32) {
        match op {
            op::REQUEST => self.request_sent = true,
            op::SHUTDOWN => self.sent_shutdown = flags,
            op::CREDIT_REQUEST => self.peer_credit.request_sent(),
            op::CREDIT_UPDATE => self.credit_requested = false,
            _ => {}
        }
    }

    /// SHUTDOWN(both) was sent.
    pub(super) fn sent_full_shutdown(&self) -> bool {
        self.sent_shutdown == SHUTDOWN_BOTH
    }

    /// Reads data for the guest. 0: no data now, or end of stream; [`Self::next_packet`] has
    /// changed.
    pub(super) fn read(&mut self, into: &mut [u8]) -> usize {
        loop {
            match recv(self.fd(), into, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => self.end_of_stream(false),
                Ok(got) => return got,
                Err(nix::Error::EINTR) => continue,
                Err(nix::Error::EAGAIN) => self.read = ReadState::Blocked,
                Err(_) => self.end_of_stream(true),
            }
            return 0;
        }
    }

    fn end_of_stream(&mut self, broken: bool) {
        self.read = ReadState::Closed;
        self.our_shutdown |= SHUTDOWN_SEND;
        if broken || self.hung_up {
            self.close_client();
        }
    }

    /// Closes both directions if the end of stream was read before the hang-up was seen.
    pub(super) fn check_hung_up(&mut self) {
        if self.hung_up && self.read == ReadState::Closed {
            self.close_client();
        }
    }

    fn close_client(&mut self) {
        self.our_shutdown = SHUTDOWN_BOTH;
        self.stop_writing();
    }

    fn stop_writing(&mut self) {
        self.write_closed = true;
        self.our_shutdown |= SHUTDOWN_RECEIVE;
        let dropped = std::mem::take(&mut self.buffer).len();
        self.local_credit.forward(dropped as u32);
    }

    /// Takes data from the guest, within its credit. Writes what the socket takes, buffers the
    /// rest.
    pub(super) fn deliver(&mut self, mut data: &[u8]) {
        if self.buffer.is_empty() {
            let done = self.write(data);
            data = &data[done.min(data.len())..];
        }
        if self.write_closed {
            self.local_credit.forward(data.len() as u32);
        } else {
            self.buffer.extend(data);
        }
    }

    /// Writes buffered data until the socket returns EAGAIN.
    pub(super) fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let piece = std::mem::take(&mut self.buffer);
            let done = self.write(piece.as_slices().0);
            if self.write_closed {
                self.local_credit.forward((piece.len() - done) as u32);
                return;
            }
            self.buffer = piece;
            self.buffer.drain(..done);
            if done == 0 {
                return;
            }
        }
        // Frees the buffer's memory.
        self.buffer = VecDeque::new();
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_closed {
            self.write_closed = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// One write; bytes taken by the socket count as forwarded.
    fn write(&mut self, data: &[u8]) -> usize {
        if self.write_closed || data.is_empty() {
            return 0;
        }
        loop {
            match send(self.fd(), data, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
                Ok(done) => {
                    self.local_credit.forward(done as u32);
                    return done;
                }
                Err(nix::Error::EINTR) => {}
                Err(nix::Error::EAGAIN) => return 0,
                Err(_) => {
                    self.stop_writing();
                    return 0;
                }
            }
        }
    }

    /// SHUTDOWN from the guest. `true`: both directions are shut down.
    pub(super) fn on_guest_shutdown(&mut self, flags: u32) -> bool {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && self.read != ReadState::Closed {
            self.read = ReadState::Closed;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// The guest has sent SHUTDOWN(send), after which it must not send data.
    pub(super) fn guest_send_shut(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND != 0
    }

    /// No data is buffered for the client.
    pub(super) fn is_flushed(&self) -> bool {
        self.buffer.is_empty()
    }
}

/// Why a handshake ended without a REQUEST to the guest.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeFailed {
    #[error("client disconnected before its CONNECT line was complete")]
    Gone,
    #[error(transparent)]
    Line(#[from] HandshakeError),
}
