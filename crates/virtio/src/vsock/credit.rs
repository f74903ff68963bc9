//! Credit-based flow control of one connection (virtio 1.2, section 5.10.6.3), as plain values.
//!
//! Counts run modulo 2^32, as on the wire.

/// What may still be sent to the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Outgoing {
    /// Bytes sent so far.
    sent: u32,
    /// The guest's buffer, and how much it has taken out of it, as last heard.
    alloc: u32,
    forwarded: u32,
    /// The guest has been asked for an update since credit ran out.
    asked: bool,
}

impl Outgoing {
    /// Bytes the guest has room for. A guest that claims less room than it was sent has none.
    pub(super) fn room(&self) -> u32 {
        self.alloc.saturating_sub(self.sent.wrapping_sub(self.forwarded))
    }

    pub(super) fn heard(&mut self, alloc: u32, forwarded: u32) {
        self.alloc = alloc;
        self.forwarded = forwarded;
        if self.room() > 0 {
            self.asked = false;
        }
    }

    pub(super) fn sent(&mut self, bytes: u32) {
        self.sent = self.sent.wrapping_add(bytes);
    }

    /// Whether a CREDIT_REQUEST would be news.
    pub(super) fn should_ask(&self) -> bool {
        self.room() == 0 && !self.asked
    }

    pub(super) fn asked(&mut self) {
        self.asked = true;
    }
}

/// What the guest may still send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Incoming {
    /// Size of the buffer promised to the guest.
    alloc: u32,
    received: u32,
    forwarded: u32,
    /// `forwarded` as the guest last heard it.
    told: u32,
}

impl Incoming {
    pub(super) fn new(alloc: u32) -> Self {
        Self { alloc, received: 0, forwarded: 0, told: 0 }
    }

    pub(super) fn alloc(&self) -> u32 {
        self.alloc
    }

    /// Takes a packet into account; `false` if the guest had no credit for it.
    pub(super) fn receive(&mut self, bytes: u32) -> bool {
        if bytes > self.alloc - self.received.wrapping_sub(self.forwarded) {
            return false;
        }
        self.received = self.received.wrapping_add(bytes);
        true
    }

    /// Bytes received before have left the buffer.
    pub(super) fn forward(&mut self, bytes: u32) {
        debug_assert!(bytes <= self.received.wrapping_sub(self.forwarded));
        self.forwarded = self.forwarded.wrapping_add(bytes);
    }

    /// The count to put into a packet, which the guest then knows.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.forwarded
    }

    /// Whether the guest should be told without being sent anything else: it believes that less
    /// than half of the buffer is free, and more is.
    pub(super) fn should_tell(&self) -> bool {
        // One that sends more than it was told of counts as one without credit.
        let believed = self.alloc.saturating_sub(self.received.wrapping_sub(self.told));
        believed < self.alloc / 2 && self.told != self.forwarded
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_guest_that_shrinks_its_buffer_below_what_is_on_its_way_gets_nothing() {
        let mut out = Outgoing::default();
        assert_eq!(out.room(), 0);
        out.heard(1000, 0);
        out.sent(900);
        assert_eq!(out.room(), 100);
        out.heard(500, 0);
        assert_eq!(out.room(), 0);
        assert!(out.should_ask());
        out.asked();
        assert!(!out.should_ask());
        out.heard(500, 900);
        assert_eq!(out.room(), 500);
    }

    #[test]
    fn a_guest_that_lies_about_its_count_gains_nothing_but_its_own_overflow() {
        let mut out = Outgoing::default();
        out.heard(1000, 0);
        out.sent(10);
        out.heard(1000, 500);
        assert_eq!(out.room(), 0);
    }

    #[test]
    fn a_guest_that_sends_more_than_it_was_told_of_is_told_as_if_it_had_no_credit() {
        let mut host = Incoming::new(100);
        assert!(host.receive(100));
        host.forward(100);
        assert!(host.receive(1));
        assert!(host.should_tell());
        assert_eq!(host.tell(), 100);
        assert!(!host.should_tell());
    }

    #[test]
    fn counts_wrap() {
        let mut out =
            Outgoing { sent: u32::MAX - 5, forwarded: u32::MAX - 5, ..Default::default() };
        out.heard(100, u32::MAX - 5);
        out.sent(50);
        assert_eq!(out.room(), 50);
        out.heard(100, 44);
        assert_eq!(out.room(), 100);
    }

    proptest! {
        /// A guest that only sends what it believes to have credit for is never refused, is never
        /// left without credit once the buffer is empty, and the buffer never holds more than was
        /// promised.
        #[test]
        fn an_honest_guest_is_never_refused_nor_starved(
            steps in prop::collection::vec((1u32..5000, 0u32..5000), 1..400),
            start in any::<u32>(),
        ) {
            let alloc = 4096;
            let mut host =
                Incoming { alloc, received: start, forwarded: start, told: start };
            let (mut sent, mut known) = (start, start);
            let mut buffered = 0;
            for (wish, drain) in steps {
                let credit = alloc - sent.wrapping_sub(known);
                let send = wish.min(credit);
                prop_assert!(host.receive(send));
                sent = sent.wrapping_add(send);
                buffered += send;
                prop_assert!(buffered <= alloc);
                prop_assert!(!host.receive(alloc - buffered + 1));
                let drain = drain.min(buffered);
                host.forward(drain);
                buffered -= drain;
                if host.should_tell() {
                    known = host.tell();
                }
                if buffered == 0 {
                    prop_assert!(alloc - sent.wrapping_sub(known) >= alloc / 2);
                }
            }
        }
    }
}
