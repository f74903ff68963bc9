//! Packets from the guest.

use super::super::connection::Phase;
use super::super::spec::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::{BUDGET, TX, VsockEngine};
use crate::chain::Chain;
use crate::device::Poll;
use crate::guest_warn;

/// RSTs waiting for a receive buffer; more are dropped and counted.
/// Attack: a guest that sends nonsense and offers no buffers, to grow the queue of answers.
const MAX_REPLIES: usize = 1024;

impl VsockEngine {
    pub(super) fn serve_guest(&mut self, poll: &mut Poll<'_>) {
        self.tx.clear_kick();
        self.tx.disable_kicks();
        let mut more = true;
        for _ in 0..BUDGET {
            if let Some(chain) = self.tx.pop() {
                self.packet(&chain, poll);
                self.tx.push(chain.head, 0);
            } else {
                more = self.tx.enable_kicks();
                if !more {
                    break;
                }
            }
        }
        self.tx.announce();
        if more {
            poll.again(TX);
        }
    }

    fn packet(&mut self, chain: &Chain, poll: &mut Poll<'_>) {
        let mut bytes = [0; HEADER_LEN];
        if chain.readable.read(self.tx.mem(), 0, &mut bytes) < HEADER_LEN {
            return self.refuse("packet without a whole header");
        }
        let header = Header::from_bytes(&bytes);
        if header.src_cid != self.guest_cid {
            return self.refuse("packet from a foreign address");
        }
        let port = header.dst_port;
        let to_host = header.dst_cid == HOST_CID && header.kind == TYPE_STREAM;
        let known = self.connections.get_mut(&port).filter(|c| {
            to_host
                && c.guest_port == header.src_port
                && !matches!(c.phase, Phase::Handshake { .. })
        });
        let Some(connection) = known else {
            // Also every request of the guest's: no service of the host listens. An RST is never
            // answered with an RST.
            if header.op != op::RST {
                self.reply_reset(header.dst_cid, port, header.src_port);
                self.refuse("packet for no connection");
            }
            return;
        };
        connection.outgoing.heard(header.buf_alloc, header.fwd_cnt);
        if let Err(why) = self.obey(&header, chain, poll) {
            self.refuse(why);
            self.abort(port, poll);
        }
        self.stand_in_line(port);
    }

    /// Carries out a packet for a connection that exists; an error ends the connection.
    fn obey(
        &mut self,
        header: &Header,
        chain: &Chain,
        poll: &mut Poll<'_>,
    ) -> Result<(), &'static str> {
        let port = header.dst_port;
        let Some(connection) = self.connections.get_mut(&port) else { return Ok(()) };
        match (header.op, &connection.phase) {
            (op::RESPONSE, Phase::Requested { .. }) if connection.request_sent => {
                if let Some(until) = connection.until() {
                    self.deadlines.remove(&(until, port));
                }
                // A client that left meanwhile shows in its next event.
                connection.open().or(Err("client does not take its answer"))?;
                self.counters.operation(0);
            }
            (op::RST, Phase::Open) if !connection.written_out() => self.enter(port, Phase::Linger),
            (op::RST, _) => self.remove(port, poll),
            (op::RW, Phase::Open | Phase::Closing { .. }) => {
                let len = header.len as usize;
                if len > chain.readable.len() - HEADER_LEN {
                    return Err("packet shorter than it says");
                }
                if connection.guest_finished_sending() {
                    return Err("data after the end of data");
                }
                if !connection.incoming.receive(header.len) {
                    return Err("data beyond the guest's credit");
                }
                // Credit is at most BUFFER, which is what the scratch space holds.
                let data = &mut self.scratch[..len];
                if chain.readable.read(self.tx.mem(), HEADER_LEN, data) < len {
                    return Err("data outside guest memory");
                }
                connection.deliver(data);
                self.counters.operation(u64::from(header.len));
            }
            (op::SHUTDOWN, Phase::Open | Phase::Closing { .. }) => {
                if connection.guest_shut(header.flags) {
                    let (guest_port, done) = (connection.guest_port, connection.written_out());
                    if done {
                        self.remove(port, poll);
                    } else {
                        self.enter(port, Phase::Linger);
                    }
                    self.reply_reset(HOST_CID, port, guest_port);
                }
            }
            (op::CREDIT_UPDATE, Phase::Open | Phase::Closing { .. }) => {}
            (op::CREDIT_REQUEST, Phase::Open | Phase::Closing { .. }) => {
                connection.update_asked = true;
            }
            // The guest has given it up: as if it did not exist.
            (_, Phase::Linger) => self.reply_reset(HOST_CID, port, header.src_port),
            _ => return Err("packet that the connection's state does not allow"),
        }
        Ok(())
    }

    pub(super) fn refuse(&mut self, why: &'static str) {
        self.counters.error();
        guest_warn!(self.counters.limit, why, "vsock packet refused");
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
