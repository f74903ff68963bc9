//! The driver's reports, one after the other. A report lends its pages to the device: the driver
//! uses none of them until it is handed back. Freeing takes time (the kernel does it page by page),
//! so it is done in pieces, between which other devices have their turn.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::chain::Chain;
use crate::device::{DeviceCounters, Engine, Poll};
use crate::discard::{PAGE, discard};
use crate::guest_warn;
use crate::mem::Resize;
use crate::queue::VirtQueue;

/// Chains handed back before other devices get their turn.
const BUDGET: usize = 16;
/// Bytes given back before other devices get their turn.
pub(super) const PIECE: u64 = 64 << 20;
/// Ranges given back before other devices get their turn.
/// Attack: reports of as many single pages as a chain can hold, each of which costs a system call
/// and has KVM flush the guest's address translations.
pub(super) const PIECES: usize = 64;

const REPORTS: u32 = 0;
const UNUSED: u32 = 1;

pub(super) struct BalloonEngine {
    unused: [VirtQueue; 2],
    reporting: VirtQueue,
    room: Option<Resize>,
    counters: Arc<DeviceCounters>,
    /// The report that is being carried out. After a pause it goes on; a driver that resets the
    /// device meanwhile keeps what is left of it.
    report: Option<Report>,
}

struct Report {
    head: u16,
    /// Whole pages of the guest's, apart from each other.
    left: VecDeque<Range<u64>>,
}

impl BalloonEngine {
    pub(super) fn new(
        unused: [VirtQueue; 2],
        reporting: VirtQueue,
        room: Option<Resize>,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        Self { unused, reporting, room, counters, report: None }
    }

    /// Serves until the budget is spent; `true` when there is (or may be) more to do.
    fn serve(&mut self) -> bool {
        self.reporting.disable_kicks();
        let (mut bytes, mut pieces) = (PIECE, PIECES);
        for _ in 0..BUDGET {
            if let Some(report) = &mut self.report {
                while let Some(next) = report.left.front_mut() {
                    if bytes == 0 || pieces == 0 {
                        return true;
                    }
                    let end = next.end.min(next.start + bytes);
                    let part = next.start..end;
                    next.start = end;
                    if next.is_empty() {
                        report.left.pop_front();
                    }
                    bytes -= part.end - part.start;
                    pieces -= 1;
                    give_back(&self.reporting, &self.counters, part);
                }
                self.reporting.push(report.head, 0);
                self.report = None;
            }
            let Some(chain) = self.reporting.pop() else {
                if self.reporting.enable_kicks() {
                    continue;
                }
                return false;
            };
            let left = self.ranges(&chain);
            if left.is_none() {
                self.counters.error();
            }
            self.report = Some(Report { head: chain.head, left: left.unwrap_or_default() });
        }
        true
    }

    /// The whole pages of a report, in order and joined; none if a part of it must not be given back.
    ///
    /// Attack: a report of memory that was never granted, to have the host work on what is not the
    /// guest's. That it lies in guest memory at all is known of every chain.
    fn ranges(&self, chain: &Chain) -> Option<VecDeque<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for (addr, len) in chain.writable.segments() {
            // Both lie in guest memory, so the sums are far from the end of all addresses.
            let part = addr.next_multiple_of(PAGE)..(addr + len) / PAGE * PAGE;
            if part.is_empty() {
                continue;
            }
            if self.room.as_ref().is_some_and(|room| !room.has(&part)) {
                guest_warn!(self.counters.limit, ?part, "report of memory that is not plugged");
                return None;
            }
            found.push(part);
        }
        if found.is_empty() {
            return None;
        }
        found.sort_unstable_by_key(|part| part.start);
        let mut joined: VecDeque<Range<u64>> = VecDeque::new();
        for part in found {
            match joined.back_mut() {
                Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
                _ => joined.push_back(part),
            }
        }
        Some(joined)
    }
}

fn give_back(queue: &VirtQueue, counters: &DeviceCounters, part: Range<u64>) {
    let bytes = part.end - part.start;
    match discard(queue.mem(), part) {
        Ok(()) => counters.operation(bytes),
        Err(error) => {
            counters.error();
            guest_warn!(counters.limit, %error, "free pages cannot be given back");
        }
    }
}

impl Engine for BalloonEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.reporting.kick_fd(), REPORTS, EventSet::IN)?;
        for queue in &self.unused {
            poll.add(queue.kick_fd(), UNUSED, EventSet::IN)?;
        }
        poll.again(REPORTS);
        poll.again(UNUSED);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token == REPORTS {
            self.reporting.clear_kick();
            if self.serve() {
                poll.again(REPORTS);
            }
            self.reporting.announce();
            return;
        }
        for queue in &mut self.unused {
            queue.clear_kick();
            let counters = &self.counters;
            // No page was asked for.
            let hand_back = |_: &Chain| {
                counters.error();
                0
            };
            if queue.serve(BUDGET, hand_back) {
                poll.again(UNUSED);
            }
        }
    }

    fn resume(&mut self, poll: &mut Poll<'_>) {
        poll.again(REPORTS);
    }
}
