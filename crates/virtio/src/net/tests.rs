use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

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
}

fn rig(features: u64) -> Rig {
    let (tap, wire) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    wire.set_nonblocking(true).unwrap();
    let mut net = Net::over_packets(File::from(OwnedFd::from(tap)), MAC, 1500).unwrap();
    let mem = memory(4 << 20);
    let mut queues = queues(&mem, 0x1000, net.queue_sizes());
    let interrupt = Arc::new(MockInterrupt::default());
    let made = activation(&net, &queues, interrupt, net.features() & features);
    let runner = Runner::start(net.activate(made).unwrap()).unwrap();
    let tx = queues.pop().unwrap();
    let rx = queues.pop().unwrap();
    Rig { mem, rx, tx, runner, wire, net }
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
