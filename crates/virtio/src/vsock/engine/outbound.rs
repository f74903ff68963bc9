//! Packets to the guest (rx queue): one connection of `rx_ready` after the other gets the next
//! receive buffer.

use std::time::{Duration, Instant};

use super::super::connection::{Packet, Phase};
use super::super::spec::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::{BUDGET, RX, VsockEngine};
use crate::device::Poll;

/// Most data bytes in a packet to the guest (Linux `VIRTIO_VSOCK_MAX_PKT_BUF_SIZE`).
const MAX_PAYLOAD: usize = 64 << 10;
/// Deadline for the guest's RST after SHUTDOWN(both).
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

impl VsockEngine {
    pub(super) fn schedule_rx(&mut self, port: u32) {
        if let Some(connection) = self.connections.get_mut(&port)
            && !connection.rx_scheduled
            && connection.next_packet().is_some()
        {
            connection.rx_scheduled = true;
            self.rx_ready.push_back(port);
        }
    }

    /// Sends packets while there are packets and receive buffers, within the budget.
    pub(super) fn process_rx(&mut self, poll: &mut Poll<'_>) {
        let mut more = true;
        for _ in 0..BUDGET {
            if self.replies.is_empty() && self.rx_ready.is_empty() {
                more = false;
                break;
            }
            self.rx.disable_kicks();
            let Some(chain) = self.rx.pop() else {
                // The driver kicks when it adds buffers.
                more = self.rx.enable_kicks();
                if more {
                    continue;
                }
                break;
            };
            let space = chain.writable.len().saturating_sub(HEADER_LEN);
            if space == 0 {
                self.reject("receive buffer not larger than a packet header");
                self.rx.push(chain.head, 0);
                continue;
            }
            let Some(header) = self.build_packet(space) else {
                self.rx.unpop();
                more = false;
                break;
            };
            let mem = self.rx.mem();
            let len = header.len as usize;
            let written = chain.writable.write(mem, 0, &header.bytes())
                + chain.writable.write(mem, HEADER_LEN, &self.scratch[..len]);
            self.rx.push(chain.head, written as u32);
        }
        self.rx.signal_used();
        if more {
            poll.reschedule(RX);
        }
    }

    /// Returns the header of the next packet; its data is in `scratch`.
    fn build_packet(&mut self, space: usize) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(port) = self.rx_ready.pop_front() {
            let Some(connection) = self.connections.get_mut(&port) else { continue };
            connection.rx_scheduled = false;
            let (op, flags, len) = match connection.next_packet() {
                None => continue,
                Some(Packet::Control { op, flags }) => {
                    connection.control_sent(op, flags);
                    (op, flags, 0)
                }
                Some(Packet::Data { limit }) => {
                    let limit = limit.min(space).min(MAX_PAYLOAD);
                    let len = connection.read(&mut self.scratch[..limit]);
                    if len == 0 {
                        self.schedule_rx(port);
                        continue;
                    }
                    connection.peer_credit.sent(len as u32);
                    self.counters.operation(len as u64);
                    (op::RW, 0, len)
                }
            };
            let header = Header {
                src_cid: HOST_CID,
                dst_cid: self.guest_cid,
                src_port: port,
                dst_port: connection.guest_port,
                len: len as u32,
                kind: TYPE_STREAM,
                op,
                flags,
                buf_alloc: connection.local_credit.buf_alloc(),
                fwd_cnt: connection.local_credit.report_fwd_cnt(),
            };
            if matches!(connection.phase, Phase::Open) && connection.sent_full_shutdown() {
                self.set_phase(port, Phase::Closing { deadline: Instant::now() + CLOSE_LIMIT });
            }
            self.schedule_rx(port);
            return Some(header);
        }
        None
    }
}
