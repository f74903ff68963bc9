//! Waiting for a condition, bounded.

use std::time::{Duration, Instant};

use anyhow::{Result, bail};

/// The shortest limit: a machine that emulates another one stalls for seconds when it is busy.
const SHORTEST: Duration = Duration::from_secs(60);

/// Checks `condition` every 50 ms until it returns a value; after `limit`, or [`SHORTEST`], an error
/// with `what`.
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
            bail!("{what}: not true after {limit:?}");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
}
