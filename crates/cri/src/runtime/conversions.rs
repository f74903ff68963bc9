//! Conversions that look at the host's files. A folder of the host may lie on a network whose
//! server is gone; then the look does not end, and holds a thread, while kubelets try again and
//! again.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tonic::Status;

/// At once: few of the threads that tokio has for all that blocks.
const PLACES: usize = 64;
/// How long one waits for a place.
const PATIENCE: Duration = Duration::from_secs(10);

/// Pod id, name and attempt of a container.
pub(crate) type Key = (String, String, u32);

#[derive(Clone, Debug)]
pub(crate) struct Conversions {
    under_way: Arc<Mutex<HashSet<Key>>>,
    places: Arc<Semaphore>,
    patience: Duration,
}

/// A conversion under way; to be held by the thread that does it, which goes on when its caller has
/// given up.
#[derive(Debug)]
pub(crate) struct Conversion {
    _name: Name,
    _place: OwnedSemaphorePermit,
}

/// Among those under way until it is dropped.
#[derive(Debug)]
struct Name {
    key: Key,
    conversions: Conversions,
}

impl Default for Conversions {
    fn default() -> Self {
        Self::new(PLACES, PATIENCE)
    }
}

impl Conversions {
    fn new(places: usize, patience: Duration) -> Self {
        Self { under_way: Arc::default(), places: Arc::new(Semaphore::new(places)), patience }
    }

    fn under_way(&self) -> MutexGuard<'_, HashSet<Key>> {
        self.under_way.lock().expect("no holder panics")
    }

    /// Fails while the request of an earlier caller for the same container is converted.
    pub(crate) async fn begin(&self, key: Key) -> Result<Conversion, Status> {
        if !self.under_way().insert(key.clone()) {
            let (pod, name, _) = key;
            return Err(Status::unavailable(format!(
                "container {name} of pod {pod}: an earlier request for it still waits for files of \
                 the host that its mounts name; look for a network file system that does not answer"
            )));
        }
        let name = Name { key, conversions: self.clone() };
        let place = Arc::clone(&self.places).acquire_owned();
        match tokio::time::timeout(self.patience, place).await {
            Ok(Ok(place)) => Ok(Conversion { _name: name, _place: place }),
            Ok(Err(_)) | Err(_) => {
                let (pod, name, _) = &name.key;
                Err(Status::unavailable(format!(
                    "container {name} of pod {pod} has to wait: too many other requests wait for \
                     files of the host that their mounts name; look for a network file system that \
                     does not answer"
                )))
            }
        }
    }
}

impl Drop for Name {
    fn drop(&mut self) {
        self.conversions.under_way().remove(&self.key);
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    fn key(attempt: u32) -> Key {
        ("1234".into(), "web".into(), attempt)
    }

    #[tokio::test]
    async fn a_retry_is_refused_until_the_thread_of_the_first_has_ended() {
        let conversions = Conversions::default();
        let first = conversions.begin(key(0)).await.unwrap();
        let (answer, server) = std::sync::mpsc::channel::<()>();
        let thread = tokio::task::spawn_blocking(move || {
            let _held = first;
            let _ = server.recv();
        });
        let refused = conversions.begin(key(0)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        assert!(refused.message().starts_with("container web of pod 1234"), "{refused}");
        drop(conversions.begin(key(1)).await.unwrap());
        drop(answer);
        thread.await.unwrap();
        drop(conversions.begin(key(0)).await.unwrap());
    }

    #[tokio::test]
    async fn a_caller_that_finds_no_place_is_told_so_and_leaves_nothing() {
        let conversions = Conversions::new(1, Duration::from_millis(10));
        let first = conversions.begin(key(0)).await.unwrap();
        let refused = conversions.begin(key(1)).await.unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        assert!(refused.message().contains("too many"), "{refused}");
        drop(first);
        drop(conversions.begin(key(1)).await.unwrap());
        assert!(conversions.under_way().is_empty());
    }
}
