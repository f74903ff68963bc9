//! A hundred connections at once, each with its own pace, sizes and way of ending.

use proptest::prelude::*;

use super::*;

struct Talk {
    client: UnixStream,
    port: u32,
    to_guest: Vec<u8>,
    written: usize,
    to_host: Vec<u8>,
    got: Vec<u8>,
    /// Most bytes a side reads a step.
    client_pace: usize,
    guest_pace: usize,
    client_shut: bool,
    client_saw_end: bool,
    guest_shut: bool,
}

impl Talk {
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
        let heard = guest.sockets[&self.port].shut_by_host & SHUTDOWN_SEND != 0;
        self.client_saw_end && heard
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

fn talk_all(rig: &mut Rig, plans: &[(usize, usize, usize, usize, u32)]) {
    let mut talks = Vec::new();
    for (n, (up, down, client_pace, guest_pace, alloc)) in plans.iter().enumerate() {
        rig.guest.alloc = *alloc;
        let (client, port) = rig.join();
        let to_host = bytes(*down, 1000 + n as u64);
        rig.guest.sockets.get_mut(&port).unwrap().to_send.extend(&to_host);
        talks.push(Talk {
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
        for talk in &mut talks {
            talk.step(&mut rig.guest);
        }
        rig.step();
        if talks.iter().all(|t| t.done(&rig.guest)) {
            break;
        }
    }
    for talk in &talks {
        assert!(talk.done(&rig.guest), "a talk never ended");
        assert!(talk.got == talk.to_host, "bytes to the host differ");
        assert!(
            rig.guest.sockets[&talk.port].received == talk.to_guest,
            "bytes to the guest differ"
        );
    }
    let ports: Vec<u32> = talks.iter().map(|t| t.port).collect();
    drop(talks);
    rig.until("all reset", |guest| ports.iter().all(|p| guest.sockets[p].reset));
}

#[test]
fn a_hundred_talks_at_different_paces_all_arrive_whole_and_leave_nothing() {
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
    talk_all(&mut rig, &plans);
    // All hundred places are free again.
    talk_all(&mut rig, &plans[..10]);
    assert_eq!(rig.vsock.counters().errors(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, ..ProptestConfig::default() })]

    #[test]
    fn whatever_the_sizes_and_paces_bytes_arrive_whole(
        plans in prop::collection::vec(
            (0usize..200_000, 0usize..200_000, 200usize..70_000, 200usize..70_000, 100u32..300_000),
            1..8,
        )
    ) {
        let mut rig = rig();
        talk_all(&mut rig, &plans);
    }

    /// Any packets at all: nothing panics, and an honest connection beside them is not disturbed.
    #[test]
    fn a_hostile_guest_disturbs_only_itself(
        packets in prop::collection::vec(
            (0u64..4, 0u64..4, 0u32..4, any::<u32>(), 0u16..3, 0u16..9, any::<u32>(), any::<u32>(), any::<u32>()),
            0..60,
        )
    ) {
        let mut rig = rig();
        let (_victim, hostile) = rig.join();
        let (mut honest, port) = rig.join();
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
