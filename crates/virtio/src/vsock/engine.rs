//! The socket device's engine: queues, connections, and the list of connections with a packet for
//! the guest.
//!
//! No call waits for a slow peer. Data from the guest fits the buffers announced to it; data from
//! the host stays in the client's socket until the guest has given credit and a receive buffer.
//!
//! [`clients`]: host clients; [`inbound`]: packets from the guest; [`outbound`]: packets to the
//! guest.

mod clients;
mod inbound;
mod outbound;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::connection::{BUFFER, Connection};
use super::spec::Header;
use crate::device::{DeviceCounters, Engine, Poll};
use crate::queue::VirtQueue;

/// Packets handled in one direction per call, so that other devices of the worker are served too.
const BUDGET: usize = 64;

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
const LISTENER: u32 = 3;
/// First host port. Host ports are also epoll tokens, so they lie above the tokens before.
const FIRST_PORT: u32 = 1 << 30;

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
    /// Set to the number of connections and waiting RST packets after each event.
    open: Arc<AtomicUsize>,
    // Volatile.
    connections: HashMap<u32, Connection>,
    /// Host ports of connections with a packet for the guest, each at most once, in order.
    rx_ready: VecDeque<u32>,
    /// RST packets for the guest.
    replies: VecDeque<Header>,
    deadlines: BTreeSet<(Instant, u32)>,
    next_port: u32,
    accepting: bool,
    accept_retry_at: Option<Instant>,
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
            open: Arc::default(),
            connections: HashMap::new(),
            rx_ready: VecDeque::new(),
            replies: VecDeque::new(),
            deadlines: BTreeSet::new(),
            next_port: FIRST_PORT,
            accepting: false,
            accept_retry_at: None,
            scratch: vec![0; BUFFER as usize],
        }
    }

    /// Reports the number of connections and waiting RST packets in `open`.
    pub(super) fn with_gauge(mut self, open: Arc<AtomicUsize>) -> Self {
        self.open = open;
        self
    }

    fn update_gauge(&self) {
        self.open.store(self.connections.len() + self.replies.len(), Ordering::Release);
    }
}

impl Engine for VsockEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.rx.kick_fd(), RX, EventSet::IN)?;
        poll.add(self.tx.kick_fd(), TX, EventSet::IN)?;
        poll.add(self.event.kick_fd(), EVENT, EventSet::IN)?;
        self.event.disable_kicks();
        self.resume_accepting(poll)?;
        poll.reschedule(TX);
        Ok(())
    }

    fn handle(&mut self, token: u32, events: EventSet, poll: &mut Poll<'_>) {
        match token {
            RX => self.rx.clear_kick(),
            TX => self.process_tx(poll),
            // Event buffers are never used: TRANSPORT_RESET (section 5.10.6.7) is for connections that
            // were open when a VM was saved, and only a VM without any can be saved.
            EVENT => self.event.clear_kick(),
            LISTENER => self.accept(poll),
            port => self.process_client(port, events, poll),
        }
        self.process_rx(poll);
        self.update_gauge();
    }

    fn deadline(&self) -> Option<Instant> {
        let first = self.deadlines.first().map(|(at, _)| *at);
        first.into_iter().chain(self.accept_retry_at).min()
    }

    fn tick(&mut self, now: Instant, poll: &mut Poll<'_>) {
        if self.accept_retry_at.is_some_and(|at| at <= now) {
            self.accept_retry_at = None;
            let _ = self.resume_accepting(poll);
        }
        while let Some((at, port)) = self.deadlines.first().copied()
            && at <= now
        {
            tracing::debug!(port, "vsock connection timed out");
            self.abort(port, poll);
        }
        self.process_rx(poll);
        self.update_gauge();
    }
}
