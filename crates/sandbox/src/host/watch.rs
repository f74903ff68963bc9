//! Watches of host directories: one inotify instance for the whole daemon, because a user may have
//! few of them (fs.inotify.max_user_instances, 128 by default) and a node has hundreds of pods.
//!
//! Reports only that something may have changed: the reader checks. Spec: inotify(7).

use std::collections::HashMap;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify, WatchDescriptor};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// Renames, creations and removals in the directory, and of the directory itself.
const CHANGES: AddWatchFlags = AddWatchFlags::IN_CREATE
    .union(AddWatchFlags::IN_MOVE)
    .union(AddWatchFlags::IN_DELETE)
    .union(AddWatchFlags::IN_DELETE_SELF)
    .union(AddWatchFlags::IN_MOVE_SELF)
    .union(AddWatchFlags::IN_ONLYDIR);

/// The daemon's watcher; without inotify it watches nothing and its users poll.
#[derive(Debug, Clone)]
pub(crate) struct Watcher {
    inner: Option<Arc<Inner>>,
}

#[derive(Debug)]
struct Inner {
    events: fd::Events,
    /// The kernel returns the same descriptor for each watch of a directory.
    watched: Mutex<HashMap<WatchDescriptor, watch::Sender<()>>>,
}

/// A watch of a directory; ends on drop.
#[derive(Debug)]
pub(crate) struct Watch {
    inner: Arc<Inner>,
    descriptor: WatchDescriptor,
    changed: watch::Receiver<()>,
}

impl Watcher {
    /// Must be called in a tokio runtime; runs until `shutdown`.
    pub(crate) fn start(shutdown: CancellationToken) -> Self {
        let events = match fd::Events::new() {
            Ok(events) => events,
            Err(error) => {
                tracing::warn!(%error, "no inotify: polling for changes of volumes");
                return Self { inner: None };
            }
        };
        let inner = Arc::new(Inner { events, watched: Mutex::default() });
        let reader = inner.clone();
        tokio::spawn(async move {
            tokio::select! {
                () = shutdown.cancelled() => {}
                () = reader.run() => {}
            }
        });
        Self { inner: Some(inner) }
    }

    /// None if the directory cannot be watched (it is gone, or the watch limit is reached). Blocks
    /// if the file system does not answer.
    pub(crate) fn watch(&self, directory: &Path) -> Option<Watch> {
        let inner = self.inner.as_ref()?;
        // Not under the lock, which all pods use. A concurrent drop of another watch may remove the
        // descriptor in between; then this watch gets no events, and its user polls anyway.
        let descriptor = match inner.events.inotify().add_watch(directory, CHANGES) {
            Ok(descriptor) => descriptor,
            Err(error) => {
                tracing::debug!(directory = %directory.display(), %error, "cannot be watched");
                return None;
            }
        };
        let mut watched = inner.lock();
        let sender = watched.entry(descriptor).or_insert_with(|| watch::Sender::new(()));
        let changed = sender.subscribe();
        Some(Watch { inner: inner.clone(), descriptor, changed })
    }
}

impl Watch {
    /// Resolves after a change; false if there will be no more.
    pub(crate) async fn changed(&mut self) -> bool {
        self.changed.changed().await.is_ok()
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        let mut watched = self.inner.lock();
        // The count includes this watch.
        if watched.get(&self.descriptor).is_some_and(|s| s.receiver_count() <= 1) {
            watched.remove(&self.descriptor);
            // Fails if the directory is gone: the kernel has removed the watch.
            let _ = self.inner.events.inotify().rm_watch(self.descriptor);
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, HashMap<WatchDescriptor, watch::Sender<()>>> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn run(&self) {
        while let Ok(events) = self.events.next().await {
            let mut watched = self.lock();
            for event in events {
                if event.mask.contains(AddWatchFlags::IN_Q_OVERFLOW) {
                    // Events were lost: notify all.
                    watched.values().for_each(|sender| sender.send_replace(()));
                } else if event.mask.contains(AddWatchFlags::IN_IGNORED) {
                    watched.remove(&event.wd);
                } else if let Some(sender) = watched.get(&event.wd) {
                    sender.send_replace(());
                }
            }
        }
    }
}

#[allow(unsafe_code)] // tokio has no safe way to watch a descriptor
mod fd {
    use std::io;
    use std::os::fd::{AsFd, AsRawFd, RawFd};

    use nix::errno::Errno;
    use nix::sys::inotify::InotifyEvent;
    use tokio::io::Interest;
    use tokio::io::unix::AsyncFd;

    use super::{InitFlags, Inotify};

    #[derive(Debug)]
    struct Owned(Inotify);

    impl AsRawFd for Owned {
        fn as_raw_fd(&self) -> RawFd {
            self.0.as_fd().as_raw_fd()
        }
    }

    #[derive(Debug)]
    pub(super) struct Events(AsyncFd<Owned>);

    impl Events {
        pub(super) fn new() -> io::Result<Self> {
            let owned = Owned(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?);
            // SAFETY: Owned gives the descriptor of the Inotify inside it, which stays open and the
            // same for as long as that lives, and the AsyncFd owns it from here on.
            let fd = unsafe { AsyncFd::register_with_interest(owned, Interest::READABLE) };
            Ok(Self(fd.map_err(io::Error::from)?))
        }

        pub(super) fn inotify(&self) -> &Inotify {
            &self.0.get_ref().0
        }

        pub(super) async fn next(&self) -> io::Result<Vec<InotifyEvent>> {
            loop {
                let mut ready = self.0.readable().await?;
                match self.inotify().read_events() {
                    Ok(events) => return Ok(events),
                    Err(Errno::EAGAIN) => ready.clear_ready(),
                    Err(Errno::EINTR) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::time::Duration;

    use super::*;

    async fn soon(watch: &mut Watch) -> Option<bool> {
        tokio::time::timeout(Duration::from_secs(5), watch.changed()).await.ok()
    }

    #[tokio::test]
    async fn two_watches_of_a_directory_are_independent() {
        let dir = tempfile::tempdir().unwrap();
        let watcher = Watcher::start(CancellationToken::new());
        let mut a = watcher.watch(dir.path()).unwrap();
        let mut b = watcher.watch(dir.path()).unwrap();
        fs::write(dir.path().join("x"), "").unwrap();
        assert_eq!((soon(&mut a).await, soon(&mut b).await), (Some(true), Some(true)));
        drop(a);
        fs::rename(dir.path().join("x"), dir.path().join("y")).unwrap();
        assert_eq!(soon(&mut b).await, Some(true));
        drop(b);
        assert!(watcher.inner.unwrap().lock().is_empty());
    }

    #[tokio::test]
    async fn a_watch_ends_when_its_directory_is_removed() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().join("directory");
        fs::create_dir(&directory).unwrap();
        let watcher = Watcher::start(CancellationToken::new());
        let mut watch = watcher.watch(&directory).unwrap();
        fs::remove_dir(&directory).unwrap();
        while soon(&mut watch).await.unwrap() {}
        assert!(watcher.watch(&directory).is_none());
    }
}
