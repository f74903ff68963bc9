//! Threads for calls that may block on a file system which the agent does not control: a host
//! volume, a disk, a mount of a container (FUSE, NFS). On the agent's own thread such a call would
//! stop the reaper and all requests.
//!
//! Each container has a pool of a few threads, one thread for each call. A call that misses its
//! deadline fails; its thread stays until the kernel returns, and keeps its slot in the pool. So a
//! container whose file systems hang uses up its own pool only.

use std::collections::HashMap;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

use crate::error::{Context, Error, Result};

/// Timeout for finding or reading something small.
pub const LOOKUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Timeout for mounting and unmounting, which may read and write a disk.
pub const MOUNT_TIMEOUT: Duration = Duration::from_secs(30);
/// Timeout for copying an image's content into a volume.
pub const COPY_TIMEOUT: Duration = Duration::from_secs(120);
/// Timeout for the statistics of one file system.
pub const STATS_TIMEOUT: Duration = Duration::from_secs(4);

/// Maximum threads of one pool.
/// Attack: unlimited execs in a container whose `/etc` hangs, each of which would leave a thread
/// behind.
const MAX_THREADS: usize = 4;
/// Stack size of a thread, bytes; only touched pages use memory.
const STACK: usize = 512 << 10;

/// All pools in use, by name.
#[derive(Debug, Default)]
pub struct Pools(Mutex<HashMap<String, Weak<Shared>>>);

#[derive(Debug)]
struct Shared {
    slots: Arc<Semaphore>,
    /// Threads whose caller gave up. Below zero for a moment when a thread ends at its deadline.
    overdue: AtomicIsize,
}

/// The threads of one container or one purpose.
#[derive(Debug, Clone)]
pub struct Pool {
    name: String,
    shared: Arc<Shared>,
}

impl Pools {
    /// For the root file system and volumes of a container.
    pub fn for_container(&self, id: &str) -> Pool {
        self.of(format!("container {id}"))
    }

    /// For the removal of a container, independent of hung calls of the container's own pool.
    pub fn for_removal(&self, id: &str) -> Pool {
        self.of(format!("removal of container {id}"))
    }

    /// For the statistics of one file system, so that they cannot delay a removal.
    pub fn for_stats(&self, what: &str, id: &str) -> Pool {
        self.of(format!("statistics of {what} {id}"))
    }

    fn of(&self, name: String) -> Pool {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // The host may use any number of ids: unused pools are dropped.
        all.retain(|_, pool| pool.strong_count() > 0);
        if let Some(shared) = all.get(&name).and_then(Weak::upgrade) {
            return Pool { name, shared };
        }
        let slots = Arc::new(Semaphore::new(MAX_THREADS));
        let shared = Arc::new(Shared { slots, overdue: AtomicIsize::new(0) });
        all.insert(name.clone(), Arc::downgrade(&shared));
        Pool { name, shared }
    }
}

impl Pool {
    /// Runs `work` on a thread. A result that arrives after the deadline is dropped.
    pub async fn run<T: Send + 'static>(
        &self,
        operation: &str,
        limit: Duration,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run_or_undo(operation, limit, work, drop).await
    }

    /// Same for work with side effects: `undo` gets a result that arrives after the deadline.
    pub async fn run_or_undo<T: Send + 'static>(
        &self,
        operation: &str,
        limit: Duration,
        work: impl FnOnce() -> Result<T> + Send + 'static,
        undo: impl FnOnce(T) + Send + 'static,
    ) -> Result<T> {
        let operation = format!("{}: {operation}", self.name);
        let deadline = tokio::time::Instant::now() + limit;
        let timed_out = || Error::Deadline { operation: operation.clone(), after: limit };
        if self.shared.overdue.load(Ordering::Acquire) >= MAX_THREADS as isize {
            return Err(Error::Hung { operation, threads: MAX_THREADS });
        }
        let slot =
            tokio::time::timeout_at(deadline, Arc::clone(&self.shared.slots).acquire_owned());
        let Ok(Ok(slot)) = slot.await else { return Err(timed_out()) };
        let (sender, mut receiver) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        let thread = move || {
            if let Err(given_up) = sender.send(work()) {
                if let Ok(value) = given_up {
                    undo(value);
                }
                shared.overdue.fetch_sub(1, Ordering::AcqRel);
            }
            drop(slot);
        };
        thread::Builder::new()
            .name("blocking".to_owned())
            .stack_size(STACK)
            .spawn(thread)
            .context(|| format!("{operation}: start a thread"))?;
        let ended = match tokio::time::timeout_at(deadline, &mut receiver).await {
            Ok(ended) => ended.ok(),
            Err(_elapsed) => {
                // After close, `send` on the thread fails; it may have sent before.
                receiver.close();
                match receiver.try_recv() {
                    Ok(result) => Some(result),
                    Err(_) => {
                        self.shared.overdue.fetch_add(1, Ordering::AcqRel);
                        tracing::warn!(operation, "a file system does not answer");
                        return Err(timed_out());
                    }
                }
            }
        };
        ended.unwrap_or_else(|| {
            Err(Error::Helper {
                operation: "call into a file system",
                reason: "the thread died".to_owned(),
            })
        })
    }
}

/// Waits for a lock or other resource that may be held during a file system call.
pub async fn with_timeout<T>(
    operation: &str,
    limit: Duration,
    wait: impl Future<Output = T>,
) -> Result<T> {
    tokio::time::timeout(limit, wait)
        .await
        .map_err(|_| Error::Deadline { operation: operation.to_owned(), after: limit })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn a_hung_call_fails_at_its_deadline_and_blocks_only_its_own_pool() {
        let pools = Pools::default();
        let (a, b) = (pools.for_container("a"), pools.for_container("b"));
        let (release, hold) = mpsc::channel::<()>();
        let hold = Arc::new(Mutex::new(hold));
        let (undone, undos) = mpsc::channel();
        for n in 0..MAX_THREADS {
            let (hold, undone) = (Arc::clone(&hold), undone.clone());
            let work = move || {
                let _ = hold.lock().unwrap().recv();
                Ok(n)
            };
            let undo = move |n| undone.send(n).unwrap();
            let error = a.run_or_undo("look", SHORT, work, undo).await.unwrap_err();
            assert!(matches!(error, Error::Deadline { .. }), "{error}");
            assert!(error.to_string().contains("container a: look"), "{error}");
        }
        // Once all threads hang, a call fails at once and no further thread is created.
        let error =
            pools.for_container("a").run("look", LOOKUP_TIMEOUT, || Ok(())).await.unwrap_err();
        assert!(matches!(error, Error::Hung { .. }), "{error}");
        assert_eq!(b.run("look", LOOKUP_TIMEOUT, || Ok(7)).await.unwrap(), 7);
        // A late result is undone, and its slot is free again.
        drop(release);
        let mut all: Vec<usize> = undos.iter().take(MAX_THREADS).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3]);
        let start = std::time::Instant::now();
        while a.run("look", LOOKUP_TIMEOUT, || Ok(())).await.is_err() {
            assert!(start.elapsed() < LOOKUP_TIMEOUT, "the pool does not recover");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn calls_beyond_the_number_of_threads_wait_for_a_slot() {
        let pool = Pools::default().for_container("a");
        let all = (0..64).map(|n| {
            let pool = pool.clone();
            tokio::spawn(async move { pool.run("look", LOOKUP_TIMEOUT, move || Ok(n)).await })
        });
        for (n, task) in all.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(task.await.unwrap().unwrap(), n);
        }
    }
}
