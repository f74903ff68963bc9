//! Lets one caller a pod through at a time.

use std::collections::HashSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

#[derive(Debug, Default)]
pub struct Queue {
    inside: Mutex<HashSet<String>>,
    left: Condvar,
}

/// Lets the next one through when dropped.
#[derive(Debug)]
pub struct Alone<'a> {
    queue: &'a Queue,
    id: String,
}

impl Queue {
    /// Waits for its turn.
    pub fn enter(&self, id: &str) -> Alone<'_> {
        let mut inside = self.inside();
        while !inside.insert(id.to_owned()) {
            inside = self.left.wait(inside).unwrap_or_else(PoisonError::into_inner);
        }
        Alone { queue: self, id: id.to_owned() }
    }

    pub fn try_enter(&self, id: &str) -> Option<Alone<'_>> {
        let free = self.inside().insert(id.to_owned());
        free.then(|| Alone { queue: self, id: id.to_owned() })
    }

    fn inside(&self) -> MutexGuard<'_, HashSet<String>> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Alone<'_> {
    fn drop(&mut self) {
        self.queue.inside().remove(&self.id);
        self.queue.left.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn one_at_a_time_a_pod_and_pods_do_not_hinder_each_other() {
        let queue = Queue::default();
        let first = queue.enter("a");
        assert!(queue.try_enter("a").is_none());
        assert!(queue.try_enter("b").is_some());
        std::thread::scope(|scope| {
            let second = scope.spawn(|| drop(queue.enter("a")));
            std::thread::sleep(Duration::from_millis(30));
            assert!(!second.is_finished());
            drop(first);
        });
        assert!(queue.try_enter("a").is_some());
    }
}
