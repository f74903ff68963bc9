//! Work that may block on a file system which the agent does not control: a volume of the host, a
//! disk, whatever a container has mounted (FUSE, NFS). The agent's own thread must never do it: it
//! would reap no child and answer no call meanwhile.
//!
//! Each container has a lane of its own: a few threads, each made for one piece of work. A piece
//! that is not done by its deadline fails; its thread stays behind until the kernel lets it go, and
//! keeps its place in the lane. So a container whose file systems hang uses up its own lane and
//! nothing of the others.

use std::collections::HashMap;
use std::sync::atomic::{AtomicIsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::thread;
use std::time::Duration;

use tokio::sync::{Semaphore, oneshot};

use crate::error::{Doing, Error, Result};

/// For finding or reading something small.
pub const LOOK_UP: Duration = Duration::from_secs(10);
/// For mounting and unmounting, which may read and write a disk.
pub const MOUNT: Duration = Duration::from_secs(30);
/// For copying what an image holds into a volume.
pub const COPY: Duration = Duration::from_secs(120);
/// For one number of the statistics.
pub const MEASURE: Duration = Duration::from_secs(4);

/// Threads of one lane.
/// Attack: execs without end in a container whose `/etc` hangs, each to leave a thread behind.
const THREADS: usize = 4;
/// Stack of such a thread, bytes; only what is used costs memory.
const STACK: usize = 512 << 10;

/// All lanes in use.
#[derive(Debug, Default)]
pub struct Lanes(Mutex<HashMap<String, Weak<Shared>>>);

#[derive(Debug)]
struct Shared {
    slots: Arc<Semaphore>,
    /// Threads whose work was given up. Below zero for a moment when one ends just then.
    overdue: AtomicIsize,
}

/// Where the work of one container is done.
#[derive(Debug, Clone)]
pub struct Lane {
    name: String,
    shared: Arc<Shared>,
}

impl Lanes {
    /// For a container's root and volumes.
    pub fn of_container(&self, id: &str) -> Lane {
        self.of(format!("container {id}"))
    }

    /// For taking it down, whatever has become of the other lane.
    pub fn of_removal(&self, id: &str) -> Lane {
        self.of(format!("removal of container {id}"))
    }

    /// For measuring one file system: statistics must not keep a container from being removed.
    pub fn of_measurement(&self, what: &str, id: &str) -> Lane {
        self.of(format!("statistics of {what} {id}"))
    }

    fn of(&self, name: String) -> Lane {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // Ids come from the host without end; only those in use are kept.
        all.retain(|_, lane| lane.strong_count() > 0);
        if let Some(shared) = all.get(&name).and_then(Weak::upgrade) {
            return Lane { name, shared };
        }
        let slots = Arc::new(Semaphore::new(THREADS));
        let shared = Arc::new(Shared { slots, overdue: AtomicIsize::new(0) });
        all.insert(name.clone(), Arc::downgrade(&shared));
        Lane { name, shared }
    }
}

impl Lane {
    /// Does `work` on a thread. What comes after the deadline is dropped.
    pub async fn run<T: Send + 'static>(
        &self,
        doing: &str,
        limit: Duration,
        work: impl FnOnce() -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.run_or_undo(doing, limit, work, drop).await
    }

    /// The same for work with an effect: `undo` gets what comes after the deadline.
    pub async fn run_or_undo<T: Send + 'static>(
        &self,
        doing: &str,
        limit: Duration,
        work: impl FnOnce() -> Result<T> + Send + 'static,
        undo: impl FnOnce(T) + Send + 'static,
    ) -> Result<T> {
        let doing = format!("{}: {doing}", self.name);
        let until = tokio::time::Instant::now() + limit;
        let late = || Error::Deadline { doing: doing.clone(), after: limit };
        if self.shared.overdue.load(Ordering::Acquire) >= THREADS as isize {
            return Err(Error::Hung { doing, threads: THREADS });
        }
        let slot = tokio::time::timeout_at(until, Arc::clone(&self.shared.slots).acquire_owned());
        let Ok(Ok(slot)) = slot.await else { return Err(late()) };
        let (answer, mut answered) = oneshot::channel();
        let shared = Arc::clone(&self.shared);
        let thread = move || {
            if let Err(given_up) = answer.send(work()) {
                if let Ok(value) = given_up {
                    undo(value);
                }
                shared.overdue.fetch_sub(1, Ordering::AcqRel);
            }
            drop(slot);
        };
        thread::Builder::new()
            .name("lane".to_owned())
            .stack_size(STACK)
            .spawn(thread)
            .doing(|| format!("{doing}: start a thread"))?;
        let ended = match tokio::time::timeout_at(until, &mut answered).await {
            Ok(ended) => ended.ok(),
            Err(_elapsed) => {
                // From here on the thread knows that nobody waits; it may have answered before.
                answered.close();
                match answered.try_recv() {
                    Ok(result) => Some(result),
                    Err(_) => {
                        self.shared.overdue.fetch_add(1, Ordering::AcqRel);
                        tracing::warn!(doing, "a file system does not answer");
                        return Err(late());
                    }
                }
            }
        };
        ended.unwrap_or_else(|| {
            Err(Error::Helper { doing: "work on a file system", why: "the thread died".to_owned() })
        })
    }
}

/// Waits for something that others may hold while they work on a file system.
pub async fn in_time<T>(doing: &str, limit: Duration, wait: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(limit, wait)
        .await
        .map_err(|_| Error::Deadline { doing: doing.to_owned(), after: limit })
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    #[tokio::test]
    async fn work_that_hangs_fails_by_its_deadline_and_holds_up_its_own_lane_only() {
        let lanes = Lanes::default();
        let (a, b) = (lanes.of_container("a"), lanes.of_container("b"));
        let (release, hold) = mpsc::channel::<()>();
        let hold = Arc::new(Mutex::new(hold));
        let (undone, undos) = mpsc::channel();
        for n in 0..THREADS {
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
        // Nothing is waited for once all of its threads hang, and no further thread is made.
        let error = lanes.of_container("a").run("look", LOOK_UP, || Ok(())).await.unwrap_err();
        assert!(matches!(error, Error::Hung { .. }), "{error}");
        assert_eq!(b.run("look", LOOK_UP, || Ok(7)).await.unwrap(), 7);
        // What ends late is undone, and its thread's place is free again.
        drop(release);
        let mut all: Vec<usize> = undos.iter().take(THREADS).collect();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 3]);
        let start = std::time::Instant::now();
        while a.run("look", LOOK_UP, || Ok(())).await.is_err() {
            assert!(start.elapsed() < LOOK_UP, "the lane does not recover");
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }

    #[tokio::test]
    async fn more_work_than_threads_is_done_one_after_the_other() {
        let lane = Lanes::default().of_container("a");
        let all = (0..64).map(|n| {
            let lane = lane.clone();
            tokio::spawn(async move { lane.run("look", LOOK_UP, move || Ok(n)).await })
        });
        for (n, task) in all.collect::<Vec<_>>().into_iter().enumerate() {
            assert_eq!(task.await.unwrap().unwrap(), n);
        }
    }
}
