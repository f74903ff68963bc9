//! Many connections at once with different amounts of data and reading speeds.

use proptest::prelude::*;

use super::*;

struct Session {
    client: UnixStream,
    port: u32,
    to_guest: Vec<u8>,
    written: usize,
    to_host: Vec<u8>,
    got: Vec<u8>,
    /// Bytes that a side reads per step, at most.
    client_pace: usize,
    guest_pace: usize,
    client_shut: bool,
    client_saw_end: bool,
    guest_shut: bool,
}

impl Session {
    fn step(&mut self, guest: &mut Guest) {
        while self.written < self.to_guest.len() {
            match self.client.write(&self.to_guest[self.written..]) {
                Ok(len) => self.written += len,
                Err(e) if e.kind() == ErrorKind::WouldBlock => break,
                Err(e) => panic!("{e}"),
            }
        }
        if self.written == self.to_guest.len() && !self.client_shut {
            self.client_shut = true;
            self.client.shutdown(Shutdown::Write).unwrap();
        }
        let mut piece = vec![0; self.client_pace];
        match self.client.read(&mut piece) {
            Ok(0) => self.client_saw_end = true,
            Ok(len) => self.got.extend_from_slice(&piece[..len]),
            Err(e) => assert_eq!(e.kind(), ErrorKind::WouldBlock),
        }
        guest.consume(self.port, self.guest_pace);
        if !self.guest_shut && guest.sockets[&self.port].to_send.is_empty() {
            self.guest_shut = true;
            guest.shutdown(self.port, SHUTDOWN_SEND);
        }
    }

    fn done(&self, guest: &Guest) -> bool {
        let host_shut = guest.sockets[&self.port].shut_by_host & SHUTDOWN_SEND != 0;
        self.client_saw_end && host_shut
    }
}

fn bytes(len: usize, seed: u64) -> Vec<u8> {
    let mut state = seed | 1;
    let next = move || {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    std::iter::repeat_with(next).take(len).collect()
}

fn run_sessions(rig: &mut Rig, plans: &[(usize, usize, usize, usize, u32)]) {
    let mut sessions = Vec::new();
    for (n, (up, down, client_pace, guest_pace, alloc)) in plans.iter().enumerate() {
        rig.guest.alloc = *alloc;
        let (client, port) = rig.connect();
        let to_host = bytes(*down, 1000 + n as u64);
        rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(&to_host);
        sessions.push(Session {
            client,
            port,
            to_guest: bytes(*up, n as u64),
            written: 0,
            to_host,
            got: Vec::new(),
            client_pace: *client_pace,
            guest_pace: *guest_pace,
            client_shut: false,
            client_saw_end: false,
            guest_shut: false,
        });
    }
    for _ in 0..200_000 {
        for session in &mut sessions {
            session.step(&mut rig.guest);
        }
        rig.step();
        if sessions.iter().all(|t| t.done(&rig.guest)) {
            break;
        }
    }
    for session in &sessions {
        assert!(session.done(&rig.guest), "a session did not end");
        assert!(session.got == session.to_host, "bytes to the host differ");
        assert!(
            rig.guest.sockets[&session.port].received == session.to_guest,
            "bytes to the guest differ"
        );
    }
    let ports: Vec<u32> = sessions.iter().map(|t| t.port).collect();
    drop(sessions);
    rig.until("all reset", |guest| ports.iter().all(|p| guest.sockets[p].reset));
}

#[test]
fn a_hundred_sessions_at_different_speeds_transfer_all_bytes_and_free_their_slots() {
    let mut rig = rig_with(100);
    let plans: Vec<_> = (0..100usize)
        .map(|n| {
            let up = n * n * 37 % 300_000;
            let down = n * n * 53 % 250_000;
            let alloc = [4096, 16 << 10, 64 << 10, 256 << 10][n % 4];
            (up, down, 1 + n * 97 % 20_000, 1 + n * 71 % 20_000, alloc)
        })
        .map(|(up, down, a, b, alloc)| (up, down, a.max(500), b.max(500), alloc))
        .collect();
    run_sessions(&mut rig, &plans);
    // All hundred slots are free again.
    run_sessions(&mut rig, &plans[..10]);
    assert_eq!(rig.vsock.counters().errors(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn all_bytes_arrive_for_any_sizes_and_speeds(
        plans in prop::collection::vec(
            (0usize..200_000, 0usize..200_000, 200usize..70_000, 200usize..70_000, 100u32..300_000),
            1..8,
        )
    ) {
        let mut rig = rig();
        run_sessions(&mut rig, &plans);
    }

    /// Arbitrary packets: nothing panics, and another connection is not disturbed.
    #[test]
    fn arbitrary_packets_do_not_disturb_another_connection(
        packets in prop::collection::vec(
            (0u64..4, 0u64..4, 0u32..4, any::<u32>(), 0u16..3, 0u16..9, any::<u32>(), any::<u32>(), any::<u32>()),
            0..60,
        )
    ) {
        let mut rig = rig();
        let (_victim, hostile) = rig.connect();
        let (mut honest, port) = rig.connect();
        for (src, dst, which, len, kind, op, flags, buf_alloc, fwd_cnt) in packets {
            let header = Header {
                src_cid: [CID, CID, CID, src][src as usize],
                dst_cid: [2, 2, 2, dst][dst as usize],
                src_port: [PORT, PORT, 1, u32::MAX][which as usize],
                dst_port: [hostile, hostile, 7, 0][which as usize],
                len: if len % 2 == 0 { 16 } else { len },
                kind,
                op,
                flags,
                buf_alloc,
                fwd_cnt,
            };
            rig.guest.raw(header, &[9; 16]);
        }
        rig.guest.sockets.remove(&hostile);
        rig.steps(200);
        honest.write_all(b"still here").unwrap();
        rig.until("honest data", |guest| guest.sockets[&port].received == b"still here");
    }
}
