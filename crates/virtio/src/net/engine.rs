//! The network device's engine: moves packets between the tap and the queues.
//!
//! One packet waits here while the guest has no receive buffers; further packets wait in the tap's
//! queue, which drops packets when it is full.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::SetOffloads;
use super::spec::{F_MRG_RXBUF, HEADER_LEN, MAX_PACKET, MIN_FRAME, NUM_BUFFERS, tap_offloads};
use crate::chain::Chain;
use crate::device::{DeviceCounters, Engine, Poll};
use crate::guest_warn;
use crate::queue::VirtQueue;

/// Packets moved in one direction per call, so that other devices of the worker are served too.
const BUDGET: usize = 64;

const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;

pub(super) struct NetEngine {
    // Set at creation.
    features: u64,
    set_offloads: SetOffloads,
    // Connections to tap, queues and counters.
    tap: Arc<File>,
    rx: VirtQueue,
    tx: VirtQueue,
    counters: Arc<DeviceCounters>,
    // Runtime state.
    /// The tap may be readable; it is polled edge-triggered.
    readable: bool,
    /// The last packet from the tap; `waiting` is its length while it waits for receive buffers.
    packet: Vec<u8>,
    waiting: Option<usize>,
    /// Receive buffers taken from the queue for the next packet.
    chains: Vec<Chain>,
    iovecs: Vec<libc::iovec>,
}

#[allow(unsafe_code)] // raw pointers in iovecs
// SAFETY: `iovecs` is a buffer that is cleared before each use; its pointers are not used after a
// call.
unsafe impl Send for NetEngine {}

impl NetEngine {
    pub(super) fn new(
        features: u64,
        set_offloads: SetOffloads,
        tap: Arc<File>,
        [rx, tx]: [VirtQueue; 2],
        counters: Arc<DeviceCounters>,
    ) -> Self {
        Self {
            features,
            set_offloads,
            tap,
            rx,
            tx,
            counters,
            readable: true,
            packet: vec![0; MAX_PACKET],
            waiting: None,
            chains: Vec::new(),
            iovecs: Vec::new(),
        }
    }
}

impl Engine for NetEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        (self.set_offloads)(&self.tap, tap_offloads(self.features))?;
        poll.add(self.rx.kick_fd(), RX, EventSet::IN)?;
        poll.add(self.tx.kick_fd(), TX, EventSet::IN)?;
        poll.add(self.tap.as_raw_fd(), TAP, EventSet::IN | EventSet::EDGE_TRIGGERED)?;
        poll.reschedule(TX);
        poll.reschedule(RX);
        Ok(())
    }

    fn handle(&mut self, token: u32, events: EventSet, poll: &mut Poll<'_>) {
        match token {
            TX => self.transmit(poll),
            RX => {
                self.rx.clear_kick();
                self.receive(poll);
            }
            _ => {
                self.readable |= events.contains(EventSet::IN);
                self.receive(poll);
            }
        }
    }
}

impl NetEngine {
    /// Moves packets from the tap to the guest.
    fn receive(&mut self, poll: &mut Poll<'_>) {
        self.rx.disable_kicks();
        let mut more = true;
        for _ in 0..BUDGET {
            let Some(len) = self.waiting.or_else(|| self.read_tap()) else {
                more = false;
                break;
            };
            self.waiting = None;
            if !self.deliver(len) {
                self.waiting = Some(len);
                // The driver kicks when it adds buffers.
                more = self.rx.enable_kicks();
                if !more {
                    break;
                }
            }
        }
        self.rx.signal_used();
        if more {
            poll.reschedule(RX);
        }
    }

    fn read_tap(&mut self) -> Option<usize> {
        while self.readable {
            match (&*self.tap).read(&mut self.packet) {
                Ok(len) if len >= HEADER_LEN + MIN_FRAME => return Some(len),
                Ok(0) => self.readable = false,
                Ok(_) => self.counters.error(),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => {
                    if e.kind() != io::ErrorKind::WouldBlock {
                        // EBADFD while the interface is down; an event follows when it is up.
                        guest_warn!(self.counters.limit, error = %e, "cannot read from the tap");
                    }
                    self.readable = false;
                }
            }
        }
        None
    }

    /// Copies the packet into receive buffers; `false` when there are too few of them.
    fn deliver(&mut self, len: usize) -> bool {
        let mergeable = self.features & F_MRG_RXBUF != 0;
        let max_chains = if mergeable { usize::from(self.rx.size()) } else { 1 };
        let mut space: usize = self.chains.iter().map(|c| c.writable.len()).sum();
        while space < len && self.chains.len() < max_chains {
            let Some(chain) = self.rx.pop() else { return false };
            space += chain.writable.len();
            self.chains.push(chain);
        }
        if space < len {
            // Section 5.1.6.4: without MRG_RXBUF each buffer must hold a whole packet.
            let limit = &self.counters.limit;
            guest_warn!(limit, len, space, "receive buffers too small; packet dropped");
            self.counters.error();
            return true;
        }
        let count = self.chains.len() as u16;
        self.packet[NUM_BUFFERS..NUM_BUFFERS + 2].copy_from_slice(&count.to_le_bytes());
        let mut rest = &self.packet[..len];
        for chain in self.chains.drain(..) {
            let part = rest.len().min(chain.writable.len());
            let written = chain.writable.write(self.rx.mem(), 0, &rest[..part]);
            self.rx.push(chain.head, written as u32);
            rest = &rest[part..];
        }
        self.counters.operation((len - HEADER_LEN) as u64);
        true
    }

    /// Moves packets from the guest to the tap.
    fn transmit(&mut self, poll: &mut Poll<'_>) {
        self.tx.clear_kick();
        let mem = self.tx.mem().clone();
        let Self { tx, tap, counters, iovecs, .. } = self;
        let more = tx.serve(BUDGET, |chain| {
            let len = chain.readable.len();
            if !(HEADER_LEN + MIN_FRAME..=MAX_PACKET).contains(&len) {
                guest_warn!(counters.limit, len, "packet of invalid length dropped");
                counters.error();
                return 0;
            }
            // A tap takes a whole packet or none, and checks its header itself.
            match chain.readable.writev(&mem, tap.as_raw_fd(), iovecs) {
                Ok(done) if done == len => counters.operation((len - HEADER_LEN) as u64),
                Ok(_) => counters.error(),
                Err(error) => {
                    guest_warn!(counters.limit, %error, "cannot write a packet to the tap");
                    counters.error();
                }
            }
            0
        });
        if more {
            poll.reschedule(TX);
        }
    }
}
