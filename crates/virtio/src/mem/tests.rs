use std::fs::File;
use std::os::linux::fs::MetadataExt;

use nix::sys::memfd::{MFdFlags, memfd_create};
use vm_memory::{Bytes, FileOffset};

use super::spec::{CONFIG_LEN, Plugged, REQUEST_LEN, RESPONSE_LEN, Response, request};
use super::*;
use crate::mock::{MockInterrupt, MockQueue, Runner, activation, memory, queues};

const SIZE: usize = 1 << 20;
const REQUEST: u64 = 0x80000;
const RESPONSE: u64 = 0x90000;
const REGION: u64 = 1 << 32;
const BLOCKS: u64 = 100;

/// RAM, and a hotplug region that begins at an offset of its file.
fn guest_memory() -> (Arc<GuestMemoryMmap>, File) {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len((BLOCKS + 1) * BLOCK).unwrap();
    let ranges = [
        (GuestAddress(0), SIZE, None),
        (
            GuestAddress(REGION),
            (BLOCKS * BLOCK) as usize,
            Some(FileOffset::new(file.try_clone().unwrap(), BLOCK)),
        ),
    ];
    (Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap()), file)
}

struct Rig {
    mem: Arc<GuestMemoryMmap>,
    file: File,
    device: Mem,
    queue: MockQueue,
    interrupt: Arc<MockInterrupt>,
    runner: Runner,
}

impl Rig {
    fn new() -> Self {
        let (mem, file) = guest_memory();
        let mut device = Mem::new(&mem, REGION..REGION + BLOCKS * BLOCK).unwrap();
        let mut queues = queues(&mem, 0x1000, device.queue_sizes());
        let interrupt = Arc::new(MockInterrupt::default());
        let made = activation(&device, &queues, interrupt.clone(), device.features());
        let runner = Runner::start(device.activate(made).unwrap()).unwrap();
        Self { mem, file, device, queue: queues.remove(0), interrupt, runner }
    }

    fn send(&mut self, kind: u16, addr: u64, count: u16) {
        let mut bytes = [0; REQUEST_LEN];
        bytes[..2].copy_from_slice(&kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&addr.to_le_bytes());
        bytes[16..18].copy_from_slice(&count.to_le_bytes());
        self.mem.write_slice(&bytes, GuestAddress(REQUEST)).unwrap();
        self.queue.add(&[(REQUEST, REQUEST_LEN as u32)], &[(RESPONSE, RESPONSE_LEN as u32)]);
        self.queue.kick();
    }

    /// Sends a request for `count` blocks from `block` on; returns response type and state.
    fn request(&mut self, kind: u16, block: u64, count: u16) -> (u16, u16) {
        self.send_at(kind, REGION + block * BLOCK, count)
    }

    fn send_at(&mut self, kind: u16, addr: u64, count: u16) -> (u16, u16) {
        self.send(kind, addr, count);
        assert!(self.runner.settle(100));
        assert_eq!(self.queue.used().unwrap().1 as usize, RESPONSE_LEN);
        let bytes: [u8; RESPONSE_LEN] = self.mem.read_obj(GuestAddress(RESPONSE)).unwrap();
        (u16::from_le_bytes([bytes[0], bytes[1]]), u16::from_le_bytes([bytes[8], bytes[9]]))
    }

    fn config(&self) -> [u64; 7] {
        let mut bytes = [0; CONFIG_LEN];
        self.device.read_config(0, &mut bytes);
        std::array::from_fn(|n| u64::from_le_bytes(bytes[8 * n..8 * n + 8].try_into().unwrap()))
    }

    fn touch(&self, block: u64) {
        self.mem.write_obj(1u8, GuestAddress(REGION + block * BLOCK)).unwrap();
    }

    fn pages(&self) -> u64 {
        self.file.metadata().unwrap().st_blocks() * 512 / 4096
    }
}

const ACK: (u16, u16) = (Response::Ack as u16, 0);
const NACK: (u16, u16) = (Response::Nack as u16, 0);
const ERROR: (u16, u16) = (Response::Error as u16, 0);

#[test]
fn a_resize_interrupts_the_driver_which_can_plug_no_more_than_requested() {
    let mut rig = Rig::new();
    let all = BLOCKS * BLOCK;
    assert_eq!(rig.config(), [BLOCK, 0, REGION, all, 0, 0, 0]);
    assert_eq!(rig.request(request::PLUG, 0, 1), ERROR, "nothing is usable yet");
    let (resize, generation) = (rig.device.resize_handle(), rig.device.config_generation());
    resize.request(3 * BLOCK - 1, 8 * BLOCK).unwrap();
    assert!(rig.runner.settle(10));
    assert_eq!(rig.interrupt.configs.load(Ordering::Relaxed), 1);
    assert_ne!(rig.device.config_generation(), generation);
    assert_eq!(rig.config(), [BLOCK, 0, REGION, all, 8 * BLOCK, 0, 3 * BLOCK]);

    assert_eq!(rig.request(request::PLUG, 1, 2), ACK);
    assert_eq!(rig.request(request::PLUG, 2, 1), ERROR, "plugged already");
    assert_eq!(rig.request(request::PLUG, 3, 2), NACK, "more than requested");
    assert_eq!(rig.request(request::PLUG, 7, 1), ACK);
    assert_eq!(rig.config()[5..], [3 * BLOCK, 3 * BLOCK]);
    assert_eq!((resize.requested(), resize.plugged()), (3 * BLOCK, 3 * BLOCK));

    let state = |found: Plugged| (Response::Ack as u16, found as u16);
    assert_eq!(rig.request(request::STATE, 1, 2), state(Plugged::All));
    assert_eq!(rig.request(request::STATE, 3, 4), state(Plugged::None));
    assert_eq!(rig.request(request::STATE, 0, 8), state(Plugged::Some));
    assert_eq!(rig.request(request::STATE, 0, 9), ERROR);
}

#[test]
fn unplugged_blocks_are_freed_and_read_as_zeroes() {
    let mut rig = Rig::new();
    rig.device.resize_handle().request(4 * BLOCK, 4 * BLOCK).unwrap();
    assert_eq!(rig.request(request::PLUG, 0, 4), ACK);
    for block in 0..4 {
        rig.touch(block);
    }
    assert_eq!(rig.pages(), 4);
    assert_eq!(rig.request(request::UNPLUG, 1, 2), ACK);
    assert_eq!((rig.pages(), rig.device.resize_handle().plugged()), (2, 2 * BLOCK));
    assert_eq!(rig.request(request::UNPLUG, 0, 4), ERROR, "half of it is unplugged already");
    assert_eq!(rig.pages(), 2);
    assert_eq!(rig.request(request::PLUG, 1, 1), ACK);
    let byte: u8 = rig.mem.read_obj(GuestAddress(REGION + BLOCK)).unwrap();
    assert_eq!(byte, 0);
}

#[test]
fn a_smaller_request_unplugs_nothing_by_itself() {
    let mut rig = Rig::new();
    let resize = rig.device.resize_handle();
    resize.request(4 * BLOCK, 4 * BLOCK).unwrap();
    assert_eq!(rig.request(request::PLUG, 0, 4), ACK);
    resize.request(BLOCK, BLOCK).unwrap();
    assert_eq!((resize.requested(), resize.plugged()), (BLOCK, 4 * BLOCK));
    assert_eq!(rig.config()[4], 4 * BLOCK, "the usable size is not reduced");
    assert_eq!(rig.request(request::UNPLUG, 3, 1), ACK);
    assert_eq!(rig.request(request::PLUG, 3, 1), NACK);
    assert!(matches!(
        resize.request(BLOCKS * BLOCK + 1, 0),
        Err(MemError::TooLarge { size, .. }) if size == BLOCKS * BLOCK
    ));
}

#[test]
fn unplug_all_is_handled_in_rounds_and_continues_after_a_pause() {
    let mut rig = Rig::new();
    let (all, resize) = (BLOCKS * BLOCK, rig.device.resize_handle());
    resize.request(all, all).unwrap();
    assert_eq!(rig.request(request::PLUG, 0, BLOCKS as u16), ACK);
    for block in 0..BLOCKS {
        rig.touch(block);
    }
    rig.send(request::UNPLUG_ALL, 0, 0);
    rig.runner.round(std::time::Duration::ZERO);
    let left = resize.plugged();
    assert!(left > 0 && left < all, "{left:#x} is left after one round");
    assert!(rig.queue.used().is_none());
    rig.runner.engine().drain();
    assert!(rig.runner.engine().drained());
    rig.runner.resume();
    assert!(rig.runner.settle(100));
    assert_eq!(rig.queue.used().unwrap().1 as usize, RESPONSE_LEN);
    assert_eq!((resize.plugged(), rig.pages()), (0, 0));
}

#[test]
fn invalid_addresses_and_counts_are_refused() {
    let mut rig = Rig::new();
    let all = BLOCKS * BLOCK;
    rig.device.resize_handle().request(all, all).unwrap();
    for kind in [request::PLUG, request::UNPLUG, request::STATE, 4, u16::MAX] {
        for (addr, count) in [
            (REGION, 0),
            (REGION, u16::MAX),
            (REGION + 1, 1),
            (REGION - BLOCK, 1),
            (REGION + all, 1),
            (REGION + all - BLOCK, 2),
            (0, 1),
            (u64::MAX - BLOCK + 1, u16::MAX),
        ] {
            assert_eq!(rig.send_at(kind, addr, count), ERROR, "{kind} {addr:#x} {count}");
        }
    }
    assert_eq!(rig.device.resize_handle().plugged(), 0);
    assert_eq!(rig.device.counters().errors(), 40);
}

#[test]
fn a_malformed_request_is_returned_with_length_0_and_the_next_one_is_handled() {
    let mut rig = Rig::new();
    rig.queue.add(&[(REQUEST, 23)], &[(RESPONSE, 16)]);
    rig.queue.add(&[(REQUEST, 24)], &[(RESPONSE, 9)]);
    rig.queue.add(&[(REQUEST, 24)], &[]);
    rig.queue.kick();
    assert!(rig.runner.settle(10));
    for _ in 0..3 {
        assert_eq!(rig.queue.used().unwrap().1, 0);
    }
    assert_eq!(rig.device.counters().errors(), 3);
    assert_eq!(rig.request(request::UNPLUG_ALL, 0, 0), ACK);
}

#[test]
fn a_region_must_be_a_file_backed_region_of_guest_memory() {
    let (mem, _) = guest_memory();
    for region in [
        REGION..REGION + BLOCK,
        REGION + BLOCK..REGION + BLOCKS * BLOCK,
        0..SIZE as u64,
        REGION..REGION,
        2 * REGION..2 * REGION + BLOCK,
    ] {
        assert!(matches!(Mem::new(&mem, region), Err(MemError::Region { .. })));
    }
    let anonymous = memory(2 * BLOCK as usize);
    assert!(matches!(Mem::new(&anonymous, 0..2 * BLOCK), Err(MemError::NoFile { addr: 0 })));
}
