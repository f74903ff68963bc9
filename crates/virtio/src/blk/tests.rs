use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::sync::atomic::{AtomicU32, Ordering};

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::engine::{CACHE_LIMIT, MAX_CACHE_DROPS, MAX_RESTARTS};
use super::spec::{RANGE_UNMAP, Status, T_DISCARD, T_FLUSH, T_GET_ID, T_IN, T_OUT, T_WRITE_ZEROES};
use super::*;
use crate::limit::LINES;
use crate::mock::{MockInterrupt, MockQueue, Runner, activation, memory, queues};

const DISK: u64 = 1 << 20;
const HEADER: u64 = 0x10000;
const STATUS: u64 = 0x10100;
const DATA: u64 = 0x20000;
const TABLE: u64 = 0x11000;

/// A disk, its driver, and the engine in a [`Runner`].
struct Rig {
    mem: Arc<GuestMemoryMmap>,
    queue: MockQueue,
    block: Block,
    runner: Runner,
    interrupt: Arc<MockInterrupt>,
    file: File,
}

fn rig_with(read_only: bool, features: u64, direct: bool) -> Rig {
    let mem = memory(4 << 20);
    let file = tempfile::tempfile().unwrap();
    file.set_len(DISK).unwrap();
    let mut block = Block::new(file.try_clone().unwrap(), "disk-1", read_only).unwrap();
    if direct {
        let backend = Backend::Direct(Direct::new(block.file.clone()));
        *block.backend.lock().unwrap() = Some(backend);
    }
    let mut queues = queues(&mem, 0x1000, block.queue_sizes());
    let interrupt = Arc::new(MockInterrupt::default());
    let made = activation(&block, &queues, interrupt.clone(), block.features() & features);
    let runner = Runner::start(block.activate(made).unwrap()).unwrap();
    Rig { mem, queue: queues.remove(0), block, runner, interrupt, file }
}

fn rig() -> Rig {
    rig_with(false, u64::MAX, false)
}

impl Rig {
    /// The disk after a reset, with empty rings; `change` gets the backend between activations.
    fn reset(self, features: u64, change: impl FnOnce(&mut Option<Backend>)) -> Self {
        let Self { mem, mut block, runner, interrupt, file, .. } = self;
        drop(runner);
        let mut idle_backend = block.backend.lock().unwrap();
        change(&mut idle_backend);
        drop(idle_backend);
        mem.write_slice(&vec![0; 0x8000], GuestAddress(0)).unwrap();
        let mut queues = queues(&mem, 0x1000, block.queue_sizes());
        let made = activation(&block, &queues, interrupt.clone(), features);
        let runner = Runner::start(block.activate(made).unwrap()).unwrap();
        Self { mem, queue: queues.remove(0), block, runner, interrupt, file }
    }

    /// The disk without io_uring, whose next operations fail with `faults`, last first.
    fn faulty(self, faults: Vec<i32>) -> Self {
        let mut direct = Direct::new(self.block.file.clone());
        direct.faults = faults;
        self.reset(features::COMMON, |idle_backend| *idle_backend = Some(Backend::Direct(direct)))
    }

    fn header(&self, at: u64, kind: u32, sector: u64) {
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        self.mem.write_slice(&header, GuestAddress(at)).unwrap();
    }

    /// Runs one request and returns its status byte.
    fn request(&mut self, kind: u32, sector: u64, out: &[(u64, u32)], into: &[(u64, u32)]) -> u8 {
        self.header(HEADER, kind, sector);
        let mut readable = vec![(HEADER, 16)];
        readable.extend(out);
        let mut writable = into.to_vec();
        writable.push((STATUS, 1));
        self.mem.write_obj(0xaau8, GuestAddress(STATUS)).unwrap();
        self.queue.add(&readable, &writable);
        self.queue.kick();
        let queue = &mut self.queue;
        assert!(self.runner.until(|| queue.used().is_some()));
        self.mem.read_obj(GuestAddress(STATUS)).unwrap()
    }

    fn range(&self, sector: u64, sectors: u32, flags: u32) -> [(u64, u32); 1] {
        let mut range = [0; 16];
        range[..8].copy_from_slice(&sector.to_le_bytes());
        range[8..12].copy_from_slice(&sectors.to_le_bytes());
        range[12..].copy_from_slice(&flags.to_le_bytes());
        self.mem.write_slice(&range, GuestAddress(DATA)).unwrap();
        [(DATA, 16)]
    }

    fn disk(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file.read_exact_at(&mut bytes, offset).unwrap();
        bytes
    }
}

const OK: u8 = Status::Ok as u8;
const IOERR: u8 = Status::IoError as u8;
const UNSUPP: u8 = Status::Unsupported as u8;

#[test]
fn both_backends_write_and_read_back_data_split_over_buffers() {
    for direct in [false, true] {
        let mut rig = rig_with(false, u64::MAX, direct);
        let bytes: Vec<u8> = (0..2048u32).map(|n| (n * 7) as u8).collect();
        rig.mem.write_slice(&bytes, GuestAddress(DATA)).unwrap();
        let pieces = [(DATA, 100), (DATA + 100, 1000), (DATA + 1100, 948)];
        assert_eq!(rig.request(T_OUT, 3, &pieces, &[]), OK);
        assert_eq!(rig.disk(3 * 512, 2048), bytes);
        let (a, b) = (DATA + 0x4000, DATA + 0x8000);
        assert_eq!(rig.request(T_IN, 3, &[], &[(a, 1), (b, 2047)]), OK);
        let mut back = vec![0; 2048];
        rig.mem.read_slice(&mut back[..1], GuestAddress(a)).unwrap();
        rig.mem.read_slice(&mut back[1..], GuestAddress(b)).unwrap();
        assert_eq!(back, bytes);
        assert_eq!(rig.request(T_FLUSH, 0, &[], &[]), OK);
        assert_eq!(rig.block.counters().operations(), 3);
    }
}

#[test]
fn an_indirect_request_with_a_split_header_works() {
    let mut rig = rig();
    rig.file.write_all_at(b"sector nine", 9 * 512).unwrap();
    rig.header(HEADER, T_IN, 9);
    let readable = [(HEADER, 5), (HEADER + 5, 11)];
    rig.queue.add_indirect(TABLE, &readable, &[(DATA, 512), (STATUS, 1)]);
    rig.queue.kick();
    let queue = &mut rig.queue;
    let mut used = None;
    assert!(rig.runner.until(|| {
        used = queue.used();
        used.is_some()
    }));
    assert_eq!(used.unwrap().1, 513);
    let mut back = [0; 11];
    rig.mem.read_slice(&mut back, GuestAddress(DATA)).unwrap();
    assert_eq!(&back, b"sector nine");
}

#[test]
fn transfers_past_the_end_or_of_invalid_length_fail_without_effect() {
    let mut rig = rig();
    let end = DISK / 512;
    rig.mem.write_slice(&[7; 1024], GuestAddress(DATA)).unwrap();
    assert_eq!(rig.request(T_OUT, end - 1, &[(DATA, 1024)], &[]), IOERR);
    assert_eq!(rig.request(T_OUT, end, &[(DATA, 512)], &[]), IOERR);
    assert_eq!(rig.request(T_IN, u64::MAX, &[], &[(DATA, 512)]), IOERR);
    assert_eq!(rig.request(T_IN, u64::MAX / 512, &[], &[(DATA, 1024)]), IOERR);
    assert_eq!(rig.request(T_OUT, 0, &[(DATA, 511)], &[]), IOERR);
    assert_eq!(rig.request(T_IN, 0, &[], &[]), IOERR);
    assert_eq!(rig.disk(DISK - 512, 512), [0; 512]);
    assert_eq!(rig.file.metadata().unwrap().len(), DISK);
    assert_eq!(rig.request(T_OUT, end - 1, &[(DATA, 512)], &[]), OK);
    assert_eq!(rig.disk(DISK - 512, 512), [7; 512]);
    assert_eq!(rig.block.counters().errors(), 6);
}

#[test]
fn a_read_only_disk_refuses_writes_discards_and_zeroes() {
    let mut rig = rig_with(true, u64::MAX, false);
    assert_eq!(rig.block.features() & F_RO, F_RO);
    assert_eq!(rig.block.features() & (F_DISCARD | F_WRITE_ZEROES), 0);
    assert_eq!(rig.request(T_OUT, 0, &[(DATA, 512)], &[]), IOERR);
    let range = rig.range(0, 8, 0);
    assert_eq!(rig.request(T_DISCARD, 0, &range, &[]), IOERR);
    assert_eq!(rig.request(T_WRITE_ZEROES, 0, &range, &[]), IOERR);
    assert_eq!(rig.request(T_IN, 0, &[], &[(DATA, 512)]), OK);
    assert_eq!(rig.request(T_FLUSH, 0, &[], &[]), OK);
}

#[test]
fn the_id_is_the_serial_padded_with_zeroes() {
    let mut rig = rig();
    assert_eq!(rig.request(T_GET_ID, 0, &[], &[(DATA, 20)]), OK);
    let mut id = [0xff; 20];
    rig.mem.read_slice(&mut id, GuestAddress(DATA)).unwrap();
    assert_eq!(&id[..7], b"disk-1\0");
    assert_eq!(id[6..], [0; 14]);
    assert_eq!(rig.request(T_GET_ID, 0, &[], &[(DATA, 19)]), IOERR);
}

#[test]
fn discard_frees_space_and_write_zeroes_reads_as_zeroes() {
    for direct in [false, true] {
        let mut rig = rig_with(false, u64::MAX, direct);
        rig.file.write_all_at(&vec![5; 256 << 10], 0).unwrap();
        let before = rig.file.metadata().unwrap().blocks();
        let range = rig.range(0, 256, 0);
        assert_eq!(rig.request(T_DISCARD, 0, &range, &[]), OK);
        assert!(rig.file.metadata().unwrap().blocks() < before);
        assert_eq!(rig.disk(0, 512), [0; 512]);
        for (sector, flags) in [(300, RANGE_UNMAP), (310, 0)] {
            let range = rig.range(sector, 4, flags);
            assert_eq!(rig.request(T_WRITE_ZEROES, 0, &range, &[]), OK);
            assert_eq!(rig.disk(sector * 512, 2048), [0; 2048]);
            assert_eq!(rig.disk(sector * 512 - 1, 1), [5]);
            assert_eq!(rig.disk(sector * 512 + 2048, 1), [5]);
        }
        assert_eq!(rig.file.metadata().unwrap().len(), DISK);
    }
}

#[test]
fn discard_ranges_are_checked() {
    let mut rig = rig();
    for (sector, sectors, flags, status) in [
        (DISK / 512, 1, 0, IOERR),
        (u64::MAX, 1, 0, IOERR),
        (0, u32::MAX, 0, IOERR),
        (0, 8, 2, UNSUPP),
        (0, 8, RANGE_UNMAP, UNSUPP),
        (0, 0, 0, OK),
    ] {
        let range = rig.range(sector, sectors, flags);
        assert_eq!(rig.request(T_DISCARD, 0, &range, &[]), status, "{sector} {sectors} {flags}");
    }
    let [(at, _)] = rig.range(0, 8, 0);
    assert_eq!(rig.request(T_DISCARD, 0, &[(at, 8)], &[]), IOERR);
    assert_eq!(rig.request(T_DISCARD, 0, &[(at, 32)], &[]), IOERR);
}

#[test]
fn unknown_types_are_unsupported_and_short_headers_fail() {
    let mut rig = rig();
    assert_eq!(rig.request(77, 0, &[], &[]), UNSUPP);
    rig.header(HEADER, T_IN, 0);
    rig.queue.add(&[(HEADER, 15)], &[(DATA, 512), (STATUS, 1)]);
    // Without a status byte the chain is returned with length 0.
    rig.queue.add(&[(HEADER, 16)], &[]);
    rig.queue.kick();
    assert!(rig.runner.settle(100));
    assert_eq!(rig.queue.used().unwrap().1, 1);
    assert_eq!(rig.mem.read_obj::<u8>(GuestAddress(STATUS)).unwrap(), IOERR);
    assert_eq!(rig.queue.used().unwrap().1, 0);
}

#[test]
fn a_full_queue_of_requests_completes_with_few_interrupts() {
    let mut rig = rig();
    for round in 0..8u64 {
        let count = 42; // of 128 descriptors, three per request
        for n in 0..count {
            let (header, status) = (HEADER + 32 * n, DATA + 0x40000 + n);
            let at = DATA + 0x400 * n;
            rig.header(header, T_OUT, n);
            rig.mem.write_slice(&[(n + round) as u8; 512], GuestAddress(at)).unwrap();
            rig.mem.write_obj(0xaau8, GuestAddress(status)).unwrap();
            rig.queue.add(&[(header, 16), (at, 512)], &[(status, 1)]);
        }
        rig.queue.kick();
        let (mut done, queue) = (0, &mut rig.queue);
        assert!(rig.runner.until(|| {
            done += std::iter::from_fn(|| queue.used()).count() as u64;
            done == count
        }));
        for n in 0..count {
            assert_eq!(rig.mem.read_obj::<u8>(GuestAddress(DATA + 0x40000 + n)).unwrap(), OK);
            assert_eq!(rig.disk(n * 512, 512), [(n + round) as u8; 512]);
        }
    }
    assert!(rig.interrupt.queues.load(Ordering::Relaxed) <= 8 * 42);
    assert_eq!(rig.block.counters().operations(), 8 * 42);
}

#[test]
fn a_drained_engine_takes_no_requests_until_resume() {
    let mut rig = rig();
    rig.runner.settle(10);
    rig.runner.engine().drain();
    rig.header(HEADER, T_IN, 0);
    rig.queue.add(&[(HEADER, 16)], &[(DATA, 512), (STATUS, 1)]);
    rig.queue.kick();
    assert!(rig.runner.settle(100));
    assert!(rig.queue.used().is_none());
    assert!(rig.runner.engine().drained());
    rig.runner.resume();
    let queue = &mut rig.queue;
    assert!(rig.runner.until(|| queue.used().is_some()));
}

#[test]
fn an_activation_after_a_reset_uses_the_same_ring() {
    let mut rig = rig();
    assert_eq!(rig.request(T_FLUSH, 0, &[], &[]), OK);
    assert!(rig.block.backend.lock().unwrap().is_none());
    drop(rig.runner);
    assert!(rig.block.backend.lock().unwrap().is_some());
    let fresh = queues(&rig.mem, 0x1000, rig.block.queue_sizes());
    let features = rig.block.features();
    let made = activation(&rig.block, &fresh, rig.interrupt.clone(), features);
    rig.runner = Runner::start(rig.block.activate(made).unwrap()).unwrap();
    rig.mem.write_slice(&[0; 0x1000], GuestAddress(fresh[0].driver())).unwrap();
    rig.mem.write_slice(&[0; 0x1000], GuestAddress(fresh[0].device())).unwrap();
    rig.queue = fresh.into_iter().next().unwrap();
    assert_eq!(rig.request(T_IN, 0, &[], &[(DATA, 512)]), OK);
}

#[test]
fn a_disk_whose_ring_has_stuck_requests_continues_without_io_uring() {
    let mut rig = rig().reset(features::COMMON, |idle_backend| *idle_backend = None);
    assert_eq!(rig.request(T_IN, 0, &[], &[(DATA, 512)]), OK);
    rig.reset(features::COMMON, |idle_backend| {
        assert!(matches!(idle_backend, Some(Backend::Direct(_))));
    });
}

#[test]
fn a_restarted_request_completes_without_another_kick() {
    let mut faulty = rig().faulty(vec![libc::EINTR, libc::EAGAIN, libc::EAGAIN]);
    assert_eq!(faulty.request(T_IN, 0, &[], &[(DATA, 512)]), OK);
    for direct in [false, true] {
        let mut rig = rig_with(false, u64::MAX, direct);
        // The host's file was truncated: only half of the request can be read.
        rig.file.set_len(DISK - 512).unwrap();
        assert_eq!(rig.request(T_IN, DISK / 512 - 2, &[], &[(DATA, 1024)]), IOERR);
    }
}

#[test]
fn a_request_fails_after_too_many_restarts_and_the_next_one_succeeds() {
    for errno in [libc::EAGAIN, libc::EINTR] {
        let mut rig = rig().faulty(vec![errno; usize::from(MAX_RESTARTS) + 1]);
        assert_eq!(rig.request(T_OUT, 0, &[(DATA, 512)], &[]), IOERR);
        assert_eq!(rig.block.counters().errors(), 1);
        assert_eq!(rig.request(T_OUT, 0, &[(DATA, 512)], &[]), OK);
    }
}

/// Counts the events that would be logged.
struct EventCount(Arc<AtomicU32>);

impl tracing::Subscriber for EventCount {
    fn enabled(&self, metadata: &tracing::Metadata<'_>) -> bool {
        metadata.is_event() && *metadata.level() <= tracing::Level::INFO
    }
    fn event(&self, _: &tracing::Event<'_>) {
        self.0.fetch_add(1, Ordering::Relaxed);
    }
    fn new_span(&self, _: &tracing::span::Attributes<'_>) -> tracing::span::Id {
        tracing::span::Id::from_u64(1)
    }
    fn record(&self, _: &tracing::span::Id, _: &tracing::span::Record<'_>) {}
    fn record_follows_from(&self, _: &tracing::span::Id, _: &tracing::span::Id) {}
    fn enter(&self, _: &tracing::span::Id) {}
    fn exit(&self, _: &tracing::span::Id) {}
}

#[test]
fn a_reset_does_not_renew_the_log_limit() {
    let resets = 4 * LINES;
    let lines = Arc::new(AtomicU32::new(0));
    let mut rig = rig();
    let guard = tracing::subscriber::set_default(EventCount(lines.clone()));
    for _ in 0..resets {
        rig = rig.reset(features::COMMON, |_| {});
        // One line from the queue, one from the engine.
        rig.queue.add(&[(u64::MAX - 0x1000, 16)], &[]);
        assert_eq!(rig.request(77, 0, &[], &[]), UNSUPP);
    }
    drop(guard);
    assert_eq!(rig.block.counters().errors(), u64::from(2 * resets));
    assert!(lines.load(Ordering::Relaxed) <= LINES, "{lines:?}");
    assert_eq!(rig.block.counters.limit.allow(), None, "no line was suppressed");
}

#[test]
fn enospc_is_an_io_error_that_is_counted() {
    for direct in [false, true] {
        let mut rig = rig();
        drop(rig.runner);
        // Writes to /dev/full fail with ENOSPC.
        let full = Arc::new(File::options().write(true).open("/dev/full").unwrap());
        let backend = if direct {
            Backend::Direct(Direct::new(full))
        } else {
            Backend::open(&full, usize::from(QUEUE_SIZE))
        };
        *rig.block.backend.lock().unwrap() = Some(backend);
        rig.mem.write_slice(&vec![0; 0x8000], GuestAddress(0)).unwrap();
        let fresh = queues(&rig.mem, 0x1000, rig.block.queue_sizes());
        let made = activation(&rig.block, &fresh, rig.interrupt.clone(), features::COMMON);
        rig.runner = Runner::start(rig.block.activate(made).unwrap()).unwrap();
        rig.queue = fresh.into_iter().next().unwrap();
        assert_eq!(rig.request(T_OUT, 0, &[(DATA, 512)], &[]), IOERR);
        assert_eq!(rig.block.counters().errors(), 1);
    }
}

#[test]
fn files_that_cannot_be_disks_are_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(
        Block::new(file.try_clone().unwrap(), "x", false),
        Err(BlockError::Empty { size: 0 })
    ));
    file.set_len(4096).unwrap();
    for serial in ["", "a serial number far too long", "tab\t"] {
        let made = Block::new(file.try_clone().unwrap(), serial, false);
        assert!(matches!(made, Err(BlockError::Serial { .. })), "{serial:?}");
    }
    let null = File::open("/dev/null").unwrap();
    assert!(matches!(Block::new(null, "x", true), Err(BlockError::Kind)));
}

#[test]
fn the_configuration_has_capacity_and_limits() {
    let rig = rig();
    if !matches!(Backend::open(&rig.block.file, 8), Backend::Ring(_)) {
        println!("SKIP: no io_uring on this host: the ring was not tested");
    }
    let mut config = [0; 64];
    rig.block.read_config(0, &mut config);
    assert_eq!(config[..8], (DISK / 512).to_le_bytes());
    assert_eq!(config[12..16], SEG_MAX.to_le_bytes());
    assert_eq!(config[20..24], 512u32.to_le_bytes());
    assert_eq!(config[36..40], MAX_RANGE_SECTORS.to_le_bytes());
    assert_eq!(config[60..], [0; 4]);
    let mut word = [0; 4];
    rig.block.read_config(usize::MAX, &mut word);
    assert_eq!(word, [0; 4]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    /// After any sequence of writes the disk has the contents of a byte array with the same writes.
    #[test]
    fn the_disk_agrees_with_a_model(
        writes in prop::collection::vec((0u64..64, 1usize..8, any::<u8>(), any::<bool>()), 1..20)
    ) {
        let mut rig = rig();
        let mut model = vec![0u8; 72 * 512];
        for (sector, count, value, zero) in writes {
            let at = sector as usize * 512;
            let len = count * 512;
            if zero {
                let range = rig.range(sector, count as u32, 0);
                prop_assert_eq!(rig.request(T_WRITE_ZEROES, 0, &range, &[]), OK);
                model[at..at + len].fill(0);
            } else {
                rig.mem.write_slice(&vec![value; len], GuestAddress(DATA)).unwrap();
                let data = [(DATA, len as u32)];
                prop_assert_eq!(rig.request(T_OUT, sector, &data, &[]), OK);
                model[at..at + len].fill(value);
            }
        }
        let mut disk = Vec::new();
        rig.file.seek(SeekFrom::Start(0)).unwrap();
        (&rig.file).take(72 * 512).read_to_end(&mut disk).unwrap();
        rig.file.flush().unwrap();
        prop_assert_eq!(disk, model);
    }
}

/// A disk without io_uring, and a counter of its page cache drops.
fn counted(read_only: bool) -> (Rig, Arc<AtomicU32>) {
    let drops = Arc::new(AtomicU32::new(0));
    let rig = rig_with(read_only, u64::MAX, true);
    let mut direct = Direct::new(rig.block.file.clone());
    direct.drops = drops.clone();
    let features = rig.block.features();
    (rig.reset(features, |idle_backend| *idle_backend = Some(Backend::Direct(direct))), drops)
}

#[test]
fn a_writable_disk_is_dropped_from_the_page_cache_after_many_bytes_and_when_idle() {
    let (mut rig, drops) = counted(false);
    let size = DISK as u32;
    for _ in 0..CACHE_LIMIT / DISK {
        assert_eq!(drops.load(Ordering::Relaxed), 0);
        assert_eq!(rig.request(T_OUT, 0, &[(DATA, size)], &[]), OK);
    }
    assert_eq!(drops.load(Ordering::Relaxed), 1, "after the limit of written bytes");
    for _ in 0..CACHE_LIMIT / DISK {
        assert_eq!(rig.request(T_IN, 0, &[], &[(DATA, size)]), OK);
    }
    assert_eq!(drops.load(Ordering::Relaxed), 2, "after the limit of read bytes");
    assert_eq!(rig.request(T_OUT, 0, &[(DATA, 512)], &[]), OK);
    let all = 2 + u32::from(MAX_CACHE_DROPS);
    assert!(rig.runner.until(|| drops.load(Ordering::Relaxed) == all), "when idle");
    assert!(rig.runner.settle(10));
    assert_eq!(rig.runner.engine().deadline(), None, "an idle disk has no timer");
    assert_eq!(rig.request(T_IN, 0, &[], &[(DATA, 512)]), OK);
    assert!(rig.runner.engine().deadline().is_some());
}

#[test]
fn a_read_only_disk_stays_in_the_hosts_page_cache() {
    let (mut rig, drops) = counted(true);
    for _ in 0..2 * CACHE_LIMIT / DISK {
        assert_eq!(rig.request(T_IN, 0, &[], &[(DATA, DISK as u32)]), OK);
    }
    assert_eq!((drops.load(Ordering::Relaxed), rig.runner.engine().deadline()), (0, None));
}
