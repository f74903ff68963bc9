//! Log lines on standard error, rate-limited: a guest can cause most of them.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use log::{LevelFilter, Log, Metadata, Record};

/// Lines written per [`WINDOW_SECONDS`].
/// Attack: a guest sends requests that are logged, to fill the host's log.
const LINES: u64 = 16;
const WINDOW_SECONDS: u64 = 10;

struct Lines {
    start: Instant,
    /// Number of the window (upper 32 bits) and lines in it (lower 32 bits).
    used: AtomicU64,
}

impl Lines {
    fn allow(&self, window: u64) -> bool {
        let count = |used: u64| {
            let lines = if used >> 32 == window { used & u64::from(u32::MAX) } else { 0 };
            Some(window << 32 | (lines + 1).min(u64::from(u32::MAX)))
        };
        let before = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, count);
        let before = before.unwrap_or_else(|used| used);
        before >> 32 != window || before & u64::from(u32::MAX) < LINES
    }
}

impl Log for Lines {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn log(&self, record: &Record<'_>) {
        if self.allow(self.start.elapsed().as_secs() / WINDOW_SECONDS + 1) {
            eprintln!("nacelle-fs: {}: {}", record.level(), record.args());
        }
    }

    fn flush(&self) {}
}

/// Installs the logger for warnings and errors of libraries.
pub fn init() {
    let lines = Lines { start: Instant::now(), used: AtomicU64::new(0) };
    // A second call has no effect.
    if log::set_boxed_logger(Box::new(lines)).is_ok() {
        log::set_max_level(LevelFilter::Warn);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_over_the_limit_are_dropped_until_the_next_window() {
        let lines = Lines { start: Instant::now(), used: AtomicU64::new(0) };
        assert_eq!((0..100).filter(|_| lines.allow(1)).count() as u64, LINES);
        assert!(lines.allow(2));
    }
}
