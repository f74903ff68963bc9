//! What all operations on the images of a directory share: its content, its store, and the locks that keep
//! them from doing the same work twice.

use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use std::sync::{Arc, Mutex, RwLock, Weak};

use crate::config::Config;
use crate::content::Content;
use crate::damaged::DamagedFiles;
use crate::digest::Digest;
use crate::error::Error;
use crate::files::{create_directory, remove_directory};
use crate::observe::Observer;
use crate::registry::Registries;
use crate::store::{Store, Temporary, View};

#[derive(Debug)]
pub struct State {
    pub config: Arc<Config>,
    pub observer: Arc<dyn Observer>,
    pub content: Content,
    pub registries: Registries,
    /// Locked during disk writes; readers use `view`.
    store: Mutex<Store>,
    /// The store after its last change. Locked only to copy or replace the pointer.
    view: RwLock<Arc<View>>,
    locks: Mutex<HashMap<(Purpose, Digest), Weak<Lock>>>,
    /// flock on the directory for the lifetime of this process.
    _lock: File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Purpose {
    Build,
    Blob,
}

type Lock = tokio::sync::Mutex<()>;

impl State {
    /// Opens the store and deletes incomplete files of a killed process. Blocking.
    pub fn open(config: Config, observer: Arc<dyn Observer>) -> Result<Self, Error> {
        create_directory(&config.root)?;
        let lock = lock(&config.root)?;
        let damaged = DamagedFiles::open(&config.root)?;
        let blobs = config.root.join("content");
        let content = Content::open(&blobs, config.max_partial_bytes, damaged)?;
        let store = Store::open(&config.root.join("images"), &content)?;
        content.start()?;
        let config = Arc::new(config);
        Ok(Self {
            registries: Registries::new(Arc::clone(&config)),
            config,
            observer,
            content,
            view: RwLock::new(Arc::new(store.view())),
            store: Mutex::new(store),
            locks: Mutex::default(),
            _lock: lock,
        })
    }

    /// The current state of the images; a change in progress is visible when it is complete.
    pub fn view(&self) -> Arc<View> {
        self.view.read().expect("no holder panics").clone()
    }

    /// Changes the store, then, without the lock, deletes the files that the change released.
    /// Blocking.
    pub fn change<T>(&self, work: impl FnOnce(&mut Store) -> Result<T, Error>) -> Result<T, Error> {
        let (result, pending_deletes) = {
            let mut store = self.store.lock().expect("no holder panics");
            let result = work(&mut store);
            // Also after an error: the change may have been applied in part.
            let view = Arc::new(store.view());
            let before =
                std::mem::replace(&mut *self.view.write().expect("no holder panics"), view);
            drop(before);
            (result, store.take_pending_deletes())
        };
        let deleted = pending_deletes.iter().try_for_each(|path| remove_directory(path));
        result.and_then(|value| deleted.map(|()| value))
    }

    /// A directory in which to build an image. Blocking.
    pub fn temporary(&self) -> Result<Temporary, Error> {
        self.change(Store::temporary)
    }

    pub fn build_lock(&self, id: Digest) -> Arc<Lock> {
        self.lock(Purpose::Build, id)
    }

    pub fn blob_lock(&self, digest: Digest) -> Arc<Lock> {
        self.lock(Purpose::Blob, digest)
    }

    fn lock(&self, purpose: Purpose, digest: Digest) -> Arc<Lock> {
        let mut locks = self.locks.lock().expect("no holder panics");
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(&(purpose, digest)).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        locks.insert((purpose, digest), Arc::downgrade(&lock));
        lock
    }
}

impl Drop for State {
    fn drop(&mut self) {
        self.content.stop();
    }
}

fn lock(root: &Path) -> Result<File, Error> {
    let path = root.join("images.lock");
    let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse { root: root.into() }),
        Err(std::fs::TryLockError::Error(e)) => Err(Error::io("lock", &path, e)),
    }
}
