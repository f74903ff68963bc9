//! Threads for calls that may never return: a call on a path of a network or FUSE file system whose
//! server is gone blocks its thread for as long as that lasts. Such calls run on a bounded number
//! of threads per pod, so that a hung volume affects its own pod only. The runtime's blocking
//! threads (`super::blocking`) are for calls that only the host's own disks and cgroups can delay:
//! the journal, VMM calls, cgroups.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::Error;

/// Idle time after which a thread exits.
const IDLE: Duration = Duration::from_secs(5);
/// Stack size of a thread, bytes.
const STACK: usize = 1 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// Cheap to clone; threads exit after the last handle is dropped and their work is done.
#[derive(Debug, Clone)]
pub(crate) struct BlockingPool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: &'static str,
    limit: Duration,
    /// One per thread. Held by the work itself, which continues if its caller gives up.
    permits: Arc<Semaphore>,
    state: Mutex<State>,
    more: Condvar,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    idle: usize,
}

impl std::fmt::Debug for State {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { jobs, idle } = self;
        f.debug_struct("State").field("jobs", &jobs.len()).field("idle", idle).finish()
    }
}

impl Inner {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BlockingPool {
    /// `limit` applies to [`BlockingPool::run_with_limit`].
    pub(crate) fn new(name: &'static str, threads: usize, limit: Duration) -> Self {
        Self(Arc::new(Inner {
            name,
            limit,
            permits: Arc::new(Semaphore::new(threads)),
            state: Mutex::default(),
            more: Condvar::new(),
        }))
    }

    pub(crate) fn limit(&self) -> Duration {
        self.0.limit
    }

    /// Runs work that must complete within the pool's limit, including the wait for a thread. After
    /// a timeout the work continues without its caller.
    pub(crate) async fn run_with_limit<T: Send + 'static>(
        &self,
        what: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        match tokio::time::timeout(self.0.limit, self.run(work)).await {
            Ok(value) => Ok(value),
            Err(_) => Err(self.timeout_error(what)),
        }
    }

    /// The error after a timeout.
    pub(crate) fn timeout_error(&self, what: impl Into<String>) -> Error {
        let mut what = what.into();
        if self.0.permits.available_permits() == 0 {
            what.push_str(" (queued behind calls of the same pod that hang)");
        }
        Error::Deadline { what, limit: self.0.limit }
    }

    /// Runs work without a limit.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        // The semaphore is never closed.
        let Ok(permit) = self.0.permits.clone().acquire_owned().await else {
            return std::future::pending().await;
        };
        let (reply, answer) = oneshot::channel();
        self.submit(job(permit, reply, work));
        match answer.await {
            Ok(Ok(value)) => value,
            Ok(Err(panic)) => resume_unwind(panic),
            // Only at the exit of the process.
            Err(_) => std::future::pending().await,
        }
    }

    fn submit(&self, job: Job) {
        let mut state = self.0.state();
        state.jobs.push_back(job);
        if state.idle >= state.jobs.len() {
            return self.0.more.notify_one();
        }
        drop(state);
        let inner = self.0.clone();
        let thread = std::thread::Builder::new().name(self.0.name.into()).stack_size(STACK);
        if let Err(error) = thread.spawn(move || worker(&inner)) {
            tracing::warn!(%error, "cannot start a thread for host file access");
            let inner = self.0.clone();
            drop(tokio::task::spawn_blocking(move || worker(&inner)));
        }
    }
}

fn job<T: Send + 'static>(
    permit: OwnedSemaphorePermit,
    reply: oneshot::Sender<std::thread::Result<T>>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Job {
    Box::new(move || {
        // Skips work whose caller has given up.
        let result = (!reply.is_closed()).then(|| catch_unwind(AssertUnwindSafe(work)));
        drop(permit);
        if let Some(result) = result {
            let _ = reply.send(result);
        }
    })
}

fn worker(pool: &Inner) {
    let mut state = pool.state();
    loop {
        if let Some(job) = state.jobs.pop_front() {
            drop(state);
            job();
            state = pool.state();
            continue;
        }
        state.idle += 1;
        let (woken, waited) =
            pool.more.wait_timeout(state, IDLE).unwrap_or_else(PoisonError::into_inner);
        state = woken;
        state.idle -= 1;
        if waited.timed_out() && state.jobs.is_empty() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Instant;

    fn pool(threads: usize) -> BlockingPool {
        BlockingPool::new("test-pool", threads, Duration::from_millis(300))
    }

    #[tokio::test]
    async fn values_and_panics_are_returned() {
        let pool = pool(2);
        for n in 0..100 {
            assert_eq!(pool.run_with_limit("count", move || n).await.unwrap(), n);
        }
        let panicking = pool.clone();
        let panicked = tokio::spawn(async move { panicking.run(|| panic!("as it should")).await });
        assert!(panicked.await.unwrap_err().is_panic());
        assert_eq!(pool.run(|| 1).await, 1);
    }

    #[tokio::test]
    async fn hanging_work_times_out_and_uses_only_the_pools_threads() {
        let pool = pool(2);
        let (end, hang) = mpsc::channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        let started = Instant::now();
        let entered = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        for n in 0..4 {
            let (hang, entered) = (hang.clone(), entered.clone());
            let error = pool.run_with_limit("access /dead", move || {
                entered.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let _ = hang.lock().map(|hang| hang.recv());
            });
            let error = error.await.unwrap_err().to_string();
            assert!(error.contains("access /dead"), "{error}");
            assert_eq!(error.contains("queued behind"), n > 0, "{n}: {error}");
        }
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!(entered.load(std::sync::atomic::Ordering::SeqCst), 2);
        // Another pool has threads of its own.
        assert_eq!(self::pool(1).run_with_limit("x", || 2).await.unwrap(), 2);
        // The pool recovers when the file system answers.
        drop(end);
        let ended = Instant::now();
        while pool.run_with_limit("again", || ()).await.is_err() {
            assert!(ended.elapsed() < Duration::from_secs(10));
        }
    }
}
