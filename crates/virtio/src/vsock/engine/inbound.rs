//! Packets from the guest (tx queue).

use super::super::connection::Phase;
use super::super::spec::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::{BUDGET, TX, VsockEngine};
use crate::chain::Chain;
use crate::device::Poll;
use crate::guest_warn;

/// RST packets waiting for a receive buffer; more are dropped and counted.
/// Attack: a guest sends invalid packets and gives no receive buffers, to grow this queue.
const MAX_REPLIES: usize = 1024;

impl VsockEngine {
    pub(super) fn process_tx(&mut self, poll: &mut Poll<'_>) {
        self.tx.clear_kick();
        self.tx.disable_kicks();
        let mut more = true;
        for _ in 0..BUDGET {
            if let Some(chain) = self.tx.pop() {
                self.process_packet(&chain, poll);
                self.tx.push(chain.head, 0);
            } else {
                more = self.tx.enable_kicks();
                if !more {
                    break;
                }
            }
        }
        self.tx.signal_used();
        if more {
            poll.reschedule(TX);
        }
    }

    fn process_packet(&mut self, chain: &Chain, poll: &mut Poll<'_>) {
        let mut bytes = [0; HEADER_LEN];
        if chain.readable.read(self.tx.mem(), 0, &mut bytes) < HEADER_LEN {
            return self.reject("packet shorter than its header");
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.guest_cid {
            return self.reject("packet with a source CID that is not the guest's");
        }
        let port = header.dst_port;
        let to_host = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let known = self.connections.get_mut(&port).filter(|c| {
            to_host
                && c.guest_port == header.src_port
                && !matches!(c.phase, Phase::Handshake { .. })
        });
        let Some(connection) = known else {
            // Includes every REQUEST of the guest: the host has no listeners. An RST is never
            // answered with an RST.
            if header.op != op::RST {
                self.reply_reset(header.dst_cid, port, header.src_port);
                self.reject("packet for no connection");
            }
            return;
        };
        connection.peer_credit.update(header.buf_alloc, header.fwd_cnt);
        if let Err(why) = self.dispatch(&header, chain, poll) {
            self.reject(why);
            self.abort(port, poll);
        }
        self.schedule_rx(port);
    }

    /// Handles a packet of an existing connection; an error resets the connection.
    fn dispatch(
        &mut self,
        header: &Header,
        chain: &Chain,
        poll: &mut Poll<'_>,
    ) -> Result<(), &'static str> {
        let port = header.dst_port;
        let Some(connection) = self.connections.get_mut(&port) else { return Ok(()) };
        match (header.op, &connection.phase) {
            (op::RESPONSE, Phase::Requested { .. }) if connection.request_sent => {
                if let Some(deadline) = connection.deadline() {
                    self.deadlines.remove(&(deadline, port));
                }
                // A client that has disconnected meanwhile is removed at its next event.
                connection.open().or(Err("cannot write the OK line to the client"))?;
                self.counters.operation(0);
            }
            (op::RST, Phase::Open) if !connection.is_flushed() => {
                self.set_phase(port, Phase::Linger);
            }
            (op::RST, _) => self.remove(port, poll),
            (op::RW, Phase::Open | Phase::Closing { .. }) => {
                let len = header.len as usize;
                if len > chain.readable.len() - HEADER_LEN {
                    return Err("packet shorter than its length field");
                }
                if connection.guest_send_shut() {
                    return Err("data after SHUTDOWN(send)");
                }
                if !connection.local_credit.receive(header.len) {
                    return Err("data beyond the guest's credit");
                }
                // Credit is at most BUFFER, the size of `scratch`.
                let data = &mut self.scratch[..len];
                if chain.readable.read(self.tx.mem(), HEADER_LEN, data) < len {
                    return Err("data outside guest memory");
                }
                connection.deliver(data);
                self.counters.operation(u64::from(header.len));
            }
            (op::SHUTDOWN, Phase::Open | Phase::Closing { .. }) => {
                if connection.on_guest_shutdown(header.flags) {
                    let (guest_port, done) = (connection.guest_port, connection.is_flushed());
                    if done {
                        self.remove(port, poll);
                    } else {
                        self.set_phase(port, Phase::Linger);
                    }
                    self.reply_reset(HOST_CID, port, guest_port);
                }
            }
            (op::CREDIT_UPDATE, Phase::Open | Phase::Closing { .. }) => {}
            (op::CREDIT_REQUEST, Phase::Open | Phase::Closing { .. }) => {
                connection.credit_requested = true;
            }
            // The guest has closed the connection: answered as if it did not exist.
            (_, Phase::Linger) => self.reply_reset(HOST_CID, port, header.src_port),
            _ => return Err("operation not allowed in the connection's phase"),
        }
        Ok(())
    }

    pub(super) fn reject(&mut self, why: &'static str) {
        self.counters.error();
        guest_warn!(self.counters.limit, why, "vsock packet rejected");
    }

    pub(super) fn reply_reset(&mut self, src_cid: u64, src_port: u32, dst_port: u32) {
        if self.replies.len() >= MAX_REPLIES {
            self.counters.error();
            return;
        }
        self.replies.push_back(Header {
            src_cid,
            dst_cid: self.guest_cid,
            src_port,
            dst_port,
            kind: TYPE_STREAM,
            op: op::RST,
            ..Header::default()
        });
    }
}
