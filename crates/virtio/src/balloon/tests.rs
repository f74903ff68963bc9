use std::fs::File;
use std::os::linux::fs::MetadataExt;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::engine::{PIECE, PIECES};
use super::*;
use crate::discard::PAGE;
use crate::mem::{BLOCK, Mem};
use crate::mock::{MockInterrupt, MockQueue, Runner, activation, queues};

/// Rings and indirect tables.
const RINGS: u64 = 2 << 20;
const RAM: u64 = 256 << 20;
/// Room to grow, above a hole.
const ROOM: u64 = 1 << 32;
const BLOCKS: u64 = 8;
const REPORTING: usize = 2;

/// Guest memory as a VM has it: RAM, and room to grow with a file of its own.
struct Rig {
    mem: Arc<GuestMemoryMmap>,
    ram: File,
    room: File,
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
        let (ram, room) = (file(RAM), file(BLOCKS * BLOCK));
        let backing = |file: &File| Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let ranges = [
            (GuestAddress(0), RAM as usize, backing(&ram)),
            (GuestAddress(ROOM), (BLOCKS * BLOCK) as usize, backing(&room)),
        ];
        let mem = Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap());
        let interrupt = Arc::new(MockInterrupt::default());
        let mut memory = Mem::new(&mem, ROOM..ROOM + BLOCKS * BLOCK).unwrap();
        let memory_queues = queues(&mem, RINGS / 2, memory.queue_sizes());
        let made = activation(&memory, &memory_queues, interrupt.clone(), memory.features());
        let memory_runner = Runner::start(memory.activate(made).unwrap()).unwrap();
        let mut device = Balloon::new(Some(memory.resize()));
        let queues = queues(&mem, 0x1000, device.queue_sizes());
        let made = activation(&device, &queues, interrupt.clone(), device.features());
        let runner = Runner::start(device.activate(made).unwrap()).unwrap();
        let mut rig = Self {
            mem,
            ram,
            room,
            memory,
            memory_queues,
            memory_runner,
            device,
            queues,
            interrupt,
            runner,
        };
        // What the queues take of the file is not to change later.
        rig.touch_kept(0, RINGS);
        assert!(rig.runner.settle(10));
        rig
    }

    /// Plugs the first blocks of the room, as the guest's driver does.
    fn plug(&mut self, blocks: u64) {
        self.memory.resize().ask(blocks * BLOCK, blocks * BLOCK).unwrap();
        let (request, response) = (RINGS - 0x2000, RINGS - 0x1000);
        let mut bytes = [0; 24];
        bytes[8..16].copy_from_slice(&ROOM.to_le_bytes());
        bytes[16..18].copy_from_slice(&(blocks as u16).to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(request)).unwrap();
        self.memory_queues[0].add(&[(request, 24)], &[(response, 10)]);
        self.memory_queues[0].kick();
        assert!(self.memory_runner.settle(10));
        assert_eq!(self.memory.resize().plugged(), blocks * BLOCK);
    }

    /// Has the host hold memory.
    fn touch(&self, addr: u64, len: u64) {
        for page in 0..len / PAGE {
            self.mem.write_obj(7u8, GuestAddress(addr + page * PAGE)).unwrap();
        }
    }

    /// The same for memory that has its content already.
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
fn reported_pages_go_back_to_the_host_and_come_again_as_zeroes() {
    let mut rig = Rig::new();
    let block = BLOCK as u32;
    rig.touch(64 << 20, 64 * BLOCK);
    let before = bytes(&rig.ram);
    // As Linux does: 32 blocks a report, in no order.
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
fn neighbours_and_pages_that_are_named_twice_are_given_back_at_once() {
    let mut rig = Rig::new();
    let (addr, page) = (64 << 20, PAGE as u32);
    rig.touch(addr, 16 * PAGE);
    let before = bytes(&rig.ram);
    rig.report(&[(addr + PAGE, page), (addr, page), (addr + PAGE, 2 * page), (addr + PAGE, page)]);
    assert_eq!(before - bytes(&rig.ram), 3 * PAGE);
    assert_eq!(rig.device.counters().operations(), 1);
}

#[test]
fn only_pages_that_lie_in_a_report_as_a_whole_are_given_back() {
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
fn a_report_of_room_that_is_not_plugged_is_refused_as_a_whole() {
    let mut rig = Rig::new();
    let block = BLOCK as u32;
    rig.touch(64 << 20, BLOCK);
    // Held by the host although the guest has plugged only a part of it.
    rig.touch(ROOM, BLOCKS * BLOCK);
    let before = bytes(&rig.ram) + bytes(&rig.room);
    let all = |rig: &Rig| bytes(&rig.ram) + bytes(&rig.room);
    rig.report(&[(64 << 20, block), (ROOM, block)]);
    assert_eq!((all(&rig), rig.errors()), (before, 1), "nothing is plugged");
    rig.plug(2);
    for (n, addr) in
        [ROOM + 2 * BLOCK, ROOM + BLOCK + PAGE, ROOM + (BLOCKS - 1) * BLOCK].into_iter().enumerate()
    {
        rig.report(&[(addr, block)]);
        assert_eq!((all(&rig), rig.errors()), (before, 2 + n as u64), "{addr:#x}");
    }
    rig.report(&[(ROOM, 2 * block)]);
    assert_eq!((before - all(&rig), rig.errors()), (2 * BLOCK, 4));
}

#[test]
fn a_report_outside_of_memory_is_refused_and_the_next_one_served() {
    let mut rig = Rig::new();
    let block = BLOCK as u32;
    rig.touch(64 << 20, BLOCK);
    let before = bytes(&rig.ram);
    // The hole, its edges, the end of all addresses, a device's window.
    let outside = [
        RAM,
        RAM - PAGE,
        2 << 30,
        ROOM - PAGE,
        ROOM + BLOCKS * BLOCK,
        0xfee0_0000,
        u64::MAX - PAGE,
    ];
    for addr in outside {
        rig.report(&[(64 << 20, block), (addr, block)]);
    }
    assert_eq!(bytes(&rig.ram), before);
    assert_eq!(rig.errors(), outside.len() as u64);
    // Nothing but what the driver says to the device.
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
fn a_large_report_is_carried_out_in_pieces_that_a_pause_may_part() {
    let mut rig = Rig::new();
    let (addr, size) = (32 << 20, RAM - (32 << 20));
    assert!(size > 2 * PIECE);
    rig.touch(addr, size);
    let before = bytes(&rig.ram);
    rig.send(&[(addr, size as u32)]);
    rig.runner.round(Duration::ZERO);
    assert_eq!(before - bytes(&rig.ram), PIECE, "one piece");
    assert!(rig.queues[REPORTING].used().is_none(), "handed back before its end");
    rig.runner.engine().drain();
    assert!(rig.runner.engine().drained());
    rig.runner.resume();
    assert!(rig.runner.settle(100));
    assert!(rig.queues[REPORTING].used().is_some());
    assert_eq!(before - bytes(&rig.ram), size);
}

#[test]
fn many_small_ranges_are_carried_out_in_pieces() {
    let mut rig = Rig::new();
    let addr = 64 << 20;
    let count = 4 * PIECES as u64;
    rig.touch(addr, 2 * count * PAGE);
    let before = bytes(&rig.ram);
    let ranges: Vec<_> = (0..count).map(|n| (addr + 2 * n * PAGE, PAGE as u32)).collect();
    rig.send(&ranges);
    rig.runner.round(Duration::ZERO);
    assert_eq!(before - bytes(&rig.ram), PIECES as u64 * PAGE);
    assert!(rig.runner.settle(100));
    assert_eq!(before - bytes(&rig.ram), count * PAGE);
}

#[test]
fn pages_that_nobody_asked_for_are_handed_back_untouched() {
    let mut rig = Rig::new();
    rig.touch(64 << 20, BLOCK);
    let before = bytes(&rig.ram);
    for queue in 0..REPORTING {
        // Page numbers of 32 bits (section 5.5.6).
        rig.queues[queue].add(&[(64 << 20, 1024)], &[]);
        rig.queues[queue].kick();
        assert!(rig.runner.settle(10));
        assert_eq!(rig.queues[queue].used().unwrap().1, 0);
    }
    assert_eq!((bytes(&rig.ram), rig.errors()), (before, 2));
}

#[test]
fn the_driver_is_asked_for_no_page() {
    let device = Balloon::new(None);
    let mut config = [0; 16];
    device.read_config(0, &mut config);
    assert_eq!(config, [0; 16]);
    assert_eq!(device.features() & 0x3f, F_REPORTING);
}
