//! Open files and directories of the guest.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use super::node::Node;

/// Entries of a directory that were read and not returned yet.
#[derive(Debug, Default)]
pub(super) struct Position {
    pub(super) entries: Vec<u8>,
    /// Offset at which the kernel continues, which all requests of the handle change.
    pub(super) next: u64,
}

#[derive(Debug)]
pub(super) struct Handle {
    node: Arc<Node>,
    pub(super) file: File,
    position: Mutex<Position>,
}

impl Handle {
    /// Device number of its file system.
    pub(super) fn dev(&self) -> u64 {
        self.node.dev()
    }

    pub(super) fn position(&self) -> MutexGuard<'_, Position> {
        self.position.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// All open files; each has a file descriptor, so RLIMIT_NOFILE is their limit.
#[derive(Debug, Default)]
pub(super) struct Handles {
    open: RwLock<HashMap<u64, Arc<Handle>>>,
    last: AtomicU64,
}

impl Handles {
    pub(super) fn add(&self, node: Arc<Node>, file: File) -> u64 {
        let id = self.last.fetch_add(1, Ordering::Relaxed) + 1;
        let handle = Arc::new(Handle { node, file, position: Mutex::default() });
        self.open.write().unwrap_or_else(PoisonError::into_inner).insert(id, handle);
        id
    }

    /// The handle; EBADF if it does not exist or is not of that node.
    pub(super) fn get(&self, node: u64, id: u64) -> io::Result<Arc<Handle>> {
        let open = self.open.read().unwrap_or_else(PoisonError::into_inner);
        let handle = open.get(&id).filter(|handle| handle.node.id == node);
        handle.cloned().ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    pub(super) fn remove(&self, node: u64, id: u64) -> io::Result<()> {
        let mut open = self.open.write().unwrap_or_else(PoisonError::into_inner);
        if open.get(&id).is_none_or(|handle| handle.node.id != node) {
            return Err(io::Error::from_raw_os_error(libc::EBADF));
        }
        let handle = open.remove(&id);
        drop(open);
        // Closes the file without the lock: this may take long on a network file system.
        drop(handle);
        Ok(())
    }

    pub(super) fn clear(&self) {
        let open = std::mem::take(&mut *self.open.write().unwrap_or_else(PoisonError::into_inner));
        drop(open);
    }
}
