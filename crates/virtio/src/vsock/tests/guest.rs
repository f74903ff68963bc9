//! The guest's vsock driver on mock queues. It keeps to its credit; tests control how fast it
//! reads.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

use crate::mock::MockQueue;
use crate::vsock::spec::{
    HEADER_LEN, HOST_CID, Header, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op,
};

pub(super) const CID: u64 = 42;
/// The only port with a listener in the guest.
pub(super) const PORT: u32 = 1024;

const RX_AT: u64 = 0x10_0000;
const TX_AT: u64 = 0x80_0000;
const SLOT: u64 = 0x1_1000;

/// One end of a connection in the guest.
#[derive(Default)]
pub(super) struct Socket {
    pub(super) received: Vec<u8>,
    /// Bytes of it that the guest's program has read.
    pub(super) consumed: usize,
    pub(super) to_send: VecDeque<u8>,
    pub(super) shut_by_host: u32,
    pub(super) shut_by_guest: u32,
    pub(super) reset: bool,
    pub(super) alloc: u32,
    /// `consumed` in the last packet sent.
    last_fwd_cnt: usize,
    sent: u32,
    peer_alloc: u32,
    peer_forwarded: u32,
}

impl Socket {
    pub(super) fn credit(&self) -> usize {
        self.peer_alloc.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded)) as usize
    }
}

pub(super) struct Guest {
    mem: Arc<GuestMemoryMmap>,
    pub(super) rx: MockQueue,
    pub(super) tx: MockQueue,
    rx_slots: HashMap<u16, u64>,
    rx_free: Vec<u64>,
    rx_len: u32,
    tx_slots: HashMap<u16, u64>,
    tx_free: Vec<u64>,
    outbox: VecDeque<(Header, Vec<u8>)>,
    pub(super) sockets: HashMap<u32, Socket>,
    /// Headers of all packets from the host.
    pub(super) log: Vec<Header>,
    /// Buffer size of new sockets.
    pub(super) alloc: u32,
    pub(super) give_buffers: bool,
}

impl Guest {
    pub(super) fn new(mem: Arc<GuestMemoryMmap>, rx: MockQueue, tx: MockQueue) -> Self {
        Self {
            mem,
            rx,
            tx,
            rx_slots: HashMap::new(),
            rx_free: (0..64).map(|n| RX_AT + n * SLOT).collect(),
            rx_len: 4096,
            tx_slots: HashMap::new(),
            tx_free: (0..32).map(|n| TX_AT + n * SLOT).collect(),
            outbox: VecDeque::new(),
            sockets: HashMap::new(),
            log: Vec::new(),
            alloc: 64 << 10,
            give_buffers: true,
        }
    }

    /// Handles received packets, adds receive buffers, sends data within the credit.
    pub(super) fn step(&mut self) {
        while let Some((head, len)) = self.rx.used() {
            let at = self.rx_slots.remove(&head).unwrap();
            assert!(len as usize >= HEADER_LEN);
            let mut bytes = vec![0; len as usize];
            self.mem.read_slice(&mut bytes, GuestAddress(at)).unwrap();
            self.rx_free.push(at);
            let header = Header::from_bytes(bytes[..HEADER_LEN].try_into().unwrap());
            assert_eq!(header.len as usize, len as usize - HEADER_LEN);
            self.packet(header, &bytes[HEADER_LEN..]);
        }
        let mut kick = false;
        while self.give_buffers && self.rx.room() >= 2 && !self.rx_free.is_empty() {
            let at = self.rx_free.pop().unwrap();
            let parts = [(at, HEADER_LEN as u32), (at + HEADER_LEN as u64, self.rx_len)];
            self.rx_slots.insert(self.rx.add(&[], &parts), at);
            kick = true;
        }
        if kick {
            self.rx.kick();
        }
        self.send_data();
        while let Some((head, _)) = self.tx.used() {
            self.tx_free.push(self.tx_slots.remove(&head).unwrap());
        }
        while !self.tx_free.is_empty()
            && let Some((header, data)) = self.outbox.pop_front()
        {
            let at = self.tx_free.pop().unwrap();
            self.mem.write_slice(&header.bytes(), GuestAddress(at)).unwrap();
            self.mem.write_slice(&data, GuestAddress(at + HEADER_LEN as u64)).unwrap();
            let mut parts = vec![(at, HEADER_LEN as u32)];
            if !data.is_empty() {
                parts.push((at + HEADER_LEN as u64, data.len() as u32));
            }
            self.tx_slots.insert(self.tx.add(&parts, &[]), at);
            self.tx.kick();
        }
    }

    fn packet(&mut self, header: Header, data: &[u8]) {
        self.log.push(header);
        assert_eq!((header.dst_cid, header.kind), (CID, TYPE_STREAM));
        let port = header.src_port;
        if header.op == op::REQUEST {
            assert_eq!(header.src_cid, HOST_CID);
            if header.dst_port != PORT {
                return self.send(port, header.dst_port, op::RST, 0);
            }
            let fresh =
                self.sockets.insert(port, Socket { alloc: self.alloc, ..Socket::default() });
            assert!(fresh.is_none(), "host port used twice");
        }
        let Some(socket) = self.sockets.get_mut(&port) else { return };
        socket.peer_alloc = header.buf_alloc;
        socket.peer_forwarded = header.fwd_cnt;
        match header.op {
            op::REQUEST => self.send(port, PORT, op::RESPONSE, 0),
            op::RW => {
                assert_eq!(socket.shut_by_host & SHUTDOWN_SEND, 0, "data after SHUTDOWN(send)");
                socket.received.extend_from_slice(data);
                let held = socket.received.len() - socket.consumed;
                assert!(held <= socket.alloc as usize, "host sent {held} beyond credit");
            }
            op::SHUTDOWN => {
                socket.shut_by_host |= header.flags;
                if socket.shut_by_host == SHUTDOWN_BOTH {
                    socket.reset = true;
                    self.send(port, PORT, op::RST, 0);
                }
            }
            op::CREDIT_REQUEST => self.send(port, PORT, op::CREDIT_UPDATE, 0),
            op::RST => socket.reset = true,
            op::CREDIT_UPDATE => {}
            other => panic!("unexpected operation {other}"),
        }
    }

    /// The guest's program reads up to `most` bytes.
    pub(super) fn consume(&mut self, port: u32, most: usize) {
        let Some(socket) = self.sockets.get_mut(&port) else { return };
        socket.consumed += most.min(socket.received.len() - socket.consumed);
        if !socket.reset && socket.consumed - socket.last_fwd_cnt > socket.alloc as usize / 2 {
            self.send(port, PORT, op::CREDIT_UPDATE, 0);
        }
    }

    pub(super) fn shutdown(&mut self, port: u32, flags: u32) {
        let socket = self.sockets.get_mut(&port).unwrap();
        socket.shut_by_guest |= flags;
        self.send(port, PORT, op::SHUTDOWN, flags);
    }

    pub(super) fn send(&mut self, port: u32, from: u32, op: u16, flags: u32) {
        let header = self.header(port, from, op);
        self.raw(Header { flags, ..header }, &[]);
    }

    pub(super) fn header(&mut self, port: u32, from: u32, op: u16) -> Header {
        let (mut alloc, mut consumed) = (0, 0);
        if let Some(socket) = self.sockets.get_mut(&port) {
            socket.last_fwd_cnt = socket.consumed;
            (alloc, consumed) = (socket.alloc, socket.consumed);
        }
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: from,
            dst_port: port,
            len: 0,
            kind: TYPE_STREAM,
            op,
            flags: 0,
            buf_alloc: alloc,
            fwd_cnt: consumed as u32,
        }
    }

    /// Queues a packet, valid or not.
    pub(super) fn raw(&mut self, header: Header, data: &[u8]) {
        self.outbox.push_back((header, data.to_vec()));
    }

    fn send_data(&mut self) {
        let ports: Vec<u32> = self.sockets.keys().copied().collect();
        for port in ports {
            while self.outbox.len() < 32 {
                let socket = self.sockets.get_mut(&port).unwrap();
                let len = socket.credit().min(socket.to_send.len()).min(0x1_0000);
                let dead = socket.reset || socket.shut_by_host & SHUTDOWN_RECEIVE != 0;
                if len == 0 || dead {
                    break;
                }
                let data: Vec<u8> = socket.to_send.drain(..len).collect();
                socket.sent = socket.sent.wrapping_add(len as u32);
                let header = self.header(port, PORT, op::RW);
                self.raw(Header { len: len as u32, ..header }, &data);
            }
        }
    }
}
