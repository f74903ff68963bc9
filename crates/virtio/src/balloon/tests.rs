use std::fs::File;
use std::os::linux::fs::MetadataExt;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::engine::{MAX_BYTES, MAX_RANGES};
use super::*;
use crate::discard::PAGE;
use crate::mem::{BLOCK, Mem};
use crate::mock::{MockInterrupt, MockQueue, Runner, activation, queues};

/// Size of the area at address 0 for rings and indirect tables.
const RINGS: u64 = 2 << 20;
const RAM: u64 = 256 << 20;
/// Start of the hotplug region.
const HOTPLUG: u64 = 1 << 32;
const BLOCKS: u64 = 8;
const REPORTING: usize = 2;

/// Guest memory: RAM, and a hotplug region with a file of its own.
struct Rig {
    mem: Arc<GuestMemoryMmap>,
    ram: File,
    hotplug: File,
    memory: Mem,
    memory_queues: Vec<MockQueue>,
    memory_runner: Runner,
    device: Balloon,
    queues: Vec<MockQueue>,
    interrupt: Arc<MockInterrupt>,
    runner: Runner,
}

fn file(size: u64) -> File {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

fn bytes(file: &File) -> u64 {
    file.metadata().unwrap().st_blocks() * 512
}

impl Rig {
    fn new() -> Self {
        let (ram, hotplug) = (file(RAM), file(BLOCKS * BLOCK));
        let backing = |file: &File| Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let ranges = [
            (GuestAddress(0), RAM as usize, backing(&ram)),
            (GuestAddress(HOTPLUG), (BLOCKS * BLOCK) as usize, backing(&hotplug)),
        ];
        let mem = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
        let interrupt = Arc::new(MockInterrupt::default());
        let mut memory = Mem::new(&mem, HOTPLUG..HOTPLUG + BLOCKS * BLOCK).unwrap();
        let memory_queues = queues(&mem, RINGS / 2, memory.queue_sizes());
        let made = activation(&memory, &memory_queues, interrupt.clone(), memory.features());
        let memory_runner = Runner::start(memory.activate(made).unwrap()).unwrap();
        let mut device = Balloon::new(Some(memory.resize_handle()));
        let queues = queues(&mem, 0x1000, device.queue_sizes());
        let made = activation(&device, &queues, interrupt.clone(), device.features());
        let runner = Runner::start(device.activate(made).unwrap()).unwrap();
        let mut rig = Self {
            mem,
            ram,
            hotplug,
            memory,
            memory_queues,
            memory_runner,
            device,
            queues,
            interrupt,
            runner,
        };
        // Allocates the pages of the queues now, so that later counts do not change.
        rig.touch_kept(0, RINGS);
        assert!(rig.runner.settle(10));
        rig
    }

    /// Plugs the first blocks of the hotplug region, as the guest's driver does.
    fn plug(&mut self, blocks: u64) {
        self.memory.resize_handle().request(blocks * BLOCK, blocks * BLOCK).unwrap();
        let (request, response) = (RINGS - 0x2000, RINGS - 0x1000);
        let mut bytes = [0; 24];
        bytes[8..16].copy_from_slice(&HOTPLUG.to_le_bytes());
        bytes[16..18].copy_from_slice(&(blocks as u16).to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(request)).unwrap();
        self.memory_queues[0].add(&[(request, 24)], &[(response, 10)]);
        self.memory_queues[0].kick();
        assert!(self.memory_runner.settle(10));
        assert_eq!(self.memory.resize_handle().plugged(), blocks * BLOCK);
    }

    /// Writes to each page, so that the host allocates it.
    fn touch(&self, addr: u64, len: u64) {
        for page in 0..len / PAGE {
            self.mem.write_obj(7u8, GuestAddress(addr + page * PAGE)).unwrap();
        }
    }

    /// Like [`Self::touch`], without changing the contents.
    fn touch_kept(&self, addr: u64, len: u64) {
        for page in 0..len / PAGE {
            let addr = GuestAddress(addr + page * PAGE);
            let byte: u8 = self.mem.read_obj(addr).unwrap();
            self.mem.write_obj(byte, addr).unwrap();
        }
    }

    /// Reports ranges with one request, as Linux does.
    fn send(&mut self, ranges: &[(u64, u32)]) {
        if ranges.len() > self.queues[REPORTING].room() {
            self.queues[REPORTING].add_indirect(RINGS / 2 + 0x10000, &[], ranges);
        } else {
            self.queues[REPORTING].add(&[], ranges);
        }
        self.queues[REPORTING].kick();
    }

    fn report(&mut self, ranges: &[(u64, u32)]) {
        self.send(ranges);
        assert!(self.runner.settle(1000));
        assert_eq!(self.queues[REPORTING].used().unwrap().1, 0);
        assert!(self.queues[REPORTING].used().is_none());
    }

    fn errors(&self) -> u64 {
        self.device.counters().errors()
    }
}

#[test]
fn reported_pages_are_freed_and_read_as_zeroes() {
    let mut rig = Rig::new();
    let block = BLOCK as u32;
    rig.touch(64 << 20, 64 * BLOCK);
    let before = bytes(&rig.ram);
    // As Linux does: 32 blocks per report, unordered.
    let ranges: Vec<_> = (0..32).rev().map(|n| ((64 << 20) + 2 * n * BLOCK, block)).collect();
    rig.report(&ranges);
    assert_eq!(before - bytes(&rig.ram), 32 * BLOCK);
    let read = |addr| rig.mem.read_obj::<u8>(GuestAddress(addr)).unwrap();
    assert_eq!((read(64 << 20), read((64 << 20) + BLOCK)), (0, 7));
    let counters = rig.device.counters();
    assert_eq!((counters.operations(), counters.bytes(), counters.errors()), (32, 32 * BLOCK, 0));
    assert!(rig.interrupt.queues.load(std::sync::atomic::Ordering::Relaxed) > 0);
}

#[test]
fn adjacent_and_overlapping_ranges_are_freed_as_one() {
    let mut rig = Rig::new();
    let (addr, page) = (64 << 20, PAGE as u32);
    rig.touch(addr, 16 * PAGE);
    let before = bytes(&rig.ram);
    rig.report(&[(addr + PAGE, page), (addr, page), (addr + PAGE, 2 * page), (addr + PAGE, page)]);
    assert_eq!(before - bytes(&rig.ram), 3 * PAGE);
    assert_eq!(rig.device.counters().operations(), 1);
}

#[test]
fn only_whole_pages_of_a_report_are_freed() {
    let mut rig = Rig::new();
    let addr = 64 << 20;
    rig.touch(addr, 16 * PAGE);
    let before = bytes(&rig.ram);
    rig.report(&[(addr + 1, 3 * PAGE as u32 - 2)]);
    assert_eq!(before - bytes(&rig.ram), PAGE);
    rig.report(&[(addr + 8 * PAGE + 1, 2 * PAGE as u32 - 2), (addr + 12 * PAGE, 100)]);
    assert_eq!(before - bytes(&rig.ram), PAGE, "no whole page");
    assert_eq!(rig.errors(), 1);
}

#[test]
fn a_report_with_blocks_that_are_not_plugged_frees_nothing() {
    let mut rig = Rig::new();
    let block = BLOCK as u32;
    rig.touch(64 << 20, BLOCK);
    // Allocated by the host although the guest has plugged only a part of it.
    rig.touch(HOTPLUG, BLOCKS * BLOCK);
    let before = bytes(&rig.ram) + bytes(&rig.hotplug);
    let all = |rig: &Rig| bytes(&rig.ram) + bytes(&rig.hotplug);
    rig.report(&[(64 << 20, block), (HOTPLUG, block)]);
    assert_eq!((all(&rig), rig.errors()), (before, 1), "nothing is plugged");
    rig.plug(2);
    for (n, addr) in [HOTPLUG + 2 * BLOCK, HOTPLUG + BLOCK + PAGE, HOTPLUG + (BLOCKS - 1) * BLOCK]
        .into_iter()
        .enumerate()
    {
        rig.report(&[(addr, block)]);
        assert_eq!((all(&rig), rig.errors()), (before, 2 + n as u64), "{addr:#x}");
    }
    rig.report(&[(HOTPLUG, 2 * block)]);
    assert_eq!((before - all(&rig), rig.errors()), (2 * BLOCK, 4));
}

#[test]
fn a_report_outside_memory_frees_nothing_and_the_next_one_is_handled() {
    let mut rig = Rig::new();
    let block = BLOCK as u32;
    rig.touch(64 << 20, BLOCK);
    let before = bytes(&rig.ram);
    // The hole, its edges, the end of the address space, the local APIC.
    let outside = [
        RAM,
        RAM - PAGE,
        2 << 30,
        HOTPLUG - PAGE,
        HOTPLUG + BLOCKS * BLOCK,
        0xfee0_0000,
        u64::MAX - PAGE,
    ];
    for addr in outside {
        rig.report(&[(64 << 20, block), (addr, block)]);
    }
    assert_eq!(bytes(&rig.ram), before);
    assert_eq!(rig.errors(), outside.len() as u64);
    // A device-readable buffer only.
    rig.queues[REPORTING].add(&[(64 << 20, block)], &[]);
    rig.queues[REPORTING].kick();
    assert!(rig.runner.settle(10));
    assert_eq!(rig.queues[REPORTING].used().unwrap().1, 0);
    assert_eq!((bytes(&rig.ram), rig.errors()), (before, outside.len() as u64 + 1));
    rig.report(&[(64 << 20, block)]);
    assert_eq!(before - bytes(&rig.ram), BLOCK);
    assert!(!rig.interrupt.reset_wanted.load(std::sync::atomic::Ordering::Relaxed));
}

#[test]
fn a_large_report_is_handled_in_rounds_and_continues_after_a_pause() {
    let mut rig = Rig::new();
    let (addr, size) = (32 << 20, RAM - (32 << 20));
    assert!(size > 2 * MAX_BYTES);
    rig.touch(addr, size);
    let before = bytes(&rig.ram);
    rig.send(&[(addr, size as u32)]);
    rig.runner.round(Duration::ZERO);
    assert_eq!(before - bytes(&rig.ram), MAX_BYTES, "one round");
    assert!(rig.queues[REPORTING].used().is_none(), "returned before it was complete");
    rig.runner.engine().drain();
    assert!(rig.runner.engine().drained());
    rig.runner.resume();
    assert!(rig.runner.settle(100));
    assert!(rig.queues[REPORTING].used().is_some());
    assert_eq!(before - bytes(&rig.ram), size);
}

#[test]
fn many_small_ranges_are_handled_in_rounds() {
    let mut rig = Rig::new();
    let addr = 64 << 20;
    let count = 4 * MAX_RANGES as u64;
    rig.touch(addr, 2 * count * PAGE);
    let before = bytes(&rig.ram);
    let ranges: Vec<_> = (0..count).map(|n| (addr + 2 * n * PAGE, PAGE as u32)).collect();
    rig.send(&ranges);
    rig.runner.round(Duration::ZERO);
    assert_eq!(before - bytes(&rig.ram), MAX_RANGES as u64 * PAGE);
    assert!(rig.runner.settle(100));
    assert_eq!(before - bytes(&rig.ram), count * PAGE);
}

#[test]
fn inflate_and_deflate_requests_are_returned_without_effect() {
    let mut rig = Rig::new();
    rig.touch(64 << 20, BLOCK);
    let before = bytes(&rig.ram);
    for queue in 0..REPORTING {
        // 32-bit page numbers (section 5.5.6).
        rig.queues[queue].add(&[(64 << 20, 1024)], &[]);
        rig.queues[queue].kick();
        assert!(rig.runner.settle(10));
        assert_eq!(rig.queues[queue].used().unwrap().1, 0);
    }
    assert_eq!((bytes(&rig.ram), rig.errors()), (before, 2));
}

#[test]
fn the_configuration_asks_for_no_pages() {
    let device = Balloon::new(None);
    let mut config = [0; 16];
    device.read_config(0, &mut config);
    assert_eq!(config, [0; 16]);
    assert_eq!(device.features() & 0x3f, F_REPORTING);
}
