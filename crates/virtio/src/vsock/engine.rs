//! The socket device's moving half: packets from the guest, connections from the host, and the line
//! of those that have something to send when the guest offers a buffer.
//!
//! Nothing here waits for a slow peer. What the guest sends fits the buffers it was promised; what
//! the host sends stays in its sockets until there is credit and a buffer for it.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vmm_sys_util::epoll::EventSet;

use super::connection::{BUFFER, Connection, Phase, Want};
use super::spec::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use crate::chain::Chain;
use crate::device::{DeviceCounters, Engine, Poll};
use crate::guest_warn;
use crate::limit::LogLimit;
use crate::queue::VirtQueue;

/// Packets handled in one direction before other devices get their turn.
const BUDGET: usize = 64;
/// Connections accepted before other work gets its turn.
const ACCEPT_BUDGET: usize = 16;
/// Most data in a packet to the guest; Linux uses the same.
const MAX_PAYLOAD: usize = 64 << 10;
/// RSTs waiting for a receive buffer; more are dropped and counted.
/// Attack: a guest that sends nonsense and offers no buffers, to grow the queue of answers.
const MAX_REPLIES: usize = 1024;
/// For a client to say where it wants to go.
const HANDSHAKE_LIMIT: Duration = Duration::from_secs(10);
/// For the guest to accept or refuse; generous, as it may just be booting.
const REQUEST_LIMIT: Duration = Duration::from_secs(20);
/// For the guest to confirm the end of a connection.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);
/// Pause after the process ran out of descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
const LISTENER: u32 = 3;
/// Host ports serve as epoll tokens too.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

pub(super) struct VsockEngine {
    // Fixed.
    guest_cid: u64,
    max_connections: usize,
    // Glue.
    listener: UnixListener,
    rx: VirtQueue,
    tx: VirtQueue,
    event: VirtQueue,
    counters: Arc<DeviceCounters>,
    limit: LogLimit,
    // Volatile.
    connections: HashMap<u32, Connection>,
    /// Host ports of connections with something to send, each once.
    line: VecDeque<u32>,
    replies: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u32)>,
    next_port: u32,
    accepting: bool,
    accept_again: Option<Instant>,
    scratch: Vec<u8>,
}

impl VsockEngine {
    pub(super) fn new(
        guest_cid: u64,
        max_connections: usize,
        listener: UnixListener,
        [rx, tx, event]: [VirtQueue; 3],
        counters: Arc<DeviceCounters>,
    ) -> Self {
        Self {
            guest_cid,
            max_connections,
            listener,
            rx,
            tx,
            event,
            counters,
            limit: LogLimit::default(),
            connections: HashMap::new(),
            line: VecDeque::new(),
            replies: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_port: FIRST_PORT,
            accepting: false,
            accept_again: None,
            scratch: vec![0; BUFFER as usize],
        }
    }
}

impl Engine for VsockEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.rx.kick_fd(), RX, EventSet::IN)?;
        poll.add(self.tx.kick_fd(), TX, EventSet::IN)?;
        poll.add(self.event.kick_fd(), EVENT, EventSet::IN)?;
        self.event.disable_kicks();
        self.resume_accepting(poll)?;
        poll.again(TX);
        Ok(())
    }

    fn handle(&mut self, token: u32, events: EventSet, poll: &mut Poll<'_>) {
        match token {
            RX => self.rx.clear_kick(),
            TX => self.serve_guest(poll),
            // Buffers for events are kept; a transport reset is only due after a restore.
            EVENT => self.event.clear_kick(),
            LISTENER => self.accept(poll),
            port => self.serve_client(port, events, poll),
        }
        self.fill_buffers(poll);
    }

    fn deadline(&self) -> Option<Instant> {
        let first = self.deadlines.first().map(|(at, _)| *at);
        first.into_iter().chain(self.accept_again).min()
    }

    fn tick(&mut self, now: Instant, poll: &mut Poll<'_>) {
        if self.accept_again.is_some_and(|at| at <= now) {
            self.accept_again = None;
            let _ = self.resume_accepting(poll);
        }
        while let Some((at, port)) = self.deadlines.first().copied()
            && at <= now
        {
            tracing::debug!(port, "vsock connection timed out");
            self.abort(port, poll);
        }
        self.fill_buffers(poll);
    }
}

/// The host's side: clients.
impl VsockEngine {
    fn resume_accepting(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
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

    fn accept(&mut self, poll: &mut Poll<'_>) {
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
                    tracing::warn!(%error, "vsock listener cannot accept");
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
                tracing::warn!(%error, "vsock client cannot be polled");
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
    fn serve_client(&mut self, port: u32, events: EventSet, poll: &mut Poll<'_>) {
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

    fn enter(&mut self, port: u32, phase: Phase) {
        let Some(connection) = self.connections.get_mut(&port) else { return };
        if let Some(until) = connection.until() {
            self.deadlines.remove(&(until, port));
        }
        connection.phase = phase;
        if let Some(until) = connection.until() {
            self.deadlines.insert((until, port));
        }
    }

    fn remove(&mut self, port: u32, poll: &mut Poll<'_>) {
        let Some(connection) = self.connections.remove(&port) else { return };
        if let Some(until) = connection.until() {
            self.deadlines.remove(&(until, port));
        }
        poll.remove(connection.fd());
        drop(connection);
        if let Err(error) = self.resume_accepting(poll) {
            tracing::warn!(%error, "vsock listener cannot be polled");
        }
    }

    /// Ends a connection and tells the guest, if it knows of it.
    fn abort(&mut self, port: u32, poll: &mut Poll<'_>) {
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

/// From the guest.
impl VsockEngine {
    fn serve_guest(&mut self, poll: &mut Poll<'_>) {
        self.tx.clear_kick();
        self.tx.disable_kicks();
        let mut more = true;
        for _ in 0..BUDGET {
            if let Some(chain) = self.tx.pop() {
                self.packet(&chain, poll);
                self.tx.push(chain.head, 0);
            } else {
                more = self.tx.enable_kicks();
                if !more {
                    break;
                }
            }
        }
        self.tx.announce();
        if more {
            poll.again(TX);
        }
    }

    fn packet(&mut self, chain: &Chain, poll: &mut Poll<'_>) {
        let mut bytes = [0; HEADER_LEN];
        if chain.readable.read(self.tx.mem(), 0, &mut bytes) < HEADER_LEN {
            return self.refuse("packet without a whole header");
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.guest_cid {
            return self.refuse("packet from a foreign address");
        }
        let port = header.dst_port;
        let to_host = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let known = self.connections.get_mut(&port).filter(|c| {
            to_host
                && c.guest_port == header.src_port
                && !matches!(c.phase, Phase::Handshake { .. })
        });
        let Some(connection) = known else {
            // Also every request of the guest's: no service of the host listens. An RST is never
            // answered with an RST.
            if header.op != op::RST {
                self.reply_reset(header.dst_cid, port, header.src_port);
                self.refuse("packet for no connection");
            }
            return;
        };
        connection.outgoing.heard(header.buf_alloc, header.fwd_cnt);
        if let Err(why) = self.obey(&header, chain, poll) {
            self.refuse(why);
            self.abort(port, poll);
        }
        self.stand_in_line(port);
    }

    /// Carries out a packet for a connection that exists; an error ends the connection.
    fn obey(
        &mut self,
        header: &Header,
        chain: &Chain,
        poll: &mut Poll<'_>,
    ) -> Result<(), &'static str> {
        let port = header.dst_port;
        let Some(connection) = self.connections.get_mut(&port) else { return Ok(()) };
        match (header.op, &connection.phase) {
            (op::RESPONSE, Phase::Requested { .. }) if connection.request_sent => {
                if let Some(until) = connection.until() {
                    self.deadlines.remove(&(until, port));
                }
                // A client that left meanwhile shows in its next event.
                connection.open().or(Err("client does not take its answer"))?;
                self.counters.operation(0);
            }
            (op::RST, Phase::Open) if !connection.written_out() => self.enter(port, Phase::Linger),
            (op::RST, _) => self.remove(port, poll),
            (op::RW, Phase::Open | Phase::Closing { .. }) => {
                let len = header.len as usize;
                if len > chain.readable.len() - HEADER_LEN {
                    return Err("packet shorter than it says");
                }
                if connection.guest_finished_sending() {
                    return Err("data after the end of data");
                }
                if !connection.incoming.receive(header.len) {
                    return Err("data beyond the guest's credit");
                }
                // Credit is at most BUFFER, which is what the scratch space holds.
                let data = &mut self.scratch[..len];
                if chain.readable.read(self.tx.mem(), HEADER_LEN, data) < len {
                    return Err("data outside guest memory");
                }
                connection.deliver(data);
                self.counters.operation(u64::from(header.len));
            }
            (op::SHUTDOWN, Phase::Open | Phase::Closing { .. }) => {
                if connection.guest_shut(header.flags) {
                    let (guest_port, done) = (connection.guest_port, connection.written_out());
                    if done {
                        self.remove(port, poll);
                    } else {
                        self.enter(port, Phase::Linger);
                    }
                    self.reply_reset(HOST_CID, port, guest_port);
                }
            }
            (op::CREDIT_UPDATE, Phase::Open | Phase::Closing { .. }) => {}
            (op::CREDIT_REQUEST, Phase::Open | Phase::Closing { .. }) => {
                connection.update_asked = true;
            }
            // The guest has given it up: as if it did not exist.
            (_, Phase::Linger) => self.reply_reset(HOST_CID, port, header.src_port),
            _ => return Err("packet that the connection's state does not allow"),
        }
        Ok(())
    }

    fn refuse(&mut self, why: &'static str) {
        self.counters.error();
        guest_warn!(self.limit, why, "vsock packet refused");
    }

    fn reply_reset(&mut self, src_cid: u64, src_port: u32, dst_port: u32) {
        if self.replies.len() >= MAX_REPLIES {
            self.counters.error();
            return;
        }
        self.replies.push_back(Header {
            src_cid,
            dst_cid: self.guest_cid,
            src_port,
            dst_port,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        });
    }
}

/// To the guest.
impl VsockEngine {
    fn stand_in_line(&mut self, port: u32) {
        if let Some(connection) = self.connections.get_mut(&port)
            && !connection.in_line
            && connection.want().is_some()
        {
            connection.in_line = true;
            self.line.push_back(port);
        }
    }

    /// Sends as long as there is something to send and a buffer for it.
    fn fill_buffers(&mut self, poll: &mut Poll<'_>) {
        let mut more = true;
        for _ in 0..BUDGET {
            if self.replies.is_empty() && self.line.is_empty() {
                more = false;
                break;
            }
            self.rx.disable_kicks();
            let Some(chain) = self.rx.pop() else {
                // The guest kicks when it has buffers again.
                more = self.rx.enable_kicks();
                if more {
                    continue;
                }
                break;
            };
            let space = chain.writable.len().saturating_sub(HEADER_LEN);
            if space == 0 {
                self.refuse("receive buffer too small for any data");
                self.rx.push(chain.head, 0);
                continue;
            }
            let Some(header) = self.next_packet(space) else {
                self.rx.unpop();
                more = false;
                break;
            };
            let mem = self.rx.mem();
            let len = header.len as usize;
            let written = chain.writable.write(mem, 0, &header.bytes())
                + chain.writable.write(mem, HEADER_LEN, &self.scratch[..len]);
            self.rx.push(chain.head, written as u32);
        }
        self.rx.announce();
        if more {
            poll.again(RX);
        }
    }

    /// The next packet; its data stands in the scratch space.
    fn next_packet(&mut self, space: usize) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(port) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&port) else { continue };
            connection.in_line = false;
            let (op, flags, len) = match connection.want() {
                None => continue,
                Some(Want::Control { op, flags }) => {
                    connection.control_sent(op, flags);
                    (op, flags, 0)
                }
                Some(Want::Data { limit }) => {
                    let limit = limit.min(space).min(MAX_PAYLOAD);
                    let len = connection.read(&mut self.scratch[..limit]);
                    if len == 0 {
                        self.stand_in_line(port);
                        continue;
                    }
                    connection.outgoing.sent(len as u32);
                    self.counters.operation(len as u64);
                    (op::RW, 0, len)
                }
            };
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: port,
                dst_port: connection.guest_port,
                len: len as u32,
                kind: TYPE_STREAM,
                op,
                flags,
                buf_alloc: connection.incoming.alloc(),
                fwd_cnt: connection.incoming.tell(),
            };
            if matches!(connection.phase, Phase::Open) && connection.fully_shut_by_us() {
                self.enter(port, Phase::Closing { until: Instant::now() + CLOSE_LIMIT });
            }
            self.stand_in_line(port);
            return Some(header);
        }
        None
    }
}
