//! The network device's engine: moves packets between the tap and the queues.
//!
//! A packet from the tap is read straight into receive buffers if they hold any packet; otherwise it
//! is read into a buffer here and copied. One packet waits here while the guest has too few receive
//! buffers; further packets wait in the tap's queue, which drops packets when it is full.
//!
//! Transmit: the driver's notifications stay off until [`IDLE_ROUNDS`] rounds of the worker in a row
//! found no packet, so a driver that goes on sending does not notify.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vm_memory::GuestMemoryMmap;
use vmm_sys_util::epoll::EventSet;

use super::SetOffloads;
use super::spec::{F_MRG_RXBUF, HEADER_LEN, MAX_PACKET, MIN_FRAME, NUM_BUFFERS, tap_offloads};
use crate::chain::Chain;
use crate::device::{DeviceCounters, Engine, Poll};
use crate::guest_warn;
use crate::queue::VirtQueue;

/// Packets moved in one direction per call, so that other devices of the worker are served too.
const BUDGET: usize = 64;
/// Rounds without a packet to transmit until the driver has to notify again.
const IDLE_ROUNDS: u32 = 2;
/// Pieces of memory in one system call (`UIO_MAXIOV`).
const PIECES_MAX: usize = libc::UIO_MAXIOV as usize;

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
    /// Receive buffers taken from the queue for the next packets.
    held: Held,
    /// Scratch of [`Self::send`].
    iovecs: Vec<libc::iovec>,
    /// Rounds in a row without a packet to transmit, while the driver's notifications are off.
    idle_rounds: u32,
}

/// Receive buffers in the queue's order.
#[derive(Default)]
struct Held {
    /// With the number of their pieces.
    chains: Vec<(Chain, usize)>,
    /// The pieces of all chains.
    iovecs: Vec<libc::iovec>,
    /// Bytes in all chains.
    space: usize,
}

impl Held {
    fn push(&mut self, chain: Chain, mem: &GuestMemoryMmap) {
        let (len, before) = (chain.writable.len(), self.iovecs.len());
        chain.writable.iovecs(mem, len, &mut self.iovecs);
        self.space += len;
        self.chains.push((chain, self.iovecs.len() - before));
    }

    /// The first `count` chains.
    fn take(&mut self, count: usize) -> impl Iterator<Item = Chain> {
        let taken = &self.chains[..count];
        let pieces: usize = taken.iter().map(|(_, pieces)| pieces).sum();
        self.space -= taken.iter().map(|(chain, _)| chain.writable.len()).sum::<usize>();
        self.iovecs.drain(..pieces);
        self.chains.drain(..count).map(|(chain, _)| chain)
    }

    /// How many of the chains have `len` bytes together.
    fn needed(&self, len: usize) -> usize {
        let mut space = 0;
        let short = |(chain, _): &&(Chain, usize)| {
            let more = space < len;
            space += chain.writable.len();
            more
        };
        self.chains.iter().take_while(short).count()
    }

    /// Whether one system call can read any packet into them.
    fn fit_any_packet(&self) -> bool {
        let header_fits = self.chains.first().is_some_and(|(c, _)| c.writable.len() >= HEADER_LEN);
        header_fits && self.space >= MAX_PACKET && self.iovecs.len() <= PIECES_MAX
    }
}

#[allow(unsafe_code)] // raw pointers in iovecs
// SAFETY: `iovecs` is a buffer that is cleared before each use; its pointers are not used after a
// call. The pointers in `held` are to guest memory that `rx` keeps mapped, on any thread.
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
            held: Held::default(),
            iovecs: Vec::new(),
            idle_rounds: 0,
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
            TX => {
                // Without an event: a round that was asked for here, with notifications off.
                if events.contains(EventSet::IN) {
                    self.tx.clear_kick();
                }
                self.transmit(poll);
            }
            RX => {
                if events.contains(EventSet::IN) {
                    self.rx.clear_kick();
                }
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
            let packet = match self.waiting.take() {
                Some(len) => Some(Packet::Read(len)),
                None => self.read_tap(),
            };
            let Some(packet) = packet else {
                more = false;
                break;
            };
            let Packet::Read(len) = packet else { continue };
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

    /// Takes receive buffers from the queue until they have `space` bytes or more than `pieces`
    /// pieces; fewer if there are no more, or a packet must not be in so many. None if the queue is
    /// broken.
    fn hold(&mut self, space: usize, pieces: usize) {
        let mergeable = self.features & F_MRG_RXBUF != 0;
        let max_chains = if mergeable { usize::from(self.rx.size()) } else { 1 };
        let held = &mut self.held;
        while held.space < space && held.iovecs.len() <= pieces && held.chains.len() < max_chains {
            let Some(chain) = self.rx.pop() else { break };
            held.push(chain, self.rx.mem());
        }
        if self.rx.is_broken() {
            self.held = Held::default();
        }
    }

    fn read_tap(&mut self) -> Option<Packet> {
        while self.readable {
            self.hold(MAX_PACKET, PIECES_MAX);
            let direct = self.held.fit_any_packet();
            let read = if direct {
                readv(&self.tap, &self.held.iovecs)
            } else {
                (&*self.tap).read(&mut self.packet)
            };
            match read {
                Ok(len) if len >= HEADER_LEN + MIN_FRAME => {
                    if direct {
                        self.complete(len);
                        return Some(Packet::Done);
                    }
                    return Some(Packet::Read(len));
                }
                Ok(0) => self.readable = false,
                Ok(_) => {
                    self.counters.error();
                    return Some(Packet::Done);
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // The tap has dropped the packet; others may be in its queue.
                Err(e) if e.raw_os_error() == Some(libc::EFAULT) => {
                    guest_warn!(self.counters.limit, error = %e, "packet from the tap dropped");
                    self.counters.error();
                    return Some(Packet::Done);
                }
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

    /// Returns the receive buffers that a packet was read into.
    fn complete(&mut self, len: usize) {
        let Self { held, rx, .. } = self;
        let count = held.needed(len);
        if let Some((first, _)) = held.chains.first() {
            first.writable.write(rx.mem(), NUM_BUFFERS, &(count as u16).to_le_bytes());
        }
        let mut rest = len;
        rx.push_all(held.take(count).map(|chain| {
            let written = rest.min(chain.writable.len());
            rest -= written;
            (chain.head, written as u32)
        }));
        self.counters.operation((len - HEADER_LEN) as u64);
    }

    /// Copies the packet into receive buffers; `false` when there are too few of them.
    fn deliver(&mut self, len: usize) -> bool {
        self.hold(len, usize::MAX);
        let Self { held, rx, .. } = self;
        if held.space < len {
            let mergeable = self.features & F_MRG_RXBUF != 0;
            let max_chains = if mergeable { usize::from(rx.size()) } else { 1 };
            if held.chains.len() < max_chains {
                return false;
            }
            // Section 5.1.6.4: without MRG_RXBUF each buffer must hold a whole packet.
            let (limit, space) = (&self.counters.limit, held.space);
            guest_warn!(limit, len, space, "receive buffers too small; packet dropped");
            self.counters.error();
            return true;
        }
        let count = held.needed(len);
        self.packet[NUM_BUFFERS..NUM_BUFFERS + 2].copy_from_slice(&(count as u16).to_le_bytes());
        let mut rest = &self.packet[..len];
        let mem = rx.mem().clone();
        rx.push_all(held.take(count).map(|chain| {
            let part = rest.len().min(chain.writable.len());
            let written = chain.writable.write(&mem, 0, &rest[..part]);
            rest = &rest[part..];
            (chain.head, written as u32)
        }));
        self.counters.operation((len - HEADER_LEN) as u64);
        true
    }

    /// Moves packets from the guest to the tap.
    fn transmit(&mut self, poll: &mut Poll<'_>) {
        self.tx.disable_kicks();
        let mut count = 0;
        while count < BUDGET
            && let Some(chain) = self.tx.pop()
        {
            self.send(&chain);
            self.tx.push(chain.head, 0);
            count += 1;
        }
        self.tx.signal_used();
        self.idle_rounds = if count == 0 { self.idle_rounds + 1 } else { 0 };
        if self.idle_rounds < IDLE_ROUNDS {
            poll.reschedule(TX);
            return;
        }
        self.idle_rounds = 0;
        if self.tx.enable_kicks() {
            poll.reschedule(TX);
        }
    }

    fn send(&mut self, chain: &Chain) {
        let Self { tx, tap, counters, iovecs, .. } = self;
        let len = chain.readable.len();
        if !(HEADER_LEN + MIN_FRAME..=MAX_PACKET).contains(&len) {
            guest_warn!(counters.limit, len, "packet of invalid length dropped");
            counters.error();
            return;
        }
        // A tap takes a whole packet or none, and checks its header itself.
        match chain.readable.writev(tx.mem(), tap.as_raw_fd(), iovecs) {
            Ok(done) if done == len => counters.operation((len - HEADER_LEN) as u64),
            Ok(_) => counters.error(),
            Err(error) => {
                guest_warn!(counters.limit, %error, "cannot write a packet to the tap");
                counters.error();
            }
        }
    }
}

/// A packet that was read from the tap.
enum Packet {
    /// Into receive buffers, which were returned to the driver; or it was dropped.
    Done,
    /// So many bytes, to [`NetEngine::packet`].
    Read(usize),
}

/// One `readv`; `iovecs` are those of [`Held`].
#[allow(unsafe_code)] // readv into guest memory
fn readv(tap: &File, iovecs: &[libc::iovec]) -> io::Result<usize> {
    let count = iovecs.len().min(PIECES_MAX) as libc::c_int;
    // SAFETY: the iovecs point into guest memory that the receive queue keeps mapped, with lengths
    // checked against its regions by Buffer::iovecs.
    let len = unsafe { libc::readv(tap.as_raw_fd(), iovecs.as_ptr(), count) };
    usize::try_from(len).map_err(|_| io::Error::last_os_error())
}
