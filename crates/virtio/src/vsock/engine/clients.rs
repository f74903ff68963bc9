//! Host clients: accept, handshake, socket events, removal.

use std::io;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::super::connection::{Connection, Phase};
use super::super::spec::HOST_CID;
use super::{FIRST_PORT, LISTENER, VsockEngine};
use crate::device::Poll;
use crate::guest_warn;

/// Connections accepted per call, so that other work of the worker is done too.
const ACCEPT_BUDGET: usize = 16;
/// Deadline for a client's CONNECT line.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// Deadline for the guest's RESPONSE or RST; long, as the guest may be booting.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);
/// Pause before the next accept after it failed, for example with EMFILE.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
const LAST_PORT: u32 = (1 << 31) - 1;

impl VsockEngine {
    pub(super) fn resume_accepting(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        if !self.accepting && self.accept_retry_at.is_none() {
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
                // Further clients wait in the listener's backlog until a connection is removed.
                return self.stop_accepting(poll);
            }
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    // EMFILE or ENOMEM: the listener stays readable, so polling it would busy-loop.
                    guest_warn!(self.counters.limit, %error, "vsock listener cannot accept");
                    self.stop_accepting(poll);
                    self.accept_retry_at = Some(Instant::now() + ACCEPT_PAUSE);
                    return;
                }
            };
            let port = self.free_port();
            let deadline = Instant::now() + HANDSHAKE_LIMIT;
            let events =
                EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            let added = stream
                .set_nonblocking(true)
                .and_then(|()| poll.add(stream.as_raw_fd(), port, events));
            if let Err(error) = added {
                guest_warn!(self.counters.limit, %error, "vsock client cannot be polled");
                continue;
            }
            self.connections.insert(port, Connection::new(stream, port, deadline));
            self.deadlines.insert((deadline, port));
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

    /// Events on a client's socket.
    pub(super) fn process_client(&mut self, port: u32, events: EventSet, poll: &mut Poll<'_>) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if events.intersects(EventSet::HANG_UP | EventSet::ERROR) {
            connection.set_hung_up();
            connection.check_hung_up();
        }
        if events.intersects(EventSet::IN | EventSet::READ_HANG_UP) {
            connection.set_readable();
        }
        match connection.phase {
            Phase::Handshake { .. } => match connection.handshake() {
                Ok(None) => {}
                Ok(Some(guest_port)) => {
                    connection.guest_port = guest_port;
                    let deadline = Instant::now() + REQUEST_LIMIT;
                    self.set_phase(port, Phase::Requested { deadline });
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
                if connection.hung_up() || connection.is_flushed() {
                    self.remove(port, poll);
                }
            }
            Phase::Requested { .. } | Phase::Open | Phase::Closing { .. } => connection.flush(),
        }
        self.schedule_rx(port);
    }

    pub(super) fn set_phase(&mut self, port: u32, phase: Phase) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if let Some(deadline) = connection.deadline() {
            self.deadlines.remove(&(deadline, port));
        }
        connection.phase = phase;
        if let Some(deadline) = connection.deadline() {
            self.deadlines.insert((deadline, port));
        }
    }

    pub(super) fn remove(&mut self, port: u32, poll: &mut Poll<'_>) {
        let Some(connection) = self.connections.remove(&port) else { return };
        if let Some(deadline) = connection.deadline() {
            self.deadlines.remove(&(deadline, port));
        }
        poll.remove(connection.fd());
        drop(connection);
        if let Err(error) = self.resume_accepting(poll) {
            guest_warn!(self.counters.limit, %error, "vsock listener cannot be polled");
        }
    }

    /// Removes a connection, and sends RST if the guest has seen its REQUEST.
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
