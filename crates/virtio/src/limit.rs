//! Rate limit for log lines a guest can provoke.
//!
//! Attack: a guest that sends malformed requests as fast as it can fills the host's log disk.

use std::time::{Duration, Instant};

/// Lines let through in a [`WINDOW`].
const LINES: u32 = 8;
const WINDOW: Duration = Duration::from_secs(10);

/// One device's allowance.
#[derive(Debug)]
pub struct LogLimit {
    since: Instant,
    used: u32,
    suppressed: u64,
}

impl Default for LogLimit {
    fn default() -> Self {
        Self { since: Instant::now(), used: 0, suppressed: 0 }
    }
}

impl LogLimit {
    /// Whether a line may be written now; if so, how many were swallowed before it.
    pub fn allow(&mut self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&mut self, now: Instant) -> Option<u64> {
        if now.duration_since(self.since) >= WINDOW {
            self.since = now;
            self.used = 0;
        }
        if self.used >= LINES {
            self.suppressed += 1;
            return None;
        }
        self.used += 1;
        Some(std::mem::take(&mut self.suppressed))
    }
}

/// `warn!` within a [`LogLimit`].
#[macro_export]
macro_rules! guest_warn {
    ($limit:expr, $($rest:tt)+) => {
        if let Some(suppressed) = $limit.allow() {
            tracing::warn!(suppressed, $($rest)+);
        }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flood_is_cut_off_and_counted() {
        let mut limit = LogLimit::default();
        let start = limit.since;
        let passed = (0..100).filter(|_| limit.allow_at(start).is_some()).count();
        assert_eq!(passed as u32, LINES);
        assert_eq!(limit.allow_at(start + WINDOW), Some(100 - u64::from(LINES)));
    }
}
