//! Which blocks of the region are plugged, and the sizes in the configuration (virtio 1.2, section
//! 5.15.5). Plain values: no I/O, no locks.

use std::ops::Range;

use super::BLOCK;
use super::spec::{CONFIG_LEN, Plugged, Response};

const BITS: usize = u64::BITS as usize;

/// The region and its blocks.
#[derive(Debug)]
pub(super) struct State {
    region: Range<u64>,
    /// `usable_region_size`: bytes from the region's start that may be plugged; only grows.
    usable: u64,
    /// `requested_size`, bytes.
    requested: u64,
    /// `plugged_size`, bytes.
    plugged: u64,
    /// One bit per block.
    map: Vec<u64>,
}

impl State {
    /// Nothing is plugged and nothing requested. The region's ends are multiples of [`BLOCK`].
    pub(super) fn new(region: Range<u64>) -> Self {
        let blocks = ((region.end - region.start) / BLOCK) as usize;
        let map = vec![0; blocks.div_ceil(BITS)];
        Self { region, usable: 0, requested: 0, plugged: 0, map }
    }

    pub(super) fn size(&self) -> u64 {
        self.region.end - self.region.start
    }

    pub(super) fn requested(&self) -> u64 {
        self.requested
    }

    pub(super) fn plugged(&self) -> u64 {
        self.plugged
    }

    /// Sets the requested bytes, and raises the usable bytes to at least `usable`.
    pub(super) fn resize(&mut self, bytes: u64, usable: u64) {
        self.requested = bytes;
        self.usable = self.usable.max(usable);
    }

    /// `struct virtio_mem_config`; there are no NUMA nodes.
    pub(super) fn config(&self) -> [u8; CONFIG_LEN] {
        let mut config = [0; CONFIG_LEN];
        let node = 0;
        let fields = [
            BLOCK,
            node,
            self.region.start,
            self.size(),
            self.usable,
            self.plugged,
            self.requested,
        ];
        for (place, field) in config.chunks_exact_mut(8).zip(fields) {
            place.copy_from_slice(&field.to_le_bytes());
        }
        config
    }

    /// Plugs `count` blocks at guest address `addr`.
    pub(super) fn plug(&mut self, addr: u64, count: u16) -> Response {
        let Some(blocks) = self.blocks(addr, count) else { return Response::Error };
        if blocks.clone().any(|block| self.has_block(block)) {
            return Response::Error;
        }
        let bytes = u64::from(count) * BLOCK;
        if self.plugged + bytes > self.requested {
            return Response::Nack;
        }
        for block in blocks {
            self.map[block / BITS] |= 1 << (block % BITS);
        }
        self.plugged += bytes;
        Response::Ack
    }

    /// The blocks of a request to unplug `count` at `addr`; none unless all of them are plugged.
    pub(super) fn check_unplug(&self, addr: u64, count: u16) -> Option<Range<usize>> {
        let blocks = self.blocks(addr, count)?;
        blocks.clone().all(|block| self.has_block(block)).then_some(blocks)
    }

    /// Guest addresses of these blocks.
    pub(super) fn addresses(&self, blocks: Range<usize>) -> Range<u64> {
        let addr = |block: usize| self.region.start + block as u64 * BLOCK;
        addr(blocks.start)..addr(blocks.end)
    }

    /// Number of usable blocks.
    pub(super) fn usable_blocks(&self) -> usize {
        (self.usable / BLOCK) as usize
    }

    /// Marks these blocks as unplugged, whatever they were before.
    pub(super) fn set_unplugged(&mut self, blocks: Range<usize>) {
        for block in blocks {
            if self.has_block(block) {
                self.map[block / BITS] &= !(1 << (block % BITS));
                self.plugged -= BLOCK;
            }
        }
    }

    /// Whether every block of the region that `part` touches is plugged; `part` may lie outside the
    /// region.
    pub(super) fn is_plugged(&self, part: &Range<u64>) -> bool {
        let (start, end) = (part.start.max(self.region.start), part.end.min(self.region.end));
        if start >= end {
            return true;
        }
        let block = |addr: u64| ((addr - self.region.start) / BLOCK) as usize;
        (block(start)..=block(end - 1)).all(|block| self.has_block(block))
    }

    /// State of a range; none if it is not in the usable part.
    pub(super) fn state(&self, addr: u64, count: u16) -> Option<Plugged> {
        let mut blocks = self.blocks(addr, count)?;
        let first = self.has_block(blocks.start);
        Some(match (blocks.all(|block| self.has_block(block) == first), first) {
            (true, true) => Plugged::All,
            (true, false) => Plugged::None,
            (false, _) => Plugged::Some,
        })
    }

    fn has_block(&self, block: usize) -> bool {
        self.map[block / BITS] >> (block % BITS) & 1 != 0
    }

    /// The blocks of a request; none if it is empty, misaligned or not in the usable part.
    /// Attack: addresses and counts whose sum overflows or lies outside the region.
    fn blocks(&self, addr: u64, count: u16) -> Option<Range<usize>> {
        let offset = addr.checked_sub(self.region.start)?;
        let end = offset.checked_add(u64::from(count) * BLOCK)?;
        let good = count > 0 && offset.is_multiple_of(BLOCK) && end <= self.usable;
        good.then_some((offset / BLOCK) as usize..(end / BLOCK) as usize)
    }
}
