//! Threads for calls that the kernel may never answer: a look at a path on a network or FUSE file
//! system whose server is gone blocks its thread for as long as the server is gone. Such calls have
//! threads of their own, a bounded number a pod, so that a hung volume costs its own pod these
//! threads and nobody else anything. The runtime's own blocking threads (`super::blocking`) are for
//! what only the host's own disks and cgroups can delay: the journal, calls of VMMs, cgroups.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::Error;

/// An idle thread waits this long for more to do.
const IDLE: Duration = Duration::from_secs(5);
/// Of a thread's stack, bytes: what runs here walks folders and does not recurse deeply.
const STACK: usize = 1 << 20;

type Job = Box<dyn FnOnce() + Send>;

/// A cheap handle; threads end after the last one is dropped and their work is done.
#[derive(Debug, Clone)]
pub(crate) struct Pool(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    name: &'static str,
    limit: Duration,
    /// One a thread. Held by the work itself, which goes on when its caller has given up.
    places: Arc<Semaphore>,
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

impl Pool {
    /// At most so many threads; `limit` is for [`Pool::look`].
    pub(crate) fn new(name: &'static str, threads: usize, limit: Duration) -> Self {
        Self(Arc::new(Inner {
            name,
            limit,
            places: Arc::new(Semaphore::new(threads)),
            state: Mutex::default(),
            more: Condvar::new(),
        }))
    }

    pub(crate) fn limit(&self) -> Duration {
        self.0.limit
    }

    /// Runs what must end within the pool's limit, the wait for a thread included. Work that does
    /// not end goes on without its caller.
    pub(crate) async fn look<T: Send + 'static>(
        &self,
        what: impl Into<String>,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, Error> {
        match tokio::time::timeout(self.0.limit, self.finish(work)).await {
            Ok(value) => Ok(value),
            Err(_) => Err(self.late(what)),
        }
    }

    /// The error of work that did not end in time.
    pub(crate) fn late(&self, what: impl Into<String>) -> Error {
        let mut what = what.into();
        if self.0.places.available_permits() == 0 {
            what.push_str(" (behind others of the same pod that have not ended)");
        }
        Error::Deadline { what, limit: self.0.limit }
    }

    /// Runs what may take as long as it takes.
    pub(crate) async fn finish<T: Send + 'static>(
        &self,
        work: impl FnOnce() -> T + Send + 'static,
    ) -> T {
        // The semaphore is never closed.
        let Ok(place) = self.0.places.clone().acquire_owned().await else {
            return std::future::pending().await;
        };
        let (reply, answer) = oneshot::channel();
        self.submit(job(place, reply, work));
        match answer.await {
            Ok(Ok(value)) => value,
            Ok(Err(panic)) => resume_unwind(panic),
            // Only at the process's end.
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
        if let Err(error) = thread.spawn(move || serve(&inner)) {
            tracing::warn!(%error, "no thread for a look at the host's files");
            let inner = self.0.clone();
            drop(tokio::task::spawn_blocking(move || serve(&inner)));
        }
    }
}

fn job<T: Send + 'static>(
    place: OwnedSemaphorePermit,
    reply: oneshot::Sender<std::thread::Result<T>>,
    work: impl FnOnce() -> T + Send + 'static,
) -> Job {
    Box::new(move || {
        // Its caller may have given up before its turn came.
        let result = (!reply.is_closed()).then(|| catch_unwind(AssertUnwindSafe(work)));
        drop(place);
        if let Some(result) = result {
            let _ = reply.send(result);
        }
    })
}

fn serve(pool: &Inner) {
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

    fn pool(threads: usize) -> Pool {
        Pool::new("test-pool", threads, Duration::from_millis(300))
    }

    #[tokio::test]
    async fn values_and_panics_come_back() {
        let pool = pool(2);
        for n in 0..100 {
            assert_eq!(pool.look("count", move || n).await.unwrap(), n);
        }
        let panicking = pool.clone();
        let panicked =
            tokio::spawn(async move { panicking.finish(|| panic!("as it should")).await });
        assert!(panicked.await.unwrap_err().is_panic());
        assert_eq!(pool.finish(|| 1).await, 1);
    }

    #[tokio::test]
    async fn work_that_hangs_ends_for_its_caller_and_takes_no_more_than_the_pools_threads() {
        let pool = pool(2);
        let (end, hang) = mpsc::channel::<()>();
        let hang = Arc::new(Mutex::new(hang));
        let started = Instant::now();
        let entered = Arc::new(std::sync::atomic::AtomicUsize::new(0));
        for n in 0..4 {
            let (hang, entered) = (hang.clone(), entered.clone());
            let error = pool.look("look at /dead", move || {
                entered.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
                let _ = hang.lock().map(|hang| hang.recv());
            });
            let error = error.await.unwrap_err().to_string();
            assert!(error.contains("look at /dead"), "{error}");
            assert_eq!(error.contains("behind others"), n > 0, "{n}: {error}");
        }
        assert!(started.elapsed() < Duration::from_secs(10));
        assert_eq!(entered.load(std::sync::atomic::Ordering::SeqCst), 2);
        // Another pool has threads of its own.
        assert_eq!(self::pool(1).look("x", || 2).await.unwrap(), 2);
        // When the file system answers, the pool is as it was.
        drop(end);
        let ended = Instant::now();
        while pool.look("again", || ()).await.is_err() {
            assert!(ended.elapsed() < Duration::from_secs(10));
        }
    }
}
