//! Conversions that access the host's files. A directory of the host may be on a network file system
//! without a server; then the access blocks one of the pod's threads, while kubelets
//! retry. So there is one at a time for each container.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, MutexGuard};

use tonic::Status;

/// Pod id, name and attempt of a container.
pub(crate) type Key = (String, String, u32);

#[derive(Clone, Debug, Default)]
pub(crate) struct Conversions {
    running: Arc<Mutex<HashSet<Key>>>,
}

/// A running conversion; held by its thread, which continues when its caller has
/// given up.
#[derive(Debug)]
pub(crate) struct Conversion {
    key: Key,
    conversions: Conversions,
}

impl Conversions {
    fn running(&self) -> MutexGuard<'_, HashSet<Key>> {
        self.running.lock().expect("no holder panics")
    }

    /// Fails while the request of an earlier caller for the same container is converted.
    pub(crate) fn begin(&self, key: Key) -> Result<Conversion, Status> {
        if !self.running().insert(key.clone()) {
            let (pod, name, _) = key;
            return Err(Status::unavailable(format!(
                "container {name} of pod {pod}: an earlier request for it still waits for files of \
                 the host that its mounts name; look for a network file system that does not answer"
            )));
        }
        Ok(Conversion { key, conversions: self.clone() })
    }
}

impl Drop for Conversion {
    fn drop(&mut self) {
        self.conversions.running().remove(&self.key);
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
    async fn a_retry_is_rejected_until_the_first_thread_has_ended() {
        let conversions = Conversions::default();
        let first = conversions.begin(key(0)).unwrap();
        let (answer, server) = std::sync::mpsc::channel::<()>();
        let thread = tokio::task::spawn_blocking(move || {
            let _held = first;
            let _ = server.recv();
        });
        let refused = conversions.begin(key(0)).unwrap_err();
        assert_eq!(refused.code(), Code::Unavailable);
        assert!(refused.message().starts_with("container web of pod 1234"), "{refused}");
        drop(conversions.begin(key(1)).unwrap());
        drop(answer);
        thread.await.unwrap();
        drop(conversions.begin(key(0)).unwrap());
    }
}
