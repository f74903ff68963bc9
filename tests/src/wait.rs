//! Waiting for a condition, bounded.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The shortest limit: a machine that emulates another one stalls for seconds when it is busy.
const SHORTEST: Duration = Duration::from_secs(60);

/// Tries until `condition` gives something, every 50 ms; an error that says what was waited for
/// after `limit`, or [`SHORTEST`].
pub fn until<T>(
    what: &str,
    limit: Duration,
    mut condition: impl FnMut() -> Result<Option<T>>,
) -> Result<T> {
    let limit = limit.max(SHORTEST);
    let begin = Instant::now();
    loop {
        if let Some(found) = condition()? {
            return Ok(found);
        }
        if begin.elapsed() > limit {
            bail!("{what}: not so after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
