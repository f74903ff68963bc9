//! Packets to the guest: who has something to send stands in line for the next buffer.

use std::time::{Duration, Instant};

use super::super::connection::{Phase, Want};
use super::super::spec::{HEADER_LEN, HOST_CID, Header, TYPE_STREAM, op};
use super::{BUDGET, RX, VsockEngine};
use crate::device::Poll;

/// Most data in a packet to the guest; Linux uses the same.
const MAX_PAYLOAD: usize = 64 << 10;
/// For the guest to confirm the end of a connection.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

impl VsockEngine {
    pub(super) fn stand_in_line(&mut self, port: u32) {
        if let Some(connection) = self.connections.get_mut(&port)
            && !connection.in_line
            && connection.want().is_some()
        {
            connection.in_line = true;
            self.line.push_back(port);
        }
    }

    /// Sends as long as there is something to send and a buffer for it.
    pub(super) fn fill_buffers(&mut self, poll: &mut Poll<'_>) {
        let mut more = true;
        for _ in 0..BUDGET {
            if self.replies.is_empty() && self.line.is_empty() {
                more = false;
                break;
            }
            self.rx.disable_kicks();
            let Some(chain) = self.rx.pop() else {
                // The guest kicks when it has buffers again.
                more = self.rx.enable_kicks();
                if more {
                    continue;
                }
                break;
            };
            let space = chain.writable.len().saturating_sub(HEADER_LEN);
            if space == 0 {
                self.refuse("receive buffer too small for any data");
                self.rx.push(chain.head, 0);
                continue;
            }
            let Some(header) = self.next_packet(space) else {
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
        self.rx.announce();
        if more {
            poll.again(RX);
        }
    }

    /// The next packet; its data stands in the scratch space.
    fn next_packet(&mut self, space: usize) -> Option<Header> {
        if let Some(reply) = self.replies.pop_front() {
            return Some(reply);
        }
        while let Some(port) = self.line.pop_front() {
            let Some(connection) = self.connections.get_mut(&port) else { continue };
            connection.in_line = false;
            let (op, flags, len) = match connection.want() {
                None => continue,
                Some(Want::Control { op, flags }) => {
                    connection.control_sent(op, flags);
                    (op, flags, 0)
                }
                Some(Want::Data { limit }) => {
                    let limit = limit.min(space).min(MAX_PAYLOAD);
                    let len = connection.read(&mut self.scratch[..limit]);
                    if len == 0 {
                        self.stand_in_line(port);
                        continue;
                    }
                    connection.outgoing.sent(len as u32);
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
                buf_alloc: connection.incoming.alloc(),
                fwd_cnt: connection.incoming.tell(),
            };
            if matches!(connection.phase, Phase::Open) && connection.fully_shut_by_us() {
                self.enter(port, Phase::Closing { until: Instant::now() + CLOSE_LIMIT });
            }
            self.stand_in_line(port);
            return Some(header);
        }
        None
    }
}
