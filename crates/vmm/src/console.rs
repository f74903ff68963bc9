//! Guest console output on its way into the ring file.
//!
//! A guest's console driver hands over 16 bytes at a time. A write to the file for each would cost
//! more than the guest's exit, so output is gathered up to the end of a line; what stands there
//! without one for [`FLUSH_AFTER`] is written by the main thread.

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_api::console_ring::Writer;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most bytes held back.
const PENDING: usize = 1 << 10;
/// How long a prompt without a line's end may take to appear.
const FLUSH_AFTER: Duration = Duration::from_millis(30);

/// Shared by the console devices and the main thread.
#[derive(Debug, Clone)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    output: Mutex<Output>,
    /// Signalled when something begins to wait for its flush.
    waiting: EventFd,
}

#[derive(Debug)]
struct Output {
    ring: Writer,
    pending: Vec<u8>,
    since: Option<Instant>,
    /// The first failed write, e.g. a full disk; reported once, then output is lost silently.
    failed: bool,
}

impl Console {
    pub fn new(file: File) -> io::Result<Self> {
        let ring = Writer::new(file)?;
        let output = Output { ring, pending: Vec::new(), since: None, failed: false };
        let waiting = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { shared: Arc::new(Shared { output: Mutex::new(output), waiting }) })
    }

    /// Takes output from a device.
    pub fn write(&self, bytes: &[u8]) {
        let mut output = self.output();
        output.pending.extend_from_slice(bytes);
        if output.pending.len() >= PENDING || bytes.ends_with(b"\n") {
            output.flush();
        } else if output.since.is_none() && !output.pending.is_empty() {
            output.since = Some(Instant::now());
            // A full counter (EAGAIN) has woken the main thread already.
            let _ = self.shared.waiting.write(1);
        }
    }

    /// Flushes what has waited long enough; tells when to look again.
    pub fn poll(&self, now: Instant) -> Option<Instant> {
        let mut output = self.output();
        let due = output.since? + FLUSH_AFTER;
        if due <= now {
            output.flush();
            return None;
        }
        Some(due)
    }

    /// Readable when there is something new to [`Self::poll`].
    pub fn event(&self) -> &EventFd {
        &self.shared.waiting
    }

    /// Flushes, and returns the last `limit` bytes.
    pub fn tail(&self, limit: usize) -> io::Result<Vec<u8>> {
        let mut output = self.output();
        output.flush();
        output.ring.tail(limit)
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        // The ring stays consistent across a panic: its count is written last.
        self.shared.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Output {
    fn flush(&mut self) {
        self.since = None;
        if let Err(error) = self.ring.write(&self.pending)
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::error!(%error, "console output is being lost");
        }
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use vmm_api::console_ring::read;

    use super::*;

    #[test]
    fn a_line_in_pieces_is_written_at_its_end() {
        let file = tempfile::tempfile().unwrap();
        let console = Console::new(file.try_clone().unwrap()).unwrap();
        for piece in ["one ", "two ", "three"] {
            console.write(piece.as_bytes());
        }
        assert_eq!(read(&file, 0).unwrap().0, b"");
        console.write(b"\n");
        assert_eq!(read(&file, 0).unwrap().0, b"one two three\n");
    }

    #[test]
    fn a_prompt_appears_after_a_moment() {
        let file = tempfile::tempfile().unwrap();
        let console = Console::new(file.try_clone().unwrap()).unwrap();
        console.write(b"login: ");
        assert_eq!(console.event().read().unwrap(), 1);
        let due = console.poll(Instant::now()).unwrap();
        assert_eq!(console.poll(due), None);
        assert_eq!(read(&file, 0).unwrap().0, b"login: ");
    }

    #[test]
    fn a_flood_without_line_ends_is_not_held_back() {
        let file = tempfile::tempfile().unwrap();
        let console = Console::new(file.try_clone().unwrap()).unwrap();
        for _ in 0..1000 {
            console.write(&[b'x'; 16]);
        }
        assert!(read(&file, 0).unwrap().0.len() >= 16_000 - PENDING);
    }
}
