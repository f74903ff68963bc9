//! The guest's requests, one after the other. Giving memory back takes time (the kernel frees page
//! by page), so it is done in pieces, between which other devices have their turn.

use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use super::spec::{REQUEST_LEN, RESPONSE_LEN, Response, request};
use super::{BLOCK, Control};
use crate::chain::Chain;
use crate::device::{DeviceCounters, Engine, Interrupt, Poll};
use crate::discard::{DiscardError, discard};
use crate::guest_warn;
use crate::queue::VirtQueue;

/// Requests served before other devices get their turn.
const BUDGET: usize = 16;
/// Blocks given back before other devices get their turn: 64 MiB.
const PIECE: usize = 32;

const REQUESTS: u32 = 0;
const RESIZED: u32 = 1;

pub(super) struct MemEngine {
    queue: VirtQueue,
    interrupt: Arc<dyn Interrupt>,
    control: Arc<Control>,
    counters: Arc<DeviceCounters>,
    /// The request whose memory is being given back. After a pause it goes on; a driver that resets
    /// the device meanwhile finds what was done until then.
    unplugging: Option<Unplugging>,
}

struct Unplugging {
    chain: Chain,
    blocks: Range<usize>,
}

/// What becomes of a request.
enum Outcome {
    Answer(Response, u16),
    Unplug(Range<usize>),
    /// Not a request, or no room for an answer.
    Malformed,
}

impl MemEngine {
    pub(super) fn new(
        queue: VirtQueue,
        interrupt: Arc<dyn Interrupt>,
        control: Arc<Control>,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        Self { queue, interrupt, control, counters, unplugging: None }
    }

    /// Serves until the budget is spent; `true` when there is (or may be) more to do.
    fn serve(&mut self) -> bool {
        self.queue.disable_kicks();
        for _ in 0..BUDGET {
            if self.unplugging.is_some() {
                // The rest in a later round.
                if self.unplug_piece() {
                    return true;
                }
                continue;
            }
            let Some(chain) = self.queue.pop() else {
                if self.queue.enable_kicks() {
                    continue;
                }
                return false;
            };
            match self.perform(&chain) {
                Outcome::Answer(response, state) => self.answer(&chain, response, state),
                Outcome::Unplug(blocks) => self.unplugging = Some(Unplugging { chain, blocks }),
                Outcome::Malformed => {
                    self.counters.error();
                    self.queue.push(chain.head, 0);
                }
            }
        }
        true
    }

    fn perform(&mut self, chain: &Chain) -> Outcome {
        let mut bytes = [0; REQUEST_LEN];
        let whole = chain.readable.read(self.queue.mem(), 0, &mut bytes) == REQUEST_LEN;
        if !whole || chain.writable.len() < RESPONSE_LEN {
            return Outcome::Malformed;
        }
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let addr = u64::from_le_bytes([8, 9, 10, 11, 12, 13, 14, 15].map(|at: usize| bytes[at]));
        let (kind, count) = (half(0), half(16));
        let mut state = self.control.state();
        match kind {
            request::PLUG => {
                let response = state.plug(addr, count);
                if response == Response::Ack {
                    self.counters.operation(u64::from(count) * BLOCK);
                }
                Outcome::Answer(response, 0)
            }
            request::UNPLUG => state
                .to_unplug(addr, count)
                .map_or(Outcome::Answer(Response::Error, 0), Outcome::Unplug),
            request::UNPLUG_ALL => Outcome::Unplug(0..state.end()),
            request::STATE => match state.state(addr, count) {
                Some(found) => Outcome::Answer(Response::Ack, found as u16),
                None => Outcome::Answer(Response::Error, 0),
            },
            _ => Outcome::Answer(Response::Error, 0),
        }
    }

    fn answer(&mut self, chain: &Chain, response: Response, state: u16) {
        if response == Response::Error {
            self.counters.error();
        }
        let mut bytes = [0; RESPONSE_LEN];
        bytes[..2].copy_from_slice(&(response as u16).to_le_bytes());
        bytes[8..].copy_from_slice(&state.to_le_bytes());
        let written = chain.writable.write(self.queue.mem(), 0, &bytes);
        self.queue.push(chain.head, written as u32);
    }

    /// Gives a piece of what is to be unplugged back to the host; `true` if more is left.
    fn unplug_piece(&mut self) -> bool {
        let Some(Unplugging { chain, blocks }) = self.unplugging.take() else { return false };
        let end = blocks.end.min(blocks.start + PIECE);
        let response = match self.give_back(blocks.start..end) {
            Ok(()) => {
                let bytes = (end - blocks.start) as u64 * BLOCK;
                self.counters.operation(bytes);
                self.control.state().unplugged(blocks.start..end);
                if end < blocks.end {
                    self.unplugging = Some(Unplugging { chain, blocks: end..blocks.end });
                    return true;
                }
                Response::Ack
            }
            Err(error) => {
                guest_warn!(self.counters.limit, %error, "memory cannot be given back");
                Response::Error
            }
        };
        self.answer(&chain, response, 0);
        false
    }

    fn give_back(&self, blocks: Range<usize>) -> Result<(), DiscardError> {
        let part = self.control.state().addresses(blocks);
        discard(&self.control.mem, part)
    }
}

impl Engine for MemEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), REQUESTS, EventSet::IN)?;
        poll.add(self.control.resized.as_raw_fd(), RESIZED, EventSet::IN)?;
        poll.again(REQUESTS);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token == RESIZED {
            // A wake-up from before the driver was there costs it a look at its configuration.
            if self.control.resized.read().is_ok() {
                self.interrupt.config();
            }
            return;
        }
        self.queue.clear_kick();
        if self.serve() {
            poll.again(REQUESTS);
        }
        self.queue.announce();
    }

    fn resume(&mut self, poll: &mut Poll<'_>) {
        poll.again(REQUESTS);
    }
}
