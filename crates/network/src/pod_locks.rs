//! Per-pod mutex: serializes calls for one pod id.

use std::collections::HashSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub struct PodLocks {
    held: Mutex<HashSet<String>>,
    released: Condvar,
}

/// Lock of one pod id; released when dropped.
#[derive(Debug)]
pub struct PodLock<'a> {
    locks: &'a PodLocks,
    id: String,
}

impl PodLocks {
    /// Waits for the lock.
    pub fn lock(&self, id: &str) -> PodLock<'_> {
        let mut held = self.held();
        while !held.insert(id.to_owned()) {
            held = self.released.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        PodLock { locks: self, id: id.to_owned() }
    }

    pub fn try_lock(&self, id: &str) -> Option<PodLock<'_>> {
        let free = self.held().insert(id.to_owned());
        free.then(|| PodLock { locks: self, id: id.to_owned() })
    }

    fn held(&self) -> MutexGuard<'_, HashSet<String>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for PodLock<'_> {
    fn drop(&mut self) {
        self.locks.held().remove(&self.id);
        self.locks.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn calls_for_one_pod_are_serialized_and_pods_are_independent() {
        let locks = PodLocks::default();
        let first = locks.lock("a");
        assert!(locks.try_lock("a").is_none());
        assert!(locks.try_lock("b").is_some());
        std::thread::scope(|scope| {
            let second = scope.spawn(|| drop(locks.lock("a")));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!second.is_finished());
            drop(first);
        });
        assert!(locks.try_lock("a").is_some());
    }
}
