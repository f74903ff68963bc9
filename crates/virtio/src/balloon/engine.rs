//! Handles free page reports one at a time. The driver does not use the reported pages until the
//! report is returned. Freeing takes long (the kernel works page by page), so a round frees a
//! limited number of bytes and ranges, and other devices of the worker are served in between.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::Arc;

use vmm_sys_util::epoll::EventSet;

use crate::chain::Chain;
use crate::device::{DeviceCounters, Engine, Poll};
use crate::discard::{PAGE, discard};
use crate::guest_warn;
use crate::mem::ResizeHandle;
use crate::queue::VirtQueue;

/// Chains processed per round.
const BUDGET: usize = 16;
/// Bytes freed per round.
pub(super) const MAX_BYTES: u64 = 64 << 20;
/// Ranges freed per round.
/// Attack: reports of as many single pages as a chain can hold, each of which costs a system call
/// and a TLB flush of the guest.
pub(super) const MAX_RANGES: usize = 64;

const REPORTS: u32 = 0;
const INFLATE_DEFLATE: u32 = 1;

pub(super) struct BalloonEngine {
    inflate_deflate: [VirtQueue; 2],
    reporting: VirtQueue,
    hotplug: Option<ResizeHandle>,
    counters: Arc<DeviceCounters>,
    /// The report in progress. It continues after a pause; after a reset its remaining ranges are
    /// not freed.
    report: Option<Report>,
}

struct Report {
    head: u16,
    /// Page-aligned ranges of guest memory that are not freed yet; sorted, disjoint.
    left: VecDeque<Range<u64>>,
}

impl BalloonEngine {
    pub(super) fn new(
        inflate_deflate: [VirtQueue; 2],
        reporting: VirtQueue,
        hotplug: Option<ResizeHandle>,
        counters: Arc<DeviceCounters>,
    ) -> Self {
        Self { inflate_deflate, reporting, hotplug, counters, report: None }
    }

    /// Processes reports until the budget is spent; `true` when more may be available.
    fn serve(&mut self) -> bool {
        self.reporting.disable_kicks();
        let (mut bytes, mut pieces) = (MAX_BYTES, MAX_RANGES);
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
                    discard_range(&self.reporting, &self.counters, part);
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

    /// The whole pages of a report, sorted and merged; none if a range of it is not plugged or if
    /// there is no whole page.
    ///
    /// Attack: a report of memory that was never granted, so that the host works on memory that is
    /// not the guest's. [`Chain::read`] has checked that the ranges lie in guest memory.
    fn ranges(&self, chain: &Chain) -> Option<VecDeque<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for (addr, len) in chain.writable.segments() {
            // The range lies in guest memory, so the sums do not overflow.
            let part = addr.next_multiple_of(PAGE)..(addr + len) / PAGE * PAGE;
            if part.is_empty() {
                continue;
            }
            if self.hotplug.as_ref().is_some_and(|hotplug| !hotplug.is_plugged(&part)) {
                guest_warn!(
                    self.counters.limit,
                    ?part,
                    "free page report of memory that is not plugged"
                );
                return None;
            }
            found.push(part);
        }
        if found.is_empty() {
            return None;
        }
        found.sort_unstable_by_key(|part| part.start);
        let mut merged: VecDeque<Range<u64>> = VecDeque::new();
        for part in found {
            match merged.back_mut() {
                Some(last) if part.start <= last.end => last.end = last.end.max(part.end),
                _ => merged.push_back(part),
            }
        }
        Some(merged)
    }
}

fn discard_range(queue: &VirtQueue, counters: &DeviceCounters, part: Range<u64>) {
    let bytes = part.end - part.start;
    match discard(queue.mem(), part) {
        Ok(()) => counters.operation(bytes),
        Err(error) => {
            counters.error();
            guest_warn!(counters.limit, %error, "cannot free reported pages");
        }
    }
}

impl Engine for BalloonEngine {
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()> {
        poll.add(self.reporting.kick_fd(), REPORTS, EventSet::IN)?;
        for queue in &self.inflate_deflate {
            poll.add(queue.kick_fd(), INFLATE_DEFLATE, EventSet::IN)?;
        }
        poll.reschedule(REPORTS);
        poll.reschedule(INFLATE_DEFLATE);
        Ok(())
    }

    fn handle(&mut self, token: u32, _events: EventSet, poll: &mut Poll<'_>) {
        if token == REPORTS {
            self.reporting.clear_kick();
            if self.serve() {
                poll.reschedule(REPORTS);
            }
            self.reporting.signal_used();
            return;
        }
        for queue in &mut self.inflate_deflate {
            queue.clear_kick();
            let counters = &self.counters;
            // The device never asks for pages, so nothing is expected in these queues.
            let return_chain = |_: &Chain| {
                counters.error();
                0
            };
            if queue.serve(BUDGET, return_chain) {
                poll.reschedule(INFLATE_DEFLATE);
            }
        }
    }

    fn resume(&mut self, poll: &mut Poll<'_>) {
        poll.reschedule(REPORTS);
    }
}
