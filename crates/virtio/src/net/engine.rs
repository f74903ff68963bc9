//! The network device's moving half.
//!
//! A packet that the guest has no buffers for waits here, and behind it everything else waits in
//! the tap's own queue, which drops what is too much, as a wire would.

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

/// Packets moved in one direction before other devices get their turn.
const BUDGET: usize = 64;

const RX: u32 = 0;
const TX: u32 = 1;
const TAP: u32 = 2;

pub(super) struct NetEngine {
    // Fixed.
    features: u64,
    set_offloads: SetOffloads,
    // Glue.
    tap: Arc<File>,
    rx: VirtQueue,
    tx: VirtQueue,
    counters: Arc<DeviceCounters>,
    // Volatile.
    /// The tap may have something (it is polled edge-triggered).
    readable: bool,
    /// A packet from the tap, and its length if there is one.
    packet: Vec<u8>,
    waiting: Option<usize>,
    /// Taken from the guest for the next packet.
    chains: Vec<Chain>,
    iovecs: Vec<libc::iovec>,
}

#[allow(unsafe_code)] // raw pointers in iovecs
// SAFETY: `iovecs` is scratch space, cleared before each use; nothing in it outlives a call.
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
        poll.again(TX);
        poll.again(RX);
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
    /// From the tap to the guest.
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
                // The guest kicks when it has buffers again.
                more = self.rx.enable_kicks();
                if !more {
                    break;
                }
            }
        }
        self.rx.announce();
        if more {
            poll.again(RX);
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
                        // EBADFD while the interface is down; an edge follows when it is up.
                        guest_warn!(self.counters.limit, error = %e, "tap cannot be read");
                    }
                    self.readable = false;
                }
            }
        }
        None
    }

    /// Copies the packet into the guest's buffers; `false` when there are not enough yet.
    fn deliver(&mut self, len: usize) -> bool {
        let mergeable = self.features & F_MRG_RXBUF != 0;
        let most = if mergeable { usize::from(self.rx.size()) } else { 1 };
        let mut room: usize = self.chains.iter().map(|c| c.writable.len()).sum();
        while room < len && self.chains.len() < most {
            let Some(chain) = self.rx.pop() else { return false };
            room += chain.writable.len();
            self.chains.push(chain);
        }
        if room < len {
            // Section 5.1.6.4: without merging each buffer must hold a whole packet.
            let limit = &self.counters.limit;
            guest_warn!(limit, len, room, "receive buffers too small; packet dropped");
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

    /// From the guest to the tap.
    fn transmit(&mut self, poll: &mut Poll<'_>) {
        self.tx.clear_kick();
        let mem = self.tx.mem().clone();
        let Self { tx, tap, counters, iovecs, .. } = self;
        let more = tx.serve(BUDGET, |chain| {
            let len = chain.readable.len();
            if !(HEADER_LEN + MIN_FRAME..=MAX_PACKET).contains(&len) {
                guest_warn!(counters.limit, len, "packet of impossible length dropped");
                counters.error();
                return 0;
            }
            // A tap takes a packet whole or not at all, and checks its header itself.
            match chain.readable.writev(&mem, tap.as_raw_fd(), iovecs) {
                Ok(done) if done == len => counters.operation((len - HEADER_LEN) as u64),
                Ok(_) => counters.error(),
                Err(error) => {
                    guest_warn!(counters.limit, %error, "packet dropped by the tap");
                    counters.error();
                }
            }
            0
        });
        if more {
            poll.again(TX);
        }
    }
}
