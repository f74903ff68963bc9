//! One pull for all concurrent callers with equal arguments.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::digest::Digest;
use crate::error::Error;
use crate::observe::Pulling;
use crate::progress::{Progress, ProgressSender, Tracker};
use crate::pull::pull;
use crate::reference::Reference;
use crate::registry::Auth;
use crate::state::State;

/// The pulls in progress.
#[derive(Debug, Default)]
pub struct SharedPulls {
    running: Mutex<HashMap<PullKey, SharedPull>>,
    next: AtomicU64,
}

/// Pulls are shared only between callers with equal credentials: a caller without access must not
/// get an image because another caller has access.
type PullKey = (Reference, Auth);
type Outcome = Option<Result<Digest, Arc<Error>>>;

/// A pull in progress.
#[derive(Debug)]
struct SharedPull {
    number: u64,
    waiters: usize,
    abort: AbortHandle,
    outcome: watch::Receiver<Outcome>,
    progress: watch::Receiver<Progress>,
}

impl SharedPulls {
    /// Pulls an image, or waits for the pull of another caller. The pull is cancelled when all of its callers
    /// have dropped their futures.
    pub async fn pull(
        self: &Arc<Self>,
        state: &Arc<State>,
        reference: Reference,
        auth: Auth,
        progress: Option<ProgressSender>,
    ) -> Result<Digest, Error> {
        let mut waiter = self.join(state, reference, auth);
        loop {
            if let (Some(sender), Some(updates)) = (&progress, &mut waiter.progress) {
                sender.send_replace(updates.borrow_and_update().clone());
            }
            if let Some(outcome) = waiter.outcome.borrow_and_update().clone() {
                return outcome.map_err(|e| match Arc::try_unwrap(e) {
                    Ok(e) => e,
                    Err(shared) => Error::Shared(shared),
                });
            }
            let progressed = async {
                match &mut waiter.progress {
                    Some(updates) if progress.is_some() => updates.changed().await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                // The task was aborted: its runtime shuts down.
                gone = waiter.outcome.changed() => gone.map_err(|_| Error::Cancelled)?,
                ended = progressed => {
                    if ended.is_err() {
                        waiter.progress = None;
                    }
                }
            }
        }
    }

    fn join(self: &Arc<Self>, state: &Arc<State>, reference: Reference, auth: Auth) -> Waiter {
        let key = (reference.clone(), auth.clone());
        let mut running = self.running.lock().expect("no holder panics");
        let shared = running.entry(key.clone()).or_insert_with(|| {
            let number = self.next.fetch_add(1, Ordering::Relaxed);
            let tracker = Tracker::new();
            let progress = tracker.subscribe();
            let (done, outcome) = watch::channel(None);
            let (pulls, state, key) = (Arc::clone(self), Arc::clone(state), key.clone());
            let pulling = Pulling::begin(state.observer.clone());
            let task = tokio::spawn(async move {
                let result = pull(state, reference, auth, tracker).await;
                pulling.end(&result);
                // A later caller starts a new pull.
                let mut running = pulls.running.lock().expect("no holder panics");
                if running.get(&key).is_some_and(|shared| shared.number == number) {
                    running.remove(&key);
                }
                drop(running);
                done.send_replace(Some(result.map_err(Arc::new)));
            });
            SharedPull { number, waiters: 0, abort: task.abort_handle(), outcome, progress }
        });
        shared.waiters += 1;
        Waiter {
            pulls: Arc::clone(self),
            number: shared.number,
            outcome: shared.outcome.clone(),
            progress: Some(shared.progress.clone()),
            key,
        }
    }
}

/// One caller's share of a pull; dropping the last one cancels the pull.
struct Waiter {
    pulls: Arc<SharedPulls>,
    key: PullKey,
    number: u64,
    outcome: watch::Receiver<Outcome>,
    progress: Option<watch::Receiver<Progress>>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut running = self.pulls.running.lock().expect("no holder panics");
        let Some(shared) = running.get_mut(&self.key).filter(|f| f.number == self.number) else {
            return;
        };
        shared.waiters -= 1;
        if shared.waiters == 0 {
            shared.abort.abort();
            running.remove(&self.key);
        }
    }
}
