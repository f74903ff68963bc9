//! The socket device's moving half: packets from the guest, connections from the host, and the line
//! of those that have something to send when the guest offers a buffer.
//!
//! Nothing here waits for a slow peer. What the guest sends fits the buffers it was promised; what
//! the host sends stays in its sockets until there is credit and a buffer for it.
//!
//! [`clients`]: the host's programs; [`inbound`]: packets from the guest; [`outbound`]: to it.

mod clients;
mod inbound;
mod outbound;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::time::Instant;

use vmm_sys_util::epoll::EventSet;

use super::connection::{BUFFER, Connection};
use super::spec::Header;
use crate::device::{DeviceCounters, Engine, Poll};
use crate::queue::VirtQueue;

/// Packets handled in one direction before other devices get their turn.
const BUDGET: usize = 64;

const RX: u32 = 0;
const TX: u32 = 1;
const EVENT: u32 = 2;
const LISTENER: u32 = 3;
/// Host ports serve as epoll tokens too.
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
