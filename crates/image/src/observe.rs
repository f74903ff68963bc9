//! What is measured of pulls, for an embedder that counts it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::error::{Error, ErrorKind};

/// Receives measurements. It is called while data arrives, so it must not block.
pub trait Observer: std::fmt::Debug + Send + Sync {
    /// A pull has ended. Callers that share a pull count once.
    fn pulled(&self, outcome: Outcome, took: Duration);
    /// So many bytes of layers have arrived from a registry.
    fn fetched(&self, bytes: u64);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Ok,
    Failed,
    /// All of its callers have gone.
    Cancelled,
}

/// Receives measurements and does nothing.
#[derive(Debug, Clone, Copy, Default)]
pub struct Unobserved;

impl Observer for Unobserved {
    fn pulled(&self, _: Outcome, _: Duration) {}
    fn fetched(&self, _: u64) {}
}

/// Reports a pull once; as cancelled if it is dropped before its end.
#[derive(Debug)]
pub(crate) struct Pulling {
    observer: Arc<dyn Observer>,
    began: Instant,
    outcome: Outcome,
}

impl Pulling {
    pub(crate) fn begin(observer: Arc<dyn Observer>) -> Self {
        Self { observer, began: Instant::now(), outcome: Outcome::Cancelled }
    }

    pub(crate) fn end<T>(mut self, result: &Result<T, Error>) {
        self.outcome = match result {
            Ok(_) => Outcome::Ok,
            Err(error) if error.kind() == ErrorKind::Cancelled => Outcome::Cancelled,
            Err(_) => Outcome::Failed,
        };
    }
}

impl Drop for Pulling {
    fn drop(&mut self) {
        self.observer.pulled(self.outcome, self.began.elapsed());
    }
}

/// Turns the position in a blob into the number of bytes that have arrived. A blob that is begun again
/// arrives again.
#[derive(Debug)]
pub(crate) struct Arrivals<'a> {
    observer: &'a dyn Observer,
    /// [`NOWHERE`] until the first report, which is where an earlier pull has stopped.
    position: AtomicU64,
}

const NOWHERE: u64 = u64::MAX;

impl<'a> Arrivals<'a> {
    pub(crate) fn new(observer: &'a dyn Observer) -> Self {
        Self { observer, position: AtomicU64::new(NOWHERE) }
    }

    pub(crate) fn at(&self, position: u64) {
        let before = self.position.swap(position, Ordering::Relaxed);
        if before == NOWHERE {
            return;
        }
        // Begun again: what is there has arrived since.
        let arrived = if position >= before { position - before } else { position };
        if arrived > 0 {
            self.observer.fetched(arrived);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    #[derive(Debug, Default)]
    struct Seen {
        bytes: AtomicU64,
        outcomes: Mutex<Vec<Outcome>>,
    }

    impl Observer for Seen {
        fn pulled(&self, outcome: Outcome, _: Duration) {
            self.outcomes.lock().unwrap().push(outcome);
        }

        fn fetched(&self, bytes: u64) {
            self.bytes.fetch_add(bytes, Ordering::Relaxed);
        }
    }

    #[test]
    fn bytes_of_an_earlier_pull_do_not_count_and_those_that_come_twice_do() {
        let seen = Seen::default();
        let arrivals = Arrivals::new(&seen);
        for position in [100, 150, 150, 20, 60] {
            arrivals.at(position);
        }
        assert_eq!(seen.bytes.load(Ordering::Relaxed), 50 + 20 + 40);
    }

    #[test]
    fn every_pull_is_reported_once_also_one_that_is_dropped() {
        let seen = Arc::new(Seen::default());
        Pulling::begin(seen.clone()).end(&Ok(()));
        Pulling::begin(seen.clone()).end::<()>(&Err(Error::Cancelled));
        drop(Pulling::begin(seen.clone()));
        let reason = String::new();
        let error = Error::InvalidImage { what: String::new(), reason };
        Pulling::begin(seen.clone()).end::<()>(&Err(error));
        use Outcome::{Cancelled, Failed, Ok as Done};
        assert_eq!(*seen.outcomes.lock().unwrap(), [Done, Cancelled, Cancelled, Failed]);
    }
}
