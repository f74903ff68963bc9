//! Handles plug and unplug requests one at a time. Freeing memory takes long (the kernel works page
//! by page), so a round frees a limited number of blocks, and other devices of the worker are
//! served in between.

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

/// Requests processed per round.
const BUDGET: usize = 16;
/// Blocks freed per round: 64 MiB.
const MAX_BLOCKS: usize = 32;

const REQUESTS: u32 = 0;
const RESIZED: u32 = 1;

pub(super) struct MemEngine {
    queue: VirtQueue,
    interrupt: Arc<dyn Interrupt>,
    control: Arc<Control>,
    counters: Arc<DeviceCounters>,
    /// The unplug request in progress. It continues after a pause; after a reset the blocks
    /// unplugged so far stay unplugged.
    unplugging: Option<Unplugging>,
}

struct Unplugging {
    chain: Chain,
    blocks: Range<usize>,
}

/// The outcome of parsing a request.
enum Outcome {
    Answer(Response, u16),
    Unplug(Range<usize>),
    /// Shorter than a request, or without space for the response.
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

    /// Processes requests until the budget is spent; `true` when more may be available.
    fn serve(&mut self) -> bool {
        self.queue.disable_kicks();
        for _ in 0..BUDGET {
            if self.unplugging.is_some() {
                // The rest follows in a later round.
                if self.unplug_some() {
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
            match self.handle_request(&chain) {
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

    fn handle_request(&mut self, chain: &Chain) -> Outcome {
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
                .check_unplug(addr, count)
                .map_or(Outcome::Answer(Response::Error, 0), Outcome::Unplug),
            request::UNPLUG_ALL => Outcome::Unplug(0..state.usable_blocks()),
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

    /// Frees the next [`MAX_BLOCKS`] blocks of the unplug request; `true` if more are left.
    fn unplug_some(&mut self) -> bool {
        let Some(Unplugging { chain, blocks }) = self.unplugging.take() else { return false };
        let end = blocks.end.min(blocks.start + MAX_BLOCKS);
        let response = match self.discard_blocks(blocks.start..end) {
            Ok(()) => {
                let bytes = (end - blocks.start) as u64 * BLOCK;
                self.counters.operation(bytes);
                self.control.state().set_unplugged(blocks.start..end);
                if end < blocks.end {
                    self.unplugging = Some(Unplugging { chain, blocks: end..blocks.end });
                    return true;
                }
                Response::Ack
            }
            Err(error) => {
                guest_warn!(self.counters.limit, %error, "cannot free unplugged memory");
                Response::Error
            }
        };
        self.answer(&chain, response, 0);
        false
    }

    fn discard_blocks(&self, blocks: Range<usize>) -> Result<(), DiscardError> {
        let part = self.control.state().addresses(blocks);
        discard(&self.control.mem, part)
    }
}

impl Engine for MemEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.queue.kick_fd(), REQUESTS, EventSet::IN)?;
        poll.add(self.control.resized.as_raw_fd(), RESIZED, EventSet::IN)?;
        poll.reschedule(REQUESTS);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token == RESIZED {
            // A resize before activation causes one unneeded configuration interrupt.
            if self.control.resized.read().is_ok() {
                self.interrupt.config();
            }
            return;
        }
        self.queue.clear_kick();
        if self.serve() {
            poll.reschedule(REQUESTS);
        }
        self.queue.signal_used();
    }

    fn resume(&mut self, poll: &mut Poll<'_>) {
        poll.reschedule(REQUESTS);
    }
}
