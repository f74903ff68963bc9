use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;
use std::sync::atomic::Ordering;
use std::time::Duration;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use super::spec::{HEADER_LEN, MAX_PACKET};
use super::*;
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
