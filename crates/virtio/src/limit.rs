//! Rate limit for log lines a guest can provoke.
//!
//! Attack: a guest that sends malformed requests as fast as it can fills the host's log disk.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines let through in a [`WINDOW`].
pub(crate) const LINES: u32 = 8;
const WINDOW: Duration = Duration::from_secs(10);

/// One device's allowance, for its transport, queues and engines together. It lives as long as the
/// device: a driver that resets it gets no new one.
#[derive(Debug, Default)]
pub struct LogLimit(Mutex<Used>);

#[derive(Debug)]
struct Used {
    since: Instant,
    lines: u32,
    suppressed: u64,
}

impl Default for Used {
    fn default() -> Self {
        Self { since: Instant::now(), lines: 0, suppressed: 0 }
    }
}

impl LogLimit {
    /// Whether a line may be written now; if so, how many were swallowed before it.
    pub fn allow(&self) -> Option<u64> {
        self.allow_at(Instant::now())
    }

    fn allow_at(&self, now: Instant) -> Option<u64> {
        let mut used = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if now.duration_since(used.since) >= WINDOW {
            used.since = now;
            used.lines = 0;
        }
        if used.lines >= LINES {
            used.suppressed += 1;
            return None;
        }
        used.lines += 1;
        Some(std::mem::take(&mut used.suppressed))
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
        let limit = LogLimit::default();
        let start = Instant::now();
        let passed = (0..100).filter(|_| limit.allow_at(start).is_some()).count();
        assert_eq!(passed as u32, LINES);
        assert_eq!(limit.allow_at(start + WINDOW), Some(100 - u64::from(LINES)));
    }
}
