//! The host's programs: accepted, listened to, let go.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::super::connection::{Connection, Phase};
use super::super::spec::HOST_CID;
use super::{FIRST_PORT, LISTENER, VsockEngine};
use crate::device::Poll;
use crate::guest_warn;

/// Connections accepted before other work gets its turn.
const ACCEPT_BUDGET: usize = 16;
/// For a client to say where it wants to go.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// For the guest to accept or refuse; generous, as it may just be booting.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);
/// Pause after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
const LAST_PORT: u32 = (1 << 31) - 1;

impl VsockEngine {
    pub(super) fn resume_accepting(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        if !self.accepting && self.accept_again.is_none() {
            poll.add(self.listener.as_raw_fd(), LISTENER, EventSet::IN)?;
            self.accepting = true;
        }
        Ok(())
    }

    fn stop_accepting(&mut self, poll: &mut Poll<'_>) {
        poll.remove(self.listener.as_raw_fd());
        self.accepting = false;
    }

    pub(super) fn accept(&mut self, poll: &mut Poll<'_>) {
        for _ in 0..ACCEPT_BUDGET {
            if self.connections.len() >= self.max_connections {
                // Others wait in the listener's backlog until somebody leaves.
                return self.stop_accepting(poll);
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // Out of descriptors or memory: the backlog keeps, epoll would spin.
                    guest_warn!(self.counters.limit, %error, "vsock listener cannot accept");
                    self.stop_accepting(poll);
                    self.accept_again = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            let port = self.free_port();
            let until = Instant::now() + HANDSHAKE_LIMIT;
            let events =
                EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            let added = stream
                .set_nonblocking(true)
                .and_then(|()| poll.add(stream.as_raw_fd(), port, events));
            if let Err(error) = added {
                guest_warn!(self.counters.limit, %error, "vsock client cannot be polled");
                continue;
            }
            self.connections.insert(port, Connection::new(stream, port, until));
            self.deadlines.insert((until, port));
        }
    }

    fn free_port(&mut self) -> u32 {
        loop {
            let port = self.next_port;
            self.next_port = if port == LAST_PORT { FIRST_PORT } else { port + 1 };
            if !self.connections.contains_key(&port) {
                return port;
            }
        }
    }

    /// Something has changed on a client's socket.
    pub(super) fn serve_client(&mut self, port: u32, events: EventSet, poll: &mut Poll<'_>) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.note_hangup();
            connection.settle_hangup();
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            connection.note_readable();
        }
        match connection.phase {
            Phase::Handshake { .. } => match connection.handshake() {
                Ok(None) => {}
                Ok(Some(guest_port)) => {
                    connection.guest_port = guest_port;
                    let until = Instant::now() + REQUEST_LIMIT;
                    self.enter(port, Phase::Requested { until });
                }
                Err(error) => {
                    tracing::debug!(%error, "vsock client");
                    self.counters.error();
                    self.remove(port, poll);
                }
            },
            Phase::Requested { .. } if connection.hung_up() => self.abort(port, poll),
            Phase::Linger => {
                connection.flush();
                if connection.hung_up() || connection.written_out() {
                    self.remove(port, poll);
                }
            }
            Phase::Requested { .. } | Phase::Open | Phase::Closing { .. } => connection.flush(),
        }
        self.stand_in_line(port);
    }

    pub(super) fn enter(&mut self, port: u32, phase: Phase) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if let Some(until) = connection.until() {
            self.deadlines.remove(&(until, port));
        }
        connection.phase = phase;
        if let Some(until) = connection.until() {
            self.deadlines.insert((until, port));
        }
    }

    pub(super) fn remove(&mut self, port: u32, poll: &mut Poll<'_>) {
        let Some(connection) = self.connections.remove(&port) else { return };
        if let Some(until) = connection.until() {
            self.deadlines.remove(&(until, port));
        }
        poll.remove(connection.fd());
        drop(connection);
        if let Err(error) = self.resume_accepting(poll) {
            guest_warn!(self.counters.limit, %error, "vsock listener cannot be polled");
        }
    }

    /// Ends a connection and tells the guest, if it knows of it.
    pub(super) fn abort(&mut self, port: u32, poll: &mut Poll<'_>) {
        let Some(connection) = self.connections.get(&port) else { return };
        let known = match connection.phase {
            Phase::Handshake { .. } | Phase::Linger => false,
            Phase::Requested { .. } => connection.request_sent,
            Phase::Open | Phase::Closing { .. } => true,
        };
        let guest_port = connection.guest_port;
        self.remove(port, poll);
        if known {
            self.reply_reset(HOST_CID, port, guest_port);
        }
    }
}
