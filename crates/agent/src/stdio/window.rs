//! Output bytes of a stream that the host has not acknowledged. Pure data structure, no I/O.
//!
//! ```text
//! 0 ........ start ............ end
//!   acknowledged   |  kept here  |  still in the pipe
//! ```

use std::collections::VecDeque;

/// Bytes `start..end` of a stream, at most `limit` of them.
#[derive(Debug)]
pub(crate) struct Window {
    start: u64,
    bytes: VecDeque<u8>,
    limit: usize,
}

/// The offset is outside of the kept range.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct OutOfWindow;

impl Window {
    pub(crate) fn new(limit: usize) -> Self {
        Self { start: 0, bytes: VecDeque::new(), limit }
    }

    pub(crate) fn end(&self) -> u64 {
        self.start + self.bytes.len() as u64
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Number of bytes that `push` accepts now.
    pub(crate) fn room(&self) -> usize {
        self.limit - self.bytes.len()
    }

    /// Appends at most `room` bytes; the caller must not pass more.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let n = bytes.len().min(self.room());
        self.bytes.extend(&bytes[..n]);
    }

    /// Drops bytes before `offset`. Fails for an offset that was never sent.
    pub(crate) fn acknowledge(&mut self, offset: u64) -> Result<(), OutOfWindow> {
        if offset > self.end() {
            return Err(OutOfWindow);
        }
        // An older offset (from a replaced connection) is ignored.
        let n = offset.saturating_sub(self.start);
        self.bytes.drain(..n as usize);
        self.start += n;
        if self.bytes.is_empty() {
            // Releases the allocation: idle streams must not keep their peak memory.
            self.bytes = VecDeque::new();
        }
        Ok(())
    }

    /// Copies bytes from `offset` on into `into`; returns their number.
    pub(crate) fn copy(&self, offset: u64, into: &mut [u8]) -> Result<usize, OutOfWindow> {
        if offset < self.start || offset > self.end() {
            return Err(OutOfWindow);
        }
        let skip = (offset - self.start) as usize;
        let n = into.len().min(self.bytes.len() - skip);
        let (front, back) = self.bytes.as_slices();
        let from_front = front.get(skip..).unwrap_or_default();
        let a = n.min(from_front.len());
        into[..a].copy_from_slice(&from_front[..a]);
        let back_skip = skip.saturating_sub(front.len());
        into[a..n].copy_from_slice(&back[back_skip..back_skip + n - a]);
        Ok(n)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kept(window: &Window, offset: u64) -> Vec<u8> {
        let mut buffer = [0; 64];
        let n = window.copy(offset, &mut buffer).unwrap();
        buffer[..n].to_vec()
    }

    #[test]
    fn bytes_stay_until_they_are_acknowledged() {
        let mut window = Window::new(8);
        window.push(b"abcdef");
        assert_eq!(kept(&window, 0), b"abcdef");
        window.acknowledge(4).unwrap();
        assert_eq!(window.copy(3, &mut [0; 1]), Err(OutOfWindow));
        assert_eq!(kept(&window, 4), b"ef");
        window.push(b"ghijkl");
        assert_eq!(window.room(), 0);
        assert_eq!(kept(&window, 5), b"fghijkl");
        assert_eq!(kept(&window, 12), b"");
    }

    #[test]
    fn every_offset_of_a_wrapped_buffer_reads_the_same_bytes() {
        let mut window = Window::new(16);
        let mut next = 0u8;
        for round in 0..200u64 {
            let n = (round % 7) as usize;
            let chunk: Vec<u8> = (0..n.min(window.room()))
                .map(|_| {
                    next = next.wrapping_add(1);
                    next
                })
                .collect();
            window.push(&chunk);
            for offset in window.start..=window.end() {
                let bytes = kept(&window, offset);
                for (i, byte) in bytes.iter().enumerate() {
                    assert_eq!(*byte, (offset + i as u64 + 1) as u8);
                }
                assert_eq!(bytes.len() as u64, window.end() - offset);
            }
            let ack = window.start + (window.end() - window.start) / 2;
            window.acknowledge(ack).unwrap();
        }
    }

    #[test]
    fn acknowledging_unsent_bytes_is_refused_and_an_older_offset_is_ignored() {
        let mut window = Window::new(8);
        window.push(b"abc");
        assert_eq!(window.acknowledge(4), Err(OutOfWindow));
        window.acknowledge(2).unwrap();
        window.acknowledge(1).unwrap();
        assert_eq!(kept(&window, 2), b"c");
    }
}
