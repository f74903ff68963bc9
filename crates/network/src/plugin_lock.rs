//! When CNI plugins may run: the spec forbids ADD and DEL during GC, which could free a new address.
//!
//! ADD and DEL have priority. GC starts only if no ADD or DEL runs, and does not delay new ones
//! while it waits for that. A running GC is killed when an ADD or DEL has waited for [`GRACE`]. An
//! incomplete GC is retried later.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Time that an ADD or DEL waits for a GC before the GC is killed.
const GRACE: Duration = Duration::from_secs(3);
/// Time that a GC waits for running ADDs and DELs before it is postponed.
const TIMEOUT: Duration = Duration::from_secs(5);

/// Lock for running plugins: shared by any number of ADD and DEL, exclusive for GC.
#[derive(Debug)]
pub struct PluginLock {
    state: Mutex<State>,
    changed: Condvar,
    interval: Duration,
    grace: Duration,
    timeout: Duration,
}

#[derive(Debug)]
struct State {
    /// Running ADDs and DELs.
    pods: usize,
    collecting: bool,
    /// ADDs and DELs that wait for the running GC, and the start of the first wait.
    waiting: usize,
    waiting_since: Option<Instant>,
    last: Instant,
    /// The last GC was not completed.
    postponed: bool,
    /// A task for the retry of a postponed GC exists.
    retry_task: bool,
}

/// Shared lock, for ADD and DEL.
#[derive(Debug)]
pub struct SharedGuard<'a>(&'a PluginLock);

/// Exclusive lock, for GC.
#[derive(Debug)]
pub struct ExclusiveGuard<'a>(&'a PluginLock);

impl PluginLock {
    pub fn new(interval: Duration) -> Self {
        Self::with_limits(interval, GRACE, TIMEOUT)
    }

    fn with_limits(interval: Duration, grace: Duration, timeout: Duration) -> Self {
        let state = State {
            pods: 0,
            collecting: false,
            waiting: 0,
            waiting_since: None,
            last: Instant::now(),
            postponed: false,
            retry_task: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), interval, grace, timeout }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the shared lock; waits only for a running GC.
    pub fn shared(&self) -> SharedGuard<'_> {
        let mut state = self.state();
        if state.collecting {
            state.waiting += 1;
            state.waiting_since.get_or_insert_with(Instant::now);
            while state.collecting {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting -= 1;
            if state.waiting == 0 {
                state.waiting_since = None;
            }
        }
        state.pods += 1;
        SharedGuard(self)
    }

    /// Takes the exclusive lock; None if ADDs or DELs run until the timeout.
    pub fn exclusive(&self) -> Option<ExclusiveGuard<'_>> {
        let busy = |state: &mut State| state.collecting || state.pods > 0 || state.waiting > 0;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.state(), self.timeout, busy)
            .unwrap_or_else(PoisonError::into_inner);
        if busy(&mut state) {
            return None;
        }
        state.collecting = true;
        Some(ExclusiveGuard(self))
    }

    /// Whether an interval has passed since the last call that returned true.
    pub fn is_due(&self) -> bool {
        let mut state = self.state();
        let due = state.last.elapsed() >= self.interval;
        if due {
            state.last = Instant::now();
        }
        due
    }

    pub fn postpone(&self, postponed: bool) {
        self.state().postponed = postponed;
    }

    /// Whether a GC was postponed and no retry task exists yet; registers one then.
    pub fn begin_retry(&self) -> bool {
        let mut state = self.state();
        state.postponed && !std::mem::replace(&mut state.retry_task, true)
    }

    /// Whether the retry task can end because no GC is postponed.
    pub fn end_retry(&self) -> bool {
        let mut state = self.state();
        if !state.postponed {
            state.retry_task = false;
        }
        !state.postponed
    }

    /// Maximum delay between two retries.
    pub fn interval(&self) -> Duration {
        self.interval
    }
}

impl ExclusiveGuard<'_> {
    /// Whether an ADD or DEL has waited too long.
    pub fn must_stop(&self) -> bool {
        self.0.state().waiting_since.is_some_and(|since| since.elapsed() >= self.0.grace)
    }
}

impl Drop for SharedGuard<'_> {
    fn drop(&mut self) {
        self.0.state().pods -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for ExclusiveGuard<'_> {
    fn drop(&mut self) {
        self.0.state().collecting = false;
        self.0.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn plugin_lock(grace_ms: u64, patience_ms: u64) -> PluginLock {
        let ms = Duration::from_millis;
        PluginLock::with_limits(ms(0), ms(grace_ms), ms(patience_ms))
    }

    #[test]
    fn a_waiting_gc_blocks_no_pod_and_times_out() {
        let plugin_lock = plugin_lock(60_000, 400);
        let hung = plugin_lock.shared();
        std::thread::scope(|scope| {
            let collection = scope.spawn(|| plugin_lock.exclusive().is_none());
            let (done, others) = mpsc::channel();
            let plugin_lock = &plugin_lock;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                drop(plugin_lock.shared());
                let _ = done.send(());
            });
            // Bounded, so that a failed test does not hang.
            let passed = others.recv_timeout(Duration::from_secs(10)).is_ok();
            let gave_up = collection.join().unwrap();
            drop(hung);
            assert!(passed && gave_up, "others passed: {passed}, the GC gave up: {gave_up}");
        });
        assert!(plugin_lock.exclusive().is_some());
    }

    #[test]
    fn a_gc_is_stopped_only_if_a_pod_waits_for_it() {
        let plugin_lock = plugin_lock(200, 60_000);
        let collection = plugin_lock.exclusive().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(!collection.must_stop());
        std::thread::scope(|scope| {
            let pod = scope.spawn(|| drop(plugin_lock.shared()));
            let started = Instant::now();
            while !collection.must_stop() && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(collection.must_stop());
            assert!(started.elapsed() >= Duration::from_millis(150));
            drop(collection);
            pod.join().unwrap();
        });
        // No pod waits any more.
        assert!(!plugin_lock.exclusive().unwrap().must_stop());
    }

    #[test]
    fn a_postponed_gc_is_retried_by_one_task() {
        let plugin_lock = plugin_lock(0, 0);
        assert!(!plugin_lock.begin_retry());
        plugin_lock.postpone(true);
        assert!(plugin_lock.begin_retry());
        assert!(!plugin_lock.begin_retry());
        assert!(!plugin_lock.end_retry());
        plugin_lock.postpone(false);
        assert!(plugin_lock.end_retry());
        plugin_lock.postpone(true);
        assert!(plugin_lock.begin_retry());
    }
}
