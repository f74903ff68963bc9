//! Tests the device with a fake back end that follows the protocol or violates it.

use std::fs::File;
use std::io::{IoSliceMut, Read, Write};
use std::os::fd::{AsRawFd, FromRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, recvmsg};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};

use super::spec::{F_PROTOCOL_FEATURES, FLAGS_REPLY, FUSE_OUT_LEN, request};
use super::*;
use crate::mock::{MockInterrupt, MockQueue, Runner, activation, memory, queues};

const SIZE: usize = 1 << 20;
const REQUEST: u64 = 0x80000;
const ANSWER: u64 = 0x90000;
const UNIQUE: u64 = 0x1122_3344_5566_7788;

/// File-backed memory in two regions, as in a VM with more than 3 GiB.
fn shared_memory() -> Arc<GuestMemoryMmap> {
    let file = File::from(memfd_create(c"test", MFdFlags::MFD_CLOEXEC).unwrap());
    file.set_len(2 * SIZE as u64).unwrap();
    let file = Arc::new(file);
    let high = 1 << 32;
    let ranges = [
        (GuestAddress(0), SIZE, Some(FileOffset::from_arc(file.clone(), 0))),
        (GuestAddress(high), SIZE, Some(FileOffset::from_arc(file, SIZE as u64))),
    ];
    Arc::new(GuestMemoryMmap::from_ranges_with_files(ranges).unwrap())
}

/// A message received by the back end.
#[derive(Debug)]
struct Message {
    request: u32,
    payload: Vec<u8>,
    fds: Vec<File>,
}

impl Message {
    fn words(&self) -> Vec<u64> {
        self.payload.chunks(8).map(|c| u64::from_ne_bytes(c.try_into().unwrap())).collect()
    }

    fn state(&self) -> (u32, u32) {
        let word = self.words()[0];
        (word as u32, (word >> 32) as u32)
    }
}

struct Backend(UnixStream);

impl Backend {
    fn read(&mut self) -> Message {
        self.0.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
        let mut header = [0; 12];
        let mut space = nix::cmsg_space!([RawFd; 8]);
        let mut parts = [IoSliceMut::new(&mut header)];
        let got =
            recvmsg::<()>(self.0.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty())
                .unwrap();
        let mut fds = Vec::new();
        for part in got.cmsgs().unwrap() {
            if let ControlMessageOwned::ScmRights(raw) = part {
                // SAFETY: received just now, and wrapped once.
                #[allow(unsafe_code)]
                fds.extend(raw.into_iter().map(|fd| unsafe { File::from_raw_fd(fd) }));
            }
        }
        assert_eq!(got.bytes, 12);
        let word = |n: usize| u32::from_ne_bytes(header[4 * n..4 * n + 4].try_into().unwrap());
        assert_eq!(word(1), 1);
        let mut payload = vec![0; word(2) as usize];
        self.0.read_exact(&mut payload).unwrap();
        Message { request: word(0), payload, fds }
    }

    fn reply(&mut self, request: u32, payload: u64) {
        let mut message = Vec::new();
        for word in [request, FLAGS_REPLY, 8] {
            message.extend(word.to_ne_bytes());
        }
        message.extend(payload.to_ne_bytes());
        self.0.write_all(&message).unwrap();
    }

    fn expect(&mut self, request: u32) -> Message {
        let message = self.read();
        assert_eq!(message.request, request);
        message
    }
}

struct Rig {
    mem: Arc<GuestMemoryMmap>,
    fs: Fs,
    queues: Vec<MockQueue>,
    interrupt: Arc<MockInterrupt>,
    backend: Option<Backend>,
}

impl Rig {
    fn new(mem: Arc<GuestMemoryMmap>) -> Self {
        Self::with_queues(mem, 1)
    }

    fn with_queues(mem: Arc<GuestMemoryMmap>, request_queues: u16) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let fs = Fs::new("shares", ours.into(), request_queues).unwrap();
        let queues = queues(&mem, 0x1000, fs.queue_sizes());
        let interrupt = Arc::new(MockInterrupt::default());
        Self { mem, fs, queues, interrupt, backend: Some(Backend(theirs)) }
    }

    fn activate(&mut self) -> Runner {
        let made = activation(&self.fs, &self.queues, self.interrupt.clone(), self.fs.features());
        Runner::start(self.fs.activate(made).unwrap()).unwrap()
    }

    fn backend(&mut self) -> &mut Backend {
        self.backend.as_mut().unwrap()
    }

    /// Answers the first messages as nacelle-fs does.
    fn greet(&mut self, runner: &mut Runner, first: bool) {
        let backend = self.backend();
        if first {
            backend.expect(request::SET_OWNER);
        }
        backend.expect(request::GET_FEATURES);
        backend.reply(request::GET_FEATURES, features::COMMON | F_PROTOCOL_FEATURES | 1 << 26);
        runner.settle(10);
    }

    /// Expects all messages of a start; returns base, call and kick of each queue.
    fn started(&mut self) -> Vec<(u32, File, File)> {
        let rings: Vec<_> =
            self.queues.iter().map(|q| (q.desc(), q.device(), q.driver())).collect();
        let backend = self.backend.as_mut().unwrap();
        let features = backend.expect(request::SET_FEATURES).words();
        assert_eq!(features, [features::COMMON | F_PROTOCOL_FEATURES]);
        let table = backend.expect(request::SET_MEM_TABLE);
        let (size, high) = (SIZE as u64, 1 << 32);
        assert_eq!(table.words(), [2, 0, size, 0, 0, high, size, high, size]);
        assert_eq!(table.fds.len(), 2);
        let mut started = Vec::new();
        for (n, (desc, used, avail)) in rings.into_iter().enumerate() {
            let n = n as u32;
            let size = backend.expect(request::SET_VRING_NUM).state();
            assert_eq!(size, (n, u32::from(self.fs.queue_sizes()[n as usize])));
            let (index, base) = backend.expect(request::SET_VRING_BASE).state();
            assert_eq!(index, n);
            let address = backend.expect(request::SET_VRING_ADDR).words();
            assert_eq!(address, [u64::from(n), desc, used, avail, 0]);
            let mut call = backend.expect(request::SET_VRING_CALL);
            let mut kick = backend.expect(request::SET_VRING_KICK);
            assert_eq!((call.words(), kick.words()), (vec![u64::from(n)], vec![u64::from(n)]));
            assert_eq!(backend.expect(request::SET_VRING_ENABLE).state(), (n, 1));
            started.push((base, call.fds.remove(0), kick.fds.remove(0)));
        }
        started
    }

    /// Sends a FUSE request, with a buffer of 16 bytes for the answer if `room`.
    fn request(&mut self, room: bool) {
        let mut header = [0; 40];
        header[8..16].copy_from_slice(&UNIQUE.to_le_bytes());
        self.mem.write_slice(&header, GuestAddress(REQUEST)).unwrap();
        let answer = if room { vec![(ANSWER, 16)] } else { vec![] };
        self.queues[1].add(&[(REQUEST, 40)], &answer);
        self.queues[1].kick();
    }

    /// Expects that the request was answered with ENOTCONN.
    fn refused(&mut self, runner: &mut Runner) {
        let queue = &mut self.queues[1];
        let mut used = None;
        let answered = runner.until(|| {
            used = queue.used();
            used.is_some()
        });
        assert!(answered, "the request hangs");
        assert_eq!(used.unwrap().1 as usize, FUSE_OUT_LEN);
        let answer: [u8; FUSE_OUT_LEN] = self.mem.read_obj(GuestAddress(ANSWER)).unwrap();
        assert_eq!(answer[..4], 16u32.to_le_bytes());
        assert_eq!(answer[4..8], (-libc::ENOTCONN).to_le_bytes());
        assert_eq!(answer[8..], UNIQUE.to_le_bytes());
    }
}

#[test]
fn the_tag_stands_in_the_configuration_and_has_its_limits() {
    let new = |tag: &str| Fs::new(tag, UnixStream::pair().unwrap().0.into(), 1);
    let fs = new("nacelle").unwrap();
    let mut config = [0xff; 48];
    fs.read_config(0, &mut config);
    assert_eq!(&config[..8], b"nacelle\0");
    assert_eq!(config[36..40], [1, 0, 0, 0]);
    assert_eq!(config[40..], [0xff; 8]);
    assert!(new(&"x".repeat(36)).is_ok());
    for bad in ["", "a\0b", &"x".repeat(37)] {
        assert!(new(bad).is_err(), "{bad:?}");
    }
}

#[test]
fn a_backend_gets_memory_rings_and_events_and_serves_past_the_worker() {
    let mut rig = Rig::new(shared_memory());
    let mut runner = rig.activate();
    rig.request(true);
    rig.greet(&mut runner, true);
    let mut started = rig.started();
    assert_eq!([started[0].0, started[1].0], [0, 0]);
    // The kick from before the start, and the one of the engine.
    let mut count = [0; 8];
    started[1].2.read_exact(&mut count).unwrap();
    assert!(u64::from_ne_bytes(count) >= 1);
    started[1].1.write_all(&1u64.to_ne_bytes()).unwrap();
    let interrupt = rig.interrupt.clone();
    assert!(runner.until(|| interrupt.queues.load(Ordering::Acquire) == 1));
    assert!(!rig.interrupt.reset_wanted.load(Ordering::Acquire));
}

#[test]
fn rings_stop_for_a_pause_and_go_on_where_they_stopped() {
    let mut rig = Rig::new(shared_memory());
    let mut runner = rig.activate();
    rig.greet(&mut runner, true);
    rig.started();
    runner.engine().drain();
    assert!(!runner.engine().drained());
    for (n, base) in [(0, 3u64), (1, 7)] {
        assert_eq!(rig.backend().expect(request::GET_VRING_BASE).state(), (n, 0));
        rig.backend().reply(request::GET_VRING_BASE, base << 32 | u64::from(n));
    }
    assert!(runner.engine().drained());
    runner.resume();
    let bases: Vec<u32> = rig.started().iter().map(|ring| ring.0).collect();
    assert_eq!(bases, [3, 7]);
}

#[test]
fn every_request_queue_has_rings_and_events_of_its_own() {
    let mut rig = Rig::with_queues(shared_memory(), 3);
    let mut config = [0; 40];
    rig.fs.read_config(0, &mut config);
    assert_eq!(config[36..], [3, 0, 0, 0]);
    assert_eq!(rig.fs.queue_sizes(), [128, 512, 512, 512]);
    let mut runner = rig.activate();
    rig.greet(&mut runner, true);
    let mut started = rig.started();
    assert_eq!(started.len(), 4);
    started[3].1.write_all(&1u64.to_ne_bytes()).unwrap();
    let interrupt = rig.interrupt.clone();
    assert!(runner.until(|| interrupt.queues.load(Ordering::Acquire) == 1));
    runner.engine().drain();
    for n in 0..4 {
        assert!(!runner.engine().drained());
        assert_eq!(rig.backend().expect(request::GET_VRING_BASE).state(), (n, 0));
        rig.backend().reply(request::GET_VRING_BASE, u64::from(n + 5) << 32 | u64::from(n));
    }
    assert!(runner.engine().drained());
    runner.resume();
    let bases: Vec<u32> = rig.started().iter().map(|ring| ring.0).collect();
    assert_eq!(bases, [5, 6, 7, 8]);
    // A server that dies leaves none of them without an answer.
    rig.backend = None;
    rig.queues[3].add(&[(REQUEST, 40)], &[(ANSWER, 16)]);
    rig.queues[3].kick();
    assert!(runner.until(|| rig.queues[3].used().is_some()), "the request hangs");
}

#[test]
fn the_number_of_queues_has_its_limits() {
    for (count, good) in [(0, false), (1, true), (15, true), (16, false), (u16::MAX, false)] {
        let (ours, _theirs) = UnixStream::pair().unwrap();
        assert_eq!(Fs::new("shares", ours.into(), count).is_ok(), good, "{count}");
    }
}

#[test]
fn a_reset_leaves_the_backend_ready_for_the_next_driver() {
    let mut rig = Rig::new(shared_memory());
    for round in 0..3 {
        let mut runner = rig.activate();
        rig.greet(&mut runner, round == 0);
        rig.started();
        runner.engine().drain();
        for n in 0..2 {
            rig.backend().expect(request::GET_VRING_BASE);
            rig.backend().reply(request::GET_VRING_BASE, n);
        }
        assert!(runner.engine().drained());
    }
}

#[test]
fn a_driver_that_resets_before_the_greeting_is_answered_changes_nothing() {
    let mut rig = Rig::new(shared_memory());
    let mut runner = rig.activate();
    runner.engine().drain();
    assert!(runner.engine().drained());
    drop(runner);
    let mut runner = rig.activate();
    rig.greet(&mut runner, true);
    rig.greet(&mut runner, false);
    rig.started();
}

#[test]
fn requests_of_a_backend_that_dies_are_answered_and_so_are_later_ones() {
    let mut rig = Rig::new(shared_memory());
    let mut runner = rig.activate();
    rig.greet(&mut runner, true);
    rig.started();
    rig.request(true);
    runner.settle(10);
    assert!(rig.queues[1].used().is_none());
    rig.backend = None;
    rig.refused(&mut runner);
    rig.request(false);
    rig.request(true);
    let queue = &mut rig.queues[1];
    assert!(runner.until(|| queue.used().is_some_and(|(_, len)| len == 0)));
    rig.refused(&mut runner);
    assert!(rig.fs.counters().errors() >= 4);
    // Also after the next activation.
    runner.engine().drain();
    assert!(runner.engine().drained());
    drop(runner);
    let mem = rig.mem.clone();
    mem.write_slice(&vec![0; 0x10000], GuestAddress(0x1000)).unwrap();
    rig.queues = queues(&mem, 0x1000, rig.fs.queue_sizes());
    let mut runner = rig.activate();
    rig.request(true);
    rig.refused(&mut runner);
}

#[test]
fn a_backend_that_dies_in_a_pause_is_found_dead_after_it() {
    let mut rig = Rig::new(shared_memory());
    let mut runner = rig.activate();
    rig.greet(&mut runner, true);
    rig.started();
    rig.request(true);
    runner.engine().drain();
    rig.backend = None;
    assert!(runner.engine().drained());
    runner.round(Duration::ZERO);
    assert!(rig.queues[1].used().is_none(), "nothing is answered in a pause");
    runner.resume();
    rig.refused(&mut runner);
}

#[test]
fn rubbish_and_missing_features_end_the_connection() {
    let answers: [&dyn Fn(&mut Backend); 4] = [
        &|b| b.reply(request::GET_FEATURES, features::VERSION_1),
        &|b| b.reply(request::GET_VRING_BASE, 0),
        &|b| b.0.write_all(&[0xff; 64]).unwrap(),
        &|b| b.0.shutdown(std::net::Shutdown::Write).unwrap(),
    ];
    for answer in answers {
        let mut rig = Rig::new(shared_memory());
        let mut runner = rig.activate();
        answer(rig.backend());
        rig.request(true);
        rig.refused(&mut runner);
    }
}

#[test]
fn a_backend_that_answers_for_a_queue_of_its_own_invention_is_lost() {
    let mut rig = Rig::new(shared_memory());
    let mut runner = rig.activate();
    rig.greet(&mut runner, true);
    rig.started();
    runner.engine().drain();
    rig.backend().reply(request::GET_VRING_BASE, 9);
    assert!(runner.engine().drained());
    runner.resume();
    rig.request(true);
    rig.refused(&mut runner);
}

#[test]
fn memory_without_a_file_cannot_be_served_and_says_so() {
    let mut rig = Rig::new(memory(SIZE));
    let mut runner = rig.activate();
    rig.greet(&mut runner, true);
    rig.request(true);
    rig.refused(&mut runner);
}

#[test]
fn an_odd_request_to_a_dead_backend_is_handed_back() {
    let mut rig = Rig::new(shared_memory());
    rig.backend = None;
    let mut runner = rig.activate();
    rig.queues[1].add(&[(REQUEST, 4)], &[(ANSWER, 64)]);
    rig.queues[1].add(&[], &[(ANSWER, 64)]);
    rig.queues[0].add(&[(REQUEST, 40)], &[(ANSWER, 8)]);
    for queue in &rig.queues {
        queue.kick();
    }
    runner.settle(20);
    assert_eq!(rig.queues[1].used().unwrap().1, 0);
    assert_eq!(rig.queues[1].used().unwrap().1, 0);
    assert_eq!(rig.queues[0].used().unwrap().1, 0);
}
