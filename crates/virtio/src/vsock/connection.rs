//! One host program joined to one guest socket.
//!
//! ```text
//!  Handshake --CONNECT--> Requested --RESPONSE--> Open --hang-up--> Closing --RST--> (gone)
//!      | bad line, time-out   | RST, time-out      | guest SHUTDOWN both, RST
//!      v                      v                    v
//!    (gone)                 (gone)               Linger --buffer written--> (gone)
//! ```
//! Half-closes live inside Open: the client's end of stream becomes SHUTDOWN(send) after the last
//! byte; the guest's SHUTDOWN(send) becomes `shutdown(WR)` after the last buffered byte.
//!
//! Sockets are polled edge-triggered, so readiness is remembered here until a call says EAGAIN.

use std::collections::VecDeque;
use std::io;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::time::Instant;

use nix::sys::socket::{MsgFlags, recv, send};

use super::credit::{Incoming, Outgoing};
use super::handshake::{HandshakeError, Line};
use super::spec::{SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};

/// Bytes buffered for a client that does not read; the credit the guest gets.
/// Attack: a guest that sends to many slow clients, to grow the VMM: the worst case is this times
/// [`super::MAX_CONNECTIONS`].
pub(super) const BUFFER: u32 = 128 << 10;

#[derive(Debug)]
pub(super) enum Phase {
    Handshake {
        line: Line,
        until: Instant,
    },
    Requested {
        until: Instant,
    },
    Open,
    /// The client is gone and the guest has been told; it answers with RST.
    Closing {
        until: Instant,
    },
    /// The guest is gone; the client still gets what is buffered.
    Linger,
}

/// A packet this connection wants to send; data is read when there is room for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Want {
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
    /// It stands in the engine's line of connections with something to send.
    pub(super) in_line: bool,
    pub(super) outgoing: Outgoing,
    pub(super) incoming: Incoming,
    pub(super) request_sent: bool,
    /// The guest has sent a CREDIT_REQUEST.
    pub(super) update_asked: bool,
    /// The socket may have something to read.
    readable: bool,
    /// Nothing will be read any more: end of stream, or the guest does not want it.
    read_done: bool,
    /// The client is gone altogether.
    hung_up: bool,
    /// From the guest, not yet taken by the socket.
    buffer: VecDeque<u8>,
    /// The socket takes no more writes.
    write_done: bool,
    guest_shutdown: u32,
    our_shutdown: u32,
    told_shutdown: u32,
}

impl Connection {
    pub(super) fn new(stream: UnixStream, host_port: u32, until: Instant) -> Self {
        Self {
            stream,
            host_port,
            guest_port: 0,
            phase: Phase::Handshake { line: Line::default(), until },
            in_line: false,
            outgoing: Outgoing::default(),
            incoming: Incoming::new(BUFFER),
            request_sent: false,
            update_asked: false,
            readable: true,
            read_done: false,
            hung_up: false,
            buffer: VecDeque::new(),
            write_done: false,
            guest_shutdown: 0,
            our_shutdown: 0,
            told_shutdown: 0,
        }
    }

    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    pub(super) fn until(&self) -> Option<Instant> {
        match self.phase {
            Phase::Handshake { until, .. }
            | Phase::Requested { until }
            | Phase::Closing { until } => Some(until),
            Phase::Open | Phase::Linger => None,
        }
    }

    /// The socket may be readable again.
    pub(super) fn note_readable(&mut self) {
        self.readable = true;
    }

    /// Both directions of the socket are shut.
    pub(super) fn note_hangup(&mut self) {
        self.hung_up = true;
        // What is left to read is read first; the end of it then shuts both directions.
        self.readable = true;
    }

    pub(super) fn hung_up(&self) -> bool {
        self.hung_up
    }

    /// Reads on in the client's first line; the guest port when it is complete.
    pub(super) fn handshake(&mut self) -> Result<Option<u32>, HandshakeClosed> {
        let fd = self.fd();
        let Phase::Handshake { line, .. } = &mut self.phase else { return Ok(None) };
        loop {
            let mut next = [0; super::handshake::MAX_LINE];
            let room = line.room();
            let seen = match recv(fd, &mut next[..room], MsgFlags::MSG_PEEK) {
                Ok(0) => return Err(HandshakeClosed::Gone),
                Ok(seen) => seen,
                Err(nix::Error::EAGAIN) => return Ok(None),
                Err(nix::Error::EINTR) => continue,
                Err(_) => return Err(HandshakeClosed::Gone),
            };
            let take = line.take(&next[..seen]);
            let Ok(took) = recv(fd, &mut next[..take], MsgFlags::empty()) else {
                return Err(HandshakeClosed::Gone);
            };
            if let Some(port) = line.push(&next[..took])? {
                return Ok(Some(port));
            }
        }
    }

    /// RESPONSE came: tells the client, which then may send.
    pub(super) fn open(&mut self) -> io::Result<()> {
        self.phase = Phase::Open;
        let answer = format!("OK {}\n", self.host_port);
        // The socket is new, so its buffer has room for the line.
        let sent = send(self.fd(), answer.as_bytes(), MsgFlags::MSG_NOSIGNAL)?;
        if sent == answer.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
    }

    /// What to send next, if anything.
    pub(super) fn want(&self) -> Option<Want> {
        let control = |op, flags| Some(Want::Control { op, flags });
        match self.phase {
            Phase::Requested { .. } if !self.request_sent => control(op::REQUEST, 0),
            // Each flag was set when there was nothing more to say in its direction, so telling it
            // never overtakes data.
            Phase::Open | Phase::Closing { .. } if self.our_shutdown != self.told_shutdown => {
                control(op::SHUTDOWN, self.our_shutdown)
            }
            Phase::Open | Phase::Closing { .. } => {
                if self.readable && !self.read_done {
                    let room = self.outgoing.room() as usize;
                    if room > 0 {
                        return Some(Want::Data { limit: room });
                    }
                    if self.outgoing.should_ask() {
                        return control(op::CREDIT_REQUEST, 0);
                    }
                }
                let update = self.update_asked || self.incoming.should_tell();
                if update { control(op::CREDIT_UPDATE, 0) } else { None }
            }
            Phase::Handshake { .. } | Phase::Requested { .. } | Phase::Linger => None,
        }
    }

    /// A packet of this kind is on its way.
    pub(super) fn control_sent(&mut self, op: u16, flags: u32) {
        match op {
            op::REQUEST => self.request_sent = true,
            op::SHUTDOWN => self.told_shutdown = flags,
            op::CREDIT_REQUEST => self.outgoing.asked(),
            op::CREDIT_UPDATE => self.update_asked = false,
            _ => {}
        }
    }

    /// The client and the guest both know that nothing more comes from the client.
    pub(super) fn fully_shut_by_us(&self) -> bool {
        self.told_shutdown == SHUTDOWN_BOTH
    }

    /// Reads for the guest; 0 when there is nothing now or nothing more, which changes
    /// [`Self::want`].
    pub(super) fn read(&mut self, into: &mut [u8]) -> usize {
        loop {
            match recv(self.fd(), into, MsgFlags::MSG_DONTWAIT) {
                Ok(0) => self.end_of_stream(false),
                Ok(got) => return got,
                Err(nix::Error::EINTR) => continue,
                Err(nix::Error::EAGAIN) => self.readable = false,
                Err(_) => self.end_of_stream(true),
            }
            return 0;
        }
    }

    fn end_of_stream(&mut self, broken: bool) {
        self.read_done = true;
        self.our_shutdown |= SHUTDOWN_SEND;
        if broken || self.hung_up {
            self.client_is_gone();
        }
    }

    /// After the last read: whether or not it was known at that time that the client is gone.
    pub(super) fn settle_hangup(&mut self) {
        if self.hung_up && self.read_done {
            self.client_is_gone();
        }
    }

    fn client_is_gone(&mut self) {
        self.our_shutdown = SHUTDOWN_BOTH;
        self.stop_writing();
    }

    fn stop_writing(&mut self) {
        self.write_done = true;
        self.our_shutdown |= SHUTDOWN_RECEIVE;
        let dropped = std::mem::take(&mut self.buffer).len();
        self.incoming.forward(dropped as u32);
    }

    /// Data from the guest, within its credit: written at once as far as the socket takes it.
    pub(super) fn deliver(&mut self, mut data: &[u8]) {
        if self.buffer.is_empty() {
            let done = self.write(data);
            data = &data[done.min(data.len())..];
        }
        if self.write_done {
            self.incoming.forward(data.len() as u32);
        } else {
            self.buffer.extend(data);
        }
    }

    /// Writes what is buffered as far as the socket takes it.
    pub(super) fn flush(&mut self) {
        while !self.buffer.is_empty() {
            let piece = std::mem::take(&mut self.buffer);
            let done = self.write(piece.as_slices().0);
            if self.write_done {
                self.incoming.forward((piece.len() - done) as u32);
                return;
            }
            self.buffer = piece;
            self.buffer.drain(..done);
            if done == 0 {
                return;
            }
        }
        // Connections that were busy once do not keep their buffers.
        self.buffer = VecDeque::new();
        if self.guest_shutdown & SHUTDOWN_SEND != 0 && !self.write_done {
            self.write_done = true;
            let _ = self.stream.shutdown(Shutdown::Write);
        }
    }

    /// One write; counts what was taken as forwarded.
    fn write(&mut self, data: &[u8]) -> usize {
        if self.write_done || data.is_empty() {
            return 0;
        }
        loop {
            match send(self.fd(), data, MsgFlags::MSG_NOSIGNAL | MsgFlags::MSG_DONTWAIT) {
                Ok(done) => {
                    self.incoming.forward(done as u32);
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

    /// SHUTDOWN from the guest; `true` when it has shut both directions.
    pub(super) fn guest_shut(&mut self, flags: u32) -> bool {
        self.guest_shutdown |= flags & SHUTDOWN_BOTH;
        if self.guest_shutdown & SHUTDOWN_RECEIVE != 0 && !self.read_done {
            self.read_done = true;
            let _ = self.stream.shutdown(Shutdown::Read);
        }
        self.flush();
        self.guest_shutdown == SHUTDOWN_BOTH
    }

    /// The guest may send no more: it said so.
    pub(super) fn guest_finished_sending(&self) -> bool {
        self.guest_shutdown & SHUTDOWN_SEND != 0
    }

    /// Nothing left to give to the client.
    pub(super) fn written_out(&self) -> bool {
        self.buffer.is_empty()
    }
}

/// Why a client did not get as far as a request.
#[derive(Debug, thiserror::Error)]
pub(super) enum HandshakeClosed {
    #[error("client left before its first line was complete")]
    Gone,
    #[error(transparent)]
    Line(#[from] HandshakeError),
}
