//! Times on the wire: nanoseconds since 1970, 0 for none.

use std::time::{SystemTime, UNIX_EPOCH};

pub fn nanos(time: SystemTime) -> i64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}
