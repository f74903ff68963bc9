//! Rate limit for log lines that a guest can cause.
//!
//! Attack: a guest sends malformed requests at full speed to fill the host's log.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Lines written per [`WINDOW`].
pub(crate) const LINES: u32 = 8;
const WINDOW: Duration = Duration::from_secs(10);

/// The limit of one device, shared by its transport, queues and engines. It lives as long as the
/// device, so a driver cannot renew it with a reset.
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
    /// None: the line must not be written. Some: the number of lines suppressed before it.
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

/// `tracing::warn!`, rate-limited by a [`LogLimit`].
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
    fn lines_over_the_limit_are_suppressed_and_counted() {
        let limit = LogLimit::default();
        let start = Instant::now();
        let passed = (0..100).filter(|_| limit.allow_at(start).is_some()).count();
        assert_eq!(passed as u32, LINES);
        assert_eq!(limit.allow_at(start + WINDOW), Some(100 - u64::from(LINES)));
    }
}
