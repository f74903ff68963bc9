use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::spec::{HEADER_LEN, MAX_PACKET, NUM_BUFFERS};
use super::*;
use crate::Worker;
use crate::mock::{MockInterrupt, MockQueue, Runner, activation, memory, queues};

const MAC: [u8; 6] = [2, 0, 0, 0, 0, 1];
const DATA: u64 = 0x10_0000;

/// A device whose tap is one end of a datagram socket pair; `wire` is the other.
struct Rig {
    mem: Arc<GuestMemoryMmap>,
    rx: MockQueue,
    tx: MockQueue,
    runner: Runner,
    wire: UnixDatagram,
    net: Net,
    interrupt: Arc<MockInterrupt>,
}

impl Rig {
    fn interrupts(&self) -> u64 {
        self.interrupt.queues.load(Ordering::Acquire)
    }
}

/// Calls of read, readv and the like that `run` makes on this thread (proc(5), io).
fn reads(run: impl FnOnce()) -> u64 {
    let count = || {
        let text = std::fs::read_to_string("/proc/thread-self/io").unwrap();
        text.lines().find_map(|l| l.strip_prefix("syscr: ")).unwrap().parse::<u64>().unwrap()
    };
    // Reading the file itself takes some.
    let first = count();
    let own = count() - first;
    let before = count();
    run();
    count() - before - own
}

fn rig(features: u64) -> Rig {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    let mut net = Net::over_packets(File::from(OwnedFd::from(tap)), MAC, 1500).unwrap();
    let mem = memory(4 << 20);
    let mut queues = queues(&mem, 0x1000, net.queue_sizes());
    let interrupt = Arc::new(MockInterrupt::default());
    let made = activation(&net, &queues, interrupt.clone(), net.features() & features);
    let runner = Runner::start(net.activate(made).unwrap()).unwrap();
    let tx = queues.pop().unwrap();
    let rx = queues.pop().unwrap();
    Rig { mem, rx, tx, runner, wire, net, interrupt }
}

fn packet(len: usize, seed: u8) -> Vec<u8> {
    let body = (0..len - HEADER_LEN).map(|n| (n as u8).wrapping_add(seed));
    [0; HEADER_LEN].into_iter().chain(body).collect()
}

#[test]
fn a_packet_from_the_guest_reaches_the_tap_whole_with_its_header() {
    let mut rig = rig(u64::MAX);
    let sent = packet(1000, 1);
    rig.mem.write_slice(&sent, GuestAddress(DATA)).unwrap();
    rig.tx.add(&[(DATA, 12), (DATA + 12, 88), (DATA + 100, 900)], &[]);
    rig.tx.kick();
    assert!(rig.runner.settle(10));
    let mut got = vec![0; 2000];
    let len = rig.wire.recv(&mut got).unwrap();
    assert_eq!(got[..len], sent);
    assert_eq!(rig.tx.used().unwrap().1, 0);
    assert_eq!(rig.net.counters().operations(), 1);
}

#[test]
fn packets_of_invalid_length_are_dropped_and_counted() {
    let mut rig = rig(u64::MAX);
    rig.tx.add(&[(DATA, 25)], &[]);
    rig.tx.add(&[(DATA, 60000), (DATA, 6000)], &[]);
    rig.tx.add(&[], &[(DATA, 100)]);
    rig.tx.kick();
    assert!(rig.runner.settle(10));
    assert_eq!(std::iter::from_fn(|| rig.tx.used()).count(), 3);
    assert_eq!(rig.net.counters().errors(), 3);
    assert!(rig.wire.recv(&mut [0; 100]).is_err());
}

#[test]
fn a_received_packet_is_split_over_buffers_and_num_buffers_is_set() {
    let mut rig = rig(u64::MAX);
    for n in 0..4 {
        rig.rx.add(&[], &[(DATA + n * 0x1000, 400)]);
    }
    rig.rx.kick();
    let sent = packet(1000, 9);
    rig.wire.send(&sent).unwrap();
    assert!(rig.runner.settle(10));
    let used: Vec<u32> = std::iter::from_fn(|| rig.rx.used()).map(|u| u.1).collect();
    assert_eq!(used, [400, 400, 200]);
    let mut got = vec![0; 1200];
    for n in 0..3 {
        let part = &mut got[400 * n..400 * (n + 1)];
        rig.mem.read_slice(part, GuestAddress(DATA + 0x1000 * n as u64)).unwrap();
    }
    assert_eq!(got[10..12], [3, 0]);
    assert_eq!(got[12..1000], sent[12..]);
}

#[test]
fn packets_wait_for_buffers_and_arrive_in_order() {
    let mut rig = rig(u64::MAX);
    for seed in 0..5 {
        rig.wire.send(&packet(600, seed)).unwrap();
    }
    assert!(rig.runner.settle(20), "no buffers must not keep the worker busy");
    for seed in 0..5u8 {
        assert!(rig.rx.used().is_none());
        rig.rx.add(&[], &[(DATA, 300)]);
        rig.rx.kick();
        assert!(rig.runner.settle(20));
        assert!(rig.rx.used().is_none());
        rig.rx.add(&[], &[(DATA + 300, 300)]);
        rig.rx.kick();
        assert!(rig.runner.settle(20));
        assert_eq!(std::iter::from_fn(|| rig.rx.used()).count(), 2);
        let mut got = vec![0; 588];
        rig.mem.read_slice(&mut got, GuestAddress(DATA + 12)).unwrap();
        assert_eq!(got, packet(600, seed)[12..]);
    }
    assert_eq!(rig.net.counters().errors(), 0);
}

#[test]
fn without_mrg_rxbuf_a_packet_larger_than_a_buffer_is_dropped_and_the_buffer_kept() {
    let mut rig = rig(!F_MRG_RXBUF);
    rig.rx.add(&[], &[(DATA, 500)]);
    rig.rx.kick();
    rig.wire.send(&packet(600, 1)).unwrap();
    rig.wire.send(&packet(500, 2)).unwrap();
    assert!(rig.runner.settle(20));
    assert_eq!(rig.rx.used().unwrap().1, 500);
    assert_eq!(rig.mem.read_obj::<u16>(GuestAddress(DATA + 10)).unwrap(), 1);
    assert_eq!(rig.net.counters().errors(), 1);
}

#[test]
fn the_largest_packet_passes_in_both_directions() {
    let mut rig = rig(u64::MAX);
    let big = packet(MAX_PACKET, 3);
    rig.mem.write_slice(&big, GuestAddress(DATA)).unwrap();
    rig.tx.add(&[(DATA, MAX_PACKET as u32)], &[]);
    rig.tx.kick();
    assert!(rig.runner.settle(10));
    let mut got = vec![0; MAX_PACKET + 1];
    assert_eq!(rig.wire.recv(&mut got).unwrap(), MAX_PACKET);
    for n in 0..44 {
        rig.rx.add(&[], &[(DATA + 0x20000 + n * 1526, 1526)]);
    }
    rig.rx.kick();
    rig.wire.send(&big).unwrap();
    assert!(rig.runner.settle(10));
    let total: u32 = std::iter::from_fn(|| rig.rx.used()).map(|u| u.1).sum();
    assert_eq!(total, MAX_PACKET as u32);
}

/// Sends packets like a driver that notifies only if the device asks for it: one between two rounds
/// of the worker.
#[test]
fn a_driver_that_goes_on_sending_notifies_once() {
    let mut rig = rig(u64::MAX);
    assert!(rig.runner.settle(10));
    let mut kicks = 0;
    for _ in 0..50 {
        rig.tx.add(&[(DATA, 100)], &[]);
        kicks += u32::from(rig.tx.notify());
        rig.runner.round(Duration::ZERO);
        assert_eq!(rig.tx.used().unwrap().1, 0, "sent in the same round");
        rig.wire.recv(&mut [0; 200]).unwrap();
    }
    assert_eq!(kicks, 1);
    assert!(rig.runner.settle(10), "without packets it does not go on polling");
    rig.tx.add(&[(DATA, 100)], &[]);
    assert!(rig.tx.notify(), "an idle device asks for notifications");
    assert!(rig.runner.settle(10));
    assert!(rig.tx.used().is_some());
}

#[test]
fn packets_of_one_round_are_one_interrupt() {
    let mut rig = rig(!features::RING_EVENT_IDX);
    for _ in 0..64 {
        rig.tx.add(&[(DATA, 100)], &[]);
        rig.rx.add(&[], &[(DATA + 0x1000, 1526)]);
    }
    rig.tx.kick();
    // Datagrams that a socket holds; the guest's packets go out beside them.
    for _ in 0..8 {
        rig.wire.send(&packet(100, 1)).unwrap();
    }
    rig.runner.round(Duration::ZERO);
    assert_eq!(std::iter::from_fn(|| rig.rx.used()).count(), 8);
    assert!(rig.tx.used().is_some());
    assert_eq!(rig.interrupts(), 2);
}

#[test]
fn without_event_idx_a_driver_that_polls_is_not_interrupted() {
    let mut rig = rig(!features::RING_EVENT_IDX);
    rig.tx.set_flags(1);
    rig.tx.add(&[(DATA, 100)], &[]);
    rig.tx.kick();
    assert!(rig.runner.settle(10));
    assert_eq!(rig.interrupts(), 0);
    rig.tx.set_flags(0);
    rig.tx.add(&[(DATA, 100)], &[]);
    rig.tx.kick();
    assert!(rig.runner.settle(10));
    assert_eq!(rig.interrupts(), 1);
}

/// A call that finds the tap empty, and one for each packet. The eventfds of the queues are read
/// only when they were signalled.
#[test]
fn a_packet_takes_one_call_and_a_round_without_a_kick_reads_no_eventfd() {
    let mut rig = rig(u64::MAX);
    for n in 0..50 {
        rig.rx.add(&[], &[(DATA + n * 0x1000, 1526)]);
    }
    assert!(rig.runner.settle(10));
    for _ in 0..4 {
        rig.wire.send(&packet(1000, 1)).unwrap();
    }
    let calls = reads(|| assert!(rig.runner.settle(10)));
    assert_eq!(std::iter::from_fn(|| rig.rx.used()).count(), 4);
    assert_eq!(calls, 4 + 1);
    rig.tx.add(&[(DATA, 100)], &[]);
    rig.tx.kick();
    let calls = reads(|| assert!(rig.runner.settle(10)));
    assert!(rig.tx.used().is_some());
    assert_eq!(calls, 1);
}

/// A packet is read straight into receive buffers that could hold any packet: it uses the first of
/// them, the header lies across two, and the rest is there for the next packet.
#[test]
fn a_packet_read_into_receive_buffers_uses_as_many_as_it_needs() {
    let mut rig = rig(u64::MAX);
    let buffer = |n: u64| DATA + n * 0x1000;
    for n in 0..40 {
        rig.rx.add(&[], &[(buffer(n), 11), (buffer(n) + 0x400, 1989)]);
    }
    let sent = [packet(3000, 7), packet(1000, 8), packet(MAX_PACKET, 9)];
    for packet in &sent {
        rig.wire.send(packet).unwrap();
    }
    assert!(rig.runner.settle(10));
    let used: Vec<u32> = std::iter::from_fn(|| rig.rx.used()).map(|u| u.1).collect();
    assert_eq!(used[..5], [2000, 1000, 1000, 2000, 2000]);
    assert_eq!(used.len(), 3 + 33);
    let mut first = 0;
    for packet in &sent {
        let count = packet.len().div_ceil(2000);
        let mut got = Vec::new();
        for n in first..first + count as u64 {
            for (at, len) in [(buffer(n), 11), (buffer(n) + 0x400, 1989)] {
                let mut part = vec![0; len];
                rig.mem.read_slice(&mut part, GuestAddress(at)).unwrap();
                got.extend(part);
            }
        }
        assert_eq!(got[10..12], (count as u16).to_le_bytes());
        assert_eq!(got[12..packet.len()], packet[12..]);
        first += count as u64;
    }
}

/// A driver on its own thread reads the used index all the time. Section 5.1.6.4: it finds a packet's
/// buffers together, whether the packet was read into them or copied.
#[test]
fn a_driver_that_polls_finds_all_buffers_of_a_packet() {
    const PACKETS: u64 = 200;
    for (buffers, size) in [(256, 260), (200, 250)] {
        let Rig { mem, mut rx, mut runner, wire, net, .. } = rig(u64::MAX);
        let buffer = |head: u16| (DATA + 0x1000 * u64::from(head), size);
        let fill = |rx: &mut MockQueue, count: u16| {
            for _ in 0..count {
                let head = rx.next_free();
                rx.add(&[], &[buffer(head)]);
            }
            rx.kick();
        };
        let (received, partial) = (AtomicU64::new(0), AtomicBool::new(false));
        let driver = || {
            fill(&mut rx, buffers);
            while received.load(Ordering::Acquire) < PACKETS {
                let unread = rx.unread();
                if unread == 0 {
                    continue;
                }
                let (head, _) = rx.used().unwrap();
                let at = GuestAddress(buffer(head).0 + NUM_BUFFERS as u64);
                let count = u16::from_le(mem.read_obj(at).unwrap());
                if unread < count {
                    partial.store(true, Ordering::Release);
                    return Some((unread, count));
                }
                assert_eq!(std::iter::from_fn(|| rx.used()).count(), usize::from(count - 1));
                fill(&mut rx, count);
                received.fetch_add(1, Ordering::AcqRel);
            }
            None
        };
        let seen = std::thread::scope(|scope| {
            let driver = scope.spawn(driver);
            let sent = packet(usize::from(buffers.min(252)) * size as usize, 1);
            for n in 1..=PACKETS {
                wire.send(&sent).unwrap();
                let done = || received.load(Ordering::Acquire) == n;
                let stopped = || partial.load(Ordering::Acquire);
                if !runner.until(|| done() || stopped()) || stopped() {
                    break;
                }
            }
            driver.join().unwrap()
        });
        assert_eq!(seen, None, "buffers visible, buffers of the packet");
        assert_eq!((net.counters().operations(), net.counters().errors()), (PACKETS, 0));
    }
}

/// The device needs a reset once it finds the ring invalid. It has then no right to the buffers that
/// it took before.
#[test]
fn an_invalid_ring_ends_the_use_of_receive_buffers_taken_before() {
    let mut rig = rig(u64::MAX);
    for n in 0..8 {
        rig.rx.add(&[], &[(DATA + n * 0x2000, 0x2000)]);
    }
    rig.rx.kick();
    assert!(rig.runner.settle(10));
    rig.wire.send(&packet(1000, 1)).unwrap();
    assert!(rig.runner.settle(10));
    assert_eq!(rig.rx.used().unwrap().1, 1000);
    let index = rig.rx.used_index();

    rig.rx.set_avail(5000);
    rig.rx.kick();
    for seed in 2..5 {
        rig.wire.send(&packet(1000, seed)).unwrap();
    }
    assert!(rig.runner.settle(10), "an invalid ring must not keep the worker busy");
    assert!(rig.interrupt.reset_wanted.load(Ordering::Acquire));
    let mut after = vec![0; 7 * 0x2000];
    rig.mem.read_slice(&mut after, GuestAddress(DATA + 0x2000)).unwrap();
    assert!(after.iter().all(|byte| *byte == 0), "written after the ring was found invalid");
    assert_eq!((rig.rx.used_index(), rig.net.counters().operations()), (index, 1));

    let Rig { mem, runner, mut net, wire, .. } = rig;
    drop(runner);
    receives_after_reset(&mem, &mut net, &wire);
}

/// A driver that resets the device has its buffers back once the status reads 0.
#[test]
fn a_reset_ends_the_use_of_receive_buffers() {
    let Rig { mem, runner, mut net, wire, .. } = rig(u64::MAX);
    drop(runner);
    let mut queues = queues(&mem, 0x1000, net.queue_sizes());
    let interrupt = Arc::new(MockInterrupt::default());
    let made = activation(&net, &queues, interrupt.clone(), net.features());
    let worker = Worker::spawn("test", || {}).unwrap();
    let limit = Duration::from_secs(10);
    for n in 0..40 {
        queues[0].add(&[], &[(DATA + n * 0x1000, 0x800)]);
    }
    let attached = worker.handle().attach(net.activate(made).unwrap(), interrupt).unwrap();
    // The engine has taken all buffers when the first of them is used.
    wire.send(&packet(1000, 1)).unwrap();
    let end = Instant::now() + limit;
    while queues[0].unread() == 0 {
        assert!(Instant::now() < end, "no packet received");
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(attached.detach().wait(limit));

    let len = 40 * 0x1000;
    mem.write_slice(&vec![0xee; len], GuestAddress(DATA)).unwrap();
    for seed in 2..5 {
        wire.send(&packet(1000, seed)).unwrap();
    }
    // The worker has handled what was ready.
    worker.handle().pause(limit).unwrap();
    worker.handle().resume().unwrap();
    worker.handle().pause(limit).unwrap();
    let mut after = vec![0; len];
    mem.read_slice(&mut after, GuestAddress(DATA)).unwrap();
    assert!(after.iter().all(|byte| *byte == 0xee), "written after the reset");
    assert_eq!(queues[0].used_index(), 1);
    receives_after_reset(&mem, &mut net, &wire);
}

/// A new driver with new rings receives the next packet.
fn receives_after_reset(mem: &Arc<GuestMemoryMmap>, net: &mut Net, wire: &UnixDatagram) {
    mem.write_slice(&vec![0; 0x8000], GuestAddress(0x1000)).unwrap();
    let mut queues = queues(mem, 0x1000, net.queue_sizes());
    let interrupt = Arc::new(MockInterrupt::default());
    let made = activation(net, &queues, interrupt.clone(), net.features());
    let mut runner = Runner::start(net.activate(made).unwrap()).unwrap();
    for n in 0..40 {
        queues[0].add(&[], &[(DATA + n * 0x1000, 0x800)]);
    }
    queues[0].kick();
    wire.send(&packet(777, 9)).unwrap();
    assert!(runner.settle(20));
    let lengths: Vec<u32> = std::iter::from_fn(|| queues[0].used()).map(|used| used.1).collect();
    assert_eq!(lengths.last(), Some(&777));
    assert!(!interrupt.reset_wanted.load(Ordering::Acquire));
}

/// Attack: receive buffers of more pieces than one system call takes.
#[test]
fn receive_buffers_of_many_pieces_are_filled_whole() {
    let mut rig = rig(u64::MAX);
    let pieces: Vec<(u64, u32)> = (0..1000).map(|n| (DATA + n * 64, 33)).collect();
    for table in 0..3 {
        rig.rx.add_indirect(0x30_0000 + table * 0x8000, &[], &pieces);
    }
    let sent = packet(60_000, 5);
    rig.wire.send(&sent).unwrap();
    assert!(rig.runner.settle(10));
    let used: Vec<u32> = std::iter::from_fn(|| rig.rx.used()).map(|u| u.1).collect();
    assert_eq!(used, [33_000, 27_000]);
    assert_eq!(rig.net.counters().errors(), 0);
    let mut got = [0; 33];
    // The second buffer was written last.
    rig.mem.read_slice(&mut got, GuestAddress(DATA)).unwrap();
    assert_eq!(got[..], sent[33_000..33_033]);
}

#[test]
fn tap_offloads_follow_the_negotiated_features() {
    assert_eq!(spec::tap_offloads(0), 0);
    assert_eq!(spec::tap_offloads(F_GUEST_TSO4), 0);
    assert_eq!(spec::tap_offloads(F_GUEST_CSUM), 1);
    assert_eq!(spec::tap_offloads(F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6), 7);
}

#[test]
fn files_that_are_not_taps_and_invalid_addresses_are_refused() {
    let file = tempfile::tempfile().unwrap();
    assert!(matches!(Net::new(file.try_clone().unwrap(), MAC, 1500), Err(NetError::Tap(_))));
    let refused = Net::over_packets(file.try_clone().unwrap(), MAC, 60);
    assert!(matches!(refused, Err(NetError::Mtu { mtu: 60 })));
    let refused = Net::over_packets(file, [1, 0, 0, 0, 0, 0], 1500);
    assert!(matches!(refused, Err(NetError::Mac { .. })));
}
