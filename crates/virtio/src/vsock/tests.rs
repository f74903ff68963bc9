mod guest;
mod stress;

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use self::guest::{CID, Guest, PORT};
use super::connection::BUFFER;
use super::spec::{Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, op};
use super::*;
use crate::mock::{MockInterrupt, Runner, activation, memory, queues};

/// A device with its listener, the guest, and the engine in a [`Runner`].
struct Rig {
    path: tempfile::TempDir,
    vsock: Vsock,
    runner: Runner,
    guest: Guest,
}

fn rig_with(max_connections: usize) -> Rig {
    let path = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(path.path().join("vsock.sock")).unwrap();
    let vsock = Vsock::new(CID, listener).unwrap();
    let mem = memory(16 << 20);
    let mut queues = queues(&mem, 0x1000, vsock.queue_sizes());
    let made = activation(&vsock, &queues, Arc::new(MockInterrupt::default()), features::COMMON);
    let engine = VsockEngine::new(
        CID,
        max_connections,
        vsock.listener.try_clone().unwrap(),
        take_queues(made.queues).unwrap(),
        vsock.counters(),
    );
    let runner = Runner::start(Box::new(engine)).unwrap();
    queues.truncate(2);
    let tx = queues.pop().unwrap();
    let rx = queues.pop().unwrap();
    Rig { path, vsock, runner, guest: Guest::new(mem, rx, tx) }
}

fn rig() -> Rig {
    rig_with(MAX_CONNECTIONS)
}

impl Rig {
    fn client(&self) -> UnixStream {
        let client = UnixStream::connect(self.path.path().join("vsock.sock")).unwrap();
        client.set_nonblocking(true).unwrap();
        client
    }

    fn step(&mut self) {
        self.guest.step();
        self.runner.round(Duration::ZERO);
    }

    fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
        }
    }

    /// Steps until `done` returns `true`; panics after 20,000 steps.
    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Guest) -> bool) {
        for _ in 0..20_000 {
            if done(&mut self.guest) {
                return;
            }
            self.step();
        }
        panic!("timed out: {what}");
    }

    /// A client connected to the guest, and its host port.
    fn connect(&mut self) -> (UnixStream, u32) {
        let mut client = self.client();
        client.write_all(format!("CONNECT {PORT}\n").as_bytes()).unwrap();
        let mut answer = Vec::new();
        self.until("OK", |_| {
            let mut byte = [0];
            while let Ok(1) = client.read(&mut byte) {
                answer.push(byte[0]);
            }
            answer.ends_with(b"\n")
        });
        let answer = String::from_utf8(answer).unwrap();
        let port = answer.strip_prefix("OK ").unwrap().trim_end().parse().unwrap();
        assert!(self.guest.sockets.contains_key(&port));
        (client, port)
    }
}

/// Reads all available bytes; `true` at the end of the stream.
fn drain(client: &mut UnixStream, into: &mut Vec<u8>) -> bool {
    let mut piece = [0; 8192];
    loop {
        match client.read(&mut piece) {
            Ok(0) => return true,
            Ok(len) => into.extend_from_slice(&piece[..len]),
            Err(e) if e.kind() == ErrorKind::WouldBlock => return false,
            Err(e) if e.kind() == ErrorKind::ConnectionReset => return true,
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn a_client_is_connected_and_bytes_pass_in_both_directions() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    client.write_all(b"ping").unwrap();
    rig.until("ping", |guest| guest.sockets[&port].received == b"ping");
    rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(b"pong");
    let mut got = Vec::new();
    rig.until("pong", |_| {
        drain(&mut client, &mut got);
        got == b"pong"
    });
}

#[test]
fn bytes_after_the_connect_line_are_data() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONNECT 1024\nearly data").unwrap();
    rig.until("data", |guest| guest.sockets.values().any(|s| s.received == b"early data"));
}

#[test]
fn a_port_without_a_listener_closes_the_client_without_an_answer() {
    let mut rig = rig();
    let mut client = rig.client();
    client.write_all(b"CONNECT 9\n").unwrap();
    let mut got = Vec::new();
    rig.until("end", |_| drain(&mut client, &mut got));
    assert!(got.is_empty());
}

#[test]
fn a_client_with_an_invalid_connect_line_is_closed_and_counted() {
    let mut rig = rig();
    for line in ["GET / HTTP/1.1\r\n", "CONNECT x\n", &"C".repeat(100)] {
        let mut client = rig.client();
        client.write_all(line.as_bytes()).unwrap();
        let mut got = Vec::new();
        rig.until("end", |_| drain(&mut client, &mut got));
        assert!(got.is_empty());
    }
    assert_eq!(rig.vsock.counters().errors(), 3);
    assert!(rig.guest.log.is_empty());
}

#[test]
fn a_half_closed_client_still_receives_data_and_the_end_of_stream() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    client.write_all(b"question").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    rig.until("end of the question", |guest| guest.sockets[&port].shut_by_host == SHUTDOWN_SEND);
    assert_eq!(rig.guest.sockets[&port].received, b"question");
    rig.steps(50);
    let answer = vec![7; 300_000];
    rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(&answer);
    let mut got = Vec::new();
    rig.until("answer", |guest| {
        assert!(!drain(&mut client, &mut got));
        guest.sockets[&port].to_send.is_empty()
    });
    rig.guest.shutdown(port, SHUTDOWN_BOTH);
    rig.until("end of the answer", |_| drain(&mut client, &mut got));
    assert_eq!(got, answer);
    rig.until("RST", |guest| guest.sockets[&port].reset);
}

#[test]
fn a_half_closed_guest_still_receives_data() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(b"bye");
    rig.guest.step();
    rig.guest.shutdown(port, SHUTDOWN_SEND);
    let mut got = Vec::new();
    rig.until("end", |_| drain(&mut client, &mut got));
    assert_eq!(got, b"bye");
    rig.steps(50);
    assert!(!rig.guest.sockets[&port].reset);
    client.write_all(b"not yet").unwrap();
    drop(client);
    rig.until("reset", |guest| guest.sockets[&port].reset);
    assert_eq!(rig.guest.sockets[&port].received, b"not yet");
}

#[test]
fn after_shutdown_receive_of_the_guest_the_client_s_writes_fail() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    rig.guest.shutdown(port, SHUTDOWN_RECEIVE);
    rig.until("EPIPE", |_| client.write(b"x").is_err_and(|e| e.kind() == ErrorKind::BrokenPipe));
    rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(b"still talking");
    let mut got = Vec::new();
    rig.until("data", |_| {
        drain(&mut client, &mut got);
        got == b"still talking"
    });
}

#[test]
fn data_of_a_client_that_disconnects_at_once_arrives_completely() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    client.set_nonblocking(false).unwrap();
    client.write_all(&vec![3; 100_000]).unwrap();
    drop(client);
    rig.until("everything", |guest| {
        guest.consume(port, 10_000);
        guest.sockets[&port].reset
    });
    assert_eq!(rig.guest.sockets[&port].received, vec![3; 100_000]);
}

#[test]
fn a_guest_that_does_not_read_blocks_the_client_without_busy_looping() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    let data: Vec<u8> = (0..1_000_000u32).map(|n| (n / 7) as u8).collect();
    let mut written = 0;
    for _ in 0..500 {
        if let Ok(len) = client.write(&data[written..]) {
            written += len;
        }
        rig.step();
    }
    assert!(written < data.len());
    assert_eq!(rig.guest.sockets[&port].received.len(), 64 << 10);
    let requests = rig.guest.log.iter().filter(|h| h.op == op::CREDIT_REQUEST).count();
    assert!((1..4).contains(&requests), "{requests} CREDIT_REQUESTs");
    assert!(rig.runner.settle(10), "a connection without credit must not keep the worker busy");
    rig.until("everything", |guest| {
        if let Ok(len) = client.write(&data[written..]) {
            written += len;
        }
        guest.consume(port, 5000);
        guest.sockets[&port].received.len() == data.len()
    });
    assert_eq!(rig.guest.sockets[&port].received, data);
}

#[test]
fn a_client_that_does_not_read_uses_no_more_than_its_buffer_and_loses_nothing() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    let data: Vec<u8> = (0..2_000_000u32).map(|n| (n / 5) as u8).collect();
    rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(&data);
    rig.steps(500);
    let left = rig.guest.sockets[&port].to_send.len();
    // The announced buffer, and the buffer of the unix socket.
    assert!(data.len() - left < BUFFER as usize + (1 << 20));
    assert_eq!(rig.guest.sockets[&port].credit(), 0);
    assert!(rig.runner.settle(10), "a slow client must not keep the worker busy");
    let mut got = Vec::new();
    rig.until("everything", |_| {
        let mut piece = [0; 3000];
        if let Ok(len) = client.read(&mut piece) {
            got.extend_from_slice(&piece[..len]);
        }
        got.len() == data.len()
    });
    assert_eq!(got, data);
    // The guest closes the connection after its last data: the client still receives that.
    rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(&data[..100_000]);
    rig.until("sent", |guest| guest.sockets[&port].to_send.is_empty());
    rig.guest.shutdown(port, SHUTDOWN_BOTH);
    rig.until("RST", |guest| guest.sockets[&port].reset);
    let mut rest = Vec::new();
    rig.until("rest", |_| drain(&mut client, &mut rest));
    assert_eq!(rest, data[..100_000]);
}

#[test]
fn a_guest_that_sends_beyond_its_credit_is_reset() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    for _ in 0..40 {
        let header = rig.guest.header(port, PORT, op::RW);
        rig.guest.raw(Header { len: 0x1_0000, ..header }, &vec![1; 0x1_0000]);
    }
    rig.until("RST", |guest| guest.sockets[&port].reset);
    let mut got = Vec::new();
    rig.until("end", |_| drain(&mut client, &mut got));
    assert!(rig.vsock.counters().errors() >= 1);
    // The device still works.
    rig.connect();
}

#[test]
fn invalid_packets_are_answered_with_rst_or_not_at_all() {
    let mut rig = rig();
    rig.steps(5);
    let normal = rig.guest.header(99, 55, op::REQUEST);
    let resets = [
        normal,
        Header { op: op::RW, ..normal },
        Header { op: 77, ..normal },
        Header { kind: 2, ..normal },
        Header { dst_cid: 9, ..normal },
    ];
    let silent = [
        Header { op: op::RST, ..normal },
        Header { src_cid: CID + 1, ..normal },
        Header { src_cid: 2, dst_cid: CID, ..normal },
    ];
    for header in resets.iter().chain(&silent) {
        rig.guest.raw(*header, b"");
    }
    rig.steps(50);
    assert_eq!(rig.guest.log.len(), resets.len());
    for (answer, sent) in rig.guest.log.iter().zip(&resets) {
        assert_eq!(answer.op, op::RST);
        assert_eq!((answer.src_cid, answer.src_port), (sent.dst_cid, sent.dst_port));
        assert_eq!((answer.dst_cid, answer.dst_port), (CID, sent.src_port));
    }
    assert_eq!(rig.vsock.counters().errors(), 7);
}

#[test]
fn packets_that_the_phase_does_not_allow_reset_the_connection() {
    for bad in [op::REQUEST, op::RESPONSE, 0, 99] {
        let mut rig = rig();
        let (mut client, port) = rig.connect();
        rig.guest.send(port, PORT, bad, 0);
        rig.until("RST", |guest| guest.sockets[&port].reset);
        rig.until("end", |_| drain(&mut client, &mut Vec::new()));
    }
    // A packet whose length field exceeds its chain.
    let mut rig = rig();
    let (_client, port) = rig.connect();
    let header = rig.guest.header(port, PORT, op::RW);
    rig.guest.raw(Header { len: 100, ..header }, b"short");
    rig.until("RST", |guest| guest.sockets[&port].reset);
    // A known host port with another guest port.
    let (mut client, port) = rig.connect();
    rig.guest.send(port, PORT + 1, op::RST, 0);
    rig.steps(20);
    client.write_all(b"alive").unwrap();
    rig.until("data", |guest| guest.sockets[&port].received == b"alive");
}

#[test]
fn without_receive_buffers_data_waits_for_the_driver_s_kick() {
    let mut rig = rig();
    let (mut client, port) = rig.connect();
    rig.guest.give_buffers = false;
    let data: Vec<u8> = (0..600_000u32).map(|n| (n / 3) as u8).collect();
    let mut written = 0;
    for _ in 0..300 {
        if let Ok(len) = client.write(&data[written..]) {
            written += len;
        }
        rig.guest.consume(port, usize::MAX);
        rig.step();
    }
    assert!(rig.runner.settle(10), "a full ring must not keep the worker busy");
    rig.guest.give_buffers = true;
    rig.until("everything", |guest| {
        if let Ok(len) = client.write(&data[written..]) {
            written += len;
        }
        guest.consume(port, usize::MAX);
        guest.sockets[&port].received.len() == data.len()
    });
    assert_eq!(rig.guest.sockets[&port].received, data);
}

#[test]
fn clients_over_the_limit_wait_until_a_connection_ends() {
    let mut rig = rig_with(3);
    let mut connected: Vec<_> = (0..3).map(|_| rig.connect()).collect();
    let mut late = rig.client();
    late.write_all(b"CONNECT 1024\n").unwrap();
    rig.steps(100);
    assert_eq!(rig.guest.sockets.len(), 3);
    assert!(rig.runner.settle(10), "waiting clients must not keep the worker busy");
    let (gone, port) = connected.remove(0);
    drop(gone);
    rig.until("reset", |guest| guest.sockets[&port].reset);
    rig.until("the fourth connection", |guest| guest.sockets.len() == 4);
}

#[test]
fn a_credit_request_of_the_guest_is_answered() {
    let mut rig = rig();
    let (_client, port) = rig.connect();
    rig.guest.send(port, PORT, op::CREDIT_REQUEST, 0);
    rig.until("update", |guest| guest.log.iter().any(|h| h.op == op::CREDIT_UPDATE));
    assert_eq!(rig.guest.log.last().unwrap().buf_alloc, BUFFER);
}

#[test]
fn reserved_cids_are_refused() {
    let path = tempfile::tempdir().unwrap();
    for cid in [0, 1, 2, u64::from(u32::MAX), 1 << 40] {
        let listener = UnixListener::bind(path.path().join(cid.to_string())).unwrap();
        assert!(matches!(Vsock::new(cid, listener), Err(VsockError::Cid { .. })));
    }
}
