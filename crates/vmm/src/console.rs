//! Buffers guest console output and writes it to the ring file.
//!
//! Linux's hvc driver passes 16 bytes at a time. A file write for each would cost more than the KVM
//! exit, so output is buffered until a newline; the main thread writes a partial line after
//! [`FLUSH_AFTER`].

use std::fs::File;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use vmm_api::console_ring::Writer;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// Most bytes buffered.
const PENDING: usize = 1 << 10;
/// A partial line, such as a prompt, is written after this time.
const FLUSH_AFTER: Duration = Duration::from_millis(30);

/// Shared by the console devices and the main thread.
#[derive(Debug, Clone)]
pub struct Console {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    output: Mutex<Output>,
    /// Signalled when a partial line was buffered.
    waiting: EventFd,
}

#[derive(Debug)]
struct Output {
    ring: Writer,
    pending: Vec<u8>,
    since: Option<Instant>,
    /// A write has failed (for example ENOSPC). Logged once; output is lost.
    failed: bool,
}

impl Console {
    pub fn new(file: File) -> io::Result<Self> {
        let ring = Writer::new(file)?;
        let output = Output { ring, pending: Vec::new(), since: None, failed: false };
        let waiting = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        Ok(Self { shared: Arc::new(Shared { output: Mutex::new(output), waiting }) })
    }

    /// Output of a device.
    pub fn write(&self, bytes: &[u8]) {
        let mut output = self.output();
        output.pending.extend_from_slice(bytes);
        if output.pending.len() >= PENDING || bytes.ends_with(b"\n") {
            output.flush();
        } else if output.since.is_none() && !output.pending.is_empty() {
            output.since = Some(Instant::now());
            // EAGAIN: the counter is full, so the main thread is woken anyway.
            let _ = self.shared.waiting.write(1);
        }
    }

    /// Writes a partial line that is due at `now`; otherwise returns when one is due.
    pub fn poll(&self, now: Instant) -> Option<Instant> {
        let mut output = self.output();
        let due = output.since? + FLUSH_AFTER;
        if due <= now {
            output.flush();
            return None;
        }
        Some(due)
    }

    /// Readable when [`Self::poll`] has to be called.
    pub fn event(&self) -> &EventFd {
        &self.shared.waiting
    }

    /// Writes buffered output, and returns the last `limit` bytes of the console.
    pub fn tail(&self, limit: usize) -> io::Result<Vec<u8>> {
        let mut output = self.output();
        output.flush();
        output.ring.tail(limit)
    }

    fn output(&self) -> MutexGuard<'_, Output> {
        // The ring is consistent after a panic: its count is written last.
        self.shared.output.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Output {
    fn flush(&mut self) {
        self.since = None;
        if let Err(error) = self.ring.write(&self.pending)
            && !std::mem::replace(&mut self.failed, true)
        {
            tracing::error!(%error, "cannot write console output; it is lost");
        }
        self.pending.clear();
    }
}

#[cfg(test)]
mod tests {
    use vmm_api::console_ring::read;

    use super::*;

    #[test]
    fn a_line_is_written_at_its_newline() {
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
    fn a_partial_line_is_written_after_the_flush_interval() {
        let file = tempfile::tempfile().unwrap();
        let console = Console::new(file.try_clone().unwrap()).unwrap();
        console.write(b"login: ");
        assert_eq!(console.event().read().unwrap(), 1);
        let due = console.poll(Instant::now()).unwrap();
        assert_eq!(console.poll(due), None);
        assert_eq!(read(&file, 0).unwrap().0, b"login: ");
    }

    #[test]
    fn output_without_newlines_is_written_when_the_buffer_is_full() {
        let file = tempfile::tempfile().unwrap();
        let console = Console::new(file.try_clone().unwrap()).unwrap();
        for _ in 0..1000 {
            console.write(&[b'x'; 16]);
        }
        assert!(read(&file, 0).unwrap().0.len() >= 16_000 - PENDING);
    }
}
