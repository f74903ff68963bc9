//! Credit-based flow control of one connection (virtio 1.2, section 5.10.6.3), as plain values:
//! no I/O, no locks. Field names follow Linux `struct virtio_vsock_sock`.
//!
//! All counts are bytes modulo 2^32, as in the packet header.

/// What the host may still send to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct PeerCredit {
    /// Bytes sent so far.
    tx_cnt: u32,
    /// Size of the guest's receive buffer, from its last packet.
    peer_buf_alloc: u32,
    /// Bytes the guest has taken out of that buffer, from its last packet.
    peer_fwd_cnt: u32,
    /// A CREDIT_REQUEST was sent since credit ran out.
    request_pending: bool,
}

impl PeerCredit {
    /// Bytes that may be sent now; 0 if the guest announces a smaller buffer than what is in
    /// flight.
    pub(super) fn available(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    /// Takes `buf_alloc` and `fwd_cnt` from a packet of the guest.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) {
        self.peer_buf_alloc = buf_alloc;
        self.peer_fwd_cnt = fwd_cnt;
        if self.available() > 0 {
            self.request_pending = false;
        }
    }

    pub(super) fn sent(&mut self, bytes: u32) {
        self.tx_cnt = self.tx_cnt.wrapping_add(bytes);
    }

    /// Whether to send a CREDIT_REQUEST.
    pub(super) fn needs_request(&self) -> bool {
        self.available() == 0 && !self.request_pending
    }

    pub(super) fn request_sent(&mut self) {
        self.request_pending = true;
    }
}

/// What the guest may still send to the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LocalCredit {
    /// Size of the buffer announced to the guest.
    buf_alloc: u32,
    /// Bytes received.
    rx_cnt: u32,
    /// Bytes that have left the buffer.
    fwd_cnt: u32,
    /// `fwd_cnt` in the last packet to the guest.
    last_fwd_cnt: u32,
}

impl LocalCredit {
    pub(super) fn new(buf_alloc: u32) -> Self {
        Self { buf_alloc, rx_cnt: 0, fwd_cnt: 0, last_fwd_cnt: 0 }
    }

    pub(super) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Counts a data packet; `false` if the guest had no credit for it.
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        if bytes > self.buf_alloc - self.rx_cnt.wrapping_sub(self.fwd_cnt) {
            return false;
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(bytes);
        true
    }

    /// Bytes received earlier have left the buffer.
    pub(super) fn forward(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.rx_cnt.wrapping_sub(self.fwd_cnt));
        self.fwd_cnt = self.fwd_cnt.wrapping_add(bytes);
    }

    /// `fwd_cnt` for the header of a packet to the guest.
    pub(super) fn report_fwd_cnt(&mut self) -> u32 {
        self.last_fwd_cnt = self.fwd_cnt;
        self.fwd_cnt
    }

    /// Whether to send a CREDIT_UPDATE: from the last packet the guest computes that less than half
    /// of the buffer is free, and more is free now.
    pub(super) fn needs_update(&self) -> bool {
        // A guest that exceeds the reported credit is treated as one without credit.
        let reported = self.buf_alloc.saturating_sub(self.rx_cnt.wrapping_sub(self.last_fwd_cnt));
        reported < self.buf_alloc / 2 && self.last_fwd_cnt != self.fwd_cnt
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_buffer_smaller_than_the_bytes_in_flight_leaves_no_credit() {
        let mut out = PeerCredit::default();
        assert_eq!(out.available(), 0);
        out.update(1000, 0);
        out.sent(900);
        assert_eq!(out.available(), 100);
        out.update(500, 0);
        assert_eq!(out.available(), 0);
        assert!(out.needs_request());
        out.request_sent();
        assert!(!out.needs_request());
        out.update(500, 900);
        assert_eq!(out.available(), 500);
    }

    #[test]
    fn a_fwd_cnt_beyond_the_bytes_sent_leaves_no_credit() {
        let mut out = PeerCredit::default();
        out.update(1000, 0);
        out.sent(10);
        out.update(1000, 500);
        assert_eq!(out.available(), 0);
    }

    #[test]
    fn a_guest_that_exceeds_the_reported_credit_gets_an_update() {
        let mut host = LocalCredit::new(100);
        assert!(host.receive(100));
        host.forward(100);
        assert!(host.receive(1));
        assert!(host.needs_update());
        assert_eq!(host.report_fwd_cnt(), 100);
        assert!(!host.needs_update());
    }

    #[test]
    fn counts_wrap_at_32_bits() {
        let mut out =
            PeerCredit { tx_cnt: u32::MAX - 5, peer_fwd_cnt: u32::MAX - 5, ..Default::default() };
        out.update(100, u32::MAX - 5);
        out.sent(50);
        assert_eq!(out.available(), 50);
        out.update(100, 44);
        assert_eq!(out.available(), 100);
    }

    proptest! {
        /// A guest that sends only within the credit reported to it is never refused, has credit
        /// again once the buffer is empty, and the buffer never holds more than its announced size.
        #[test]
        fn a_guest_within_its_credit_is_never_refused_nor_left_without_credit(
            steps in prop::collection::vec((1u32..5000, 0u32..5000), 1..400),
            start in any::<u32>(),
        ) {
            let buf_alloc = 4096;
            let mut host =
                LocalCredit { buf_alloc, rx_cnt: start, fwd_cnt: start, last_fwd_cnt: start };
            let (mut sent, mut known) = (start, start);
            let mut buffered = 0;
            for (wanted, drain) in steps {
                let credit = buf_alloc - sent.wrapping_sub(known);
                let send = wanted.min(credit);
                prop_assert!(host.receive(send));
                sent = sent.wrapping_add(send);
                buffered += send;
                prop_assert!(buffered <= buf_alloc);
                prop_assert!(!host.receive(buf_alloc - buffered + 1));
                let drain = drain.min(buffered);
                host.forward(drain);
                buffered -= drain;
                if host.needs_update() {
                    known = host.report_fwd_cnt();
                }
                if buffered == 0 {
                    prop_assert!(buf_alloc - sent.wrapping_sub(known) >= buf_alloc / 2);
                }
            }
        }
    }
}
