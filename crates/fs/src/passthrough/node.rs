//! Nodes: the guest's inodes, one per file of the host, through whichever path it was found.
//!
//! A node is identified by the file's device and inode number only, so all shares, mounts and hard
//! links of one file give one node, and the guest's kernel has one inode for it: one page cache,
//! one set of locks, one socket.
//!
//! Directories are an exception ([`View`]): a directory in the guest's kernel has only one dentry,
//! which is moved when the directory is found by another name. A directory reached through a mount
//! inside a share is another node than the same directory elsewhere in the share, so that a mount
//! point in the guest stays where it is. A directory in a share that follows the host's mounts is
//! another node than in a share that does not, as its contents may differ. The files in these
//! directories are the same nodes.
//!
//! Inode numbers are reused after a file is removed. The birth time distinguishes the files; on
//! file systems without it the node keeps a file descriptor, so that the number is not reused.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::caching::Caching;
use super::stat::{SentVersion, Stat, Time};

/// The root's id (FUSE_ROOT_ID, linux/fuse.h).
pub(super) const ROOT: u64 = 1;
/// Most nodes, about 250 bytes each.
/// Attack: a guest looks up one file after the other and forgets none.
const NODES_MAX: usize = 4 << 20;

/// Identifies a file of the host while it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    ino: u64,
    /// The default for all files that are not directories.
    view: View,
}

/// Distinguishes the nodes of one directory of the host.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct View {
    /// Later mounts of the host appear in it.
    pub(super) follows: bool,
    /// Id of the mount inside the share through which it was reached; 0: the share's own mount.
    pub(super) submount: u64,
}

fn key(stat: &Stat, view: View) -> Key {
    let view = if stat.kind() == libc::S_IFDIR { view } else { View::default() };
    Key { dev: stat.dev, ino: stat.ino, view }
}

#[derive(Debug)]
pub(super) struct Node {
    pub(super) id: u64,
    key: Key,
    /// `S_IFMT` bits.
    kind: u32,
    btime: Option<Time>,
    place: Mutex<Place>,
}

/// Where the file was last found, and its file descriptor, if any.
#[derive(Debug)]
pub(super) struct Place {
    /// None for the root and for nodes that the guest has forgotten.
    pub(super) parent: Option<Arc<Node>>,
    pub(super) name: Box<CStr>,
    /// Id of the mount through which it was found.
    pub(super) mount: u64,
    pub(super) fd: Option<Arc<OwnedFd>>,
    /// The file descriptor is current while this is the current epoch ([`super::resolve`]).
    pub(super) epoch: u64,
    /// The name was removed: the node is only reachable through its file descriptor.
    pub(super) unlinked: bool,
    /// Used since the last check for file descriptors to close.
    pub(super) used: bool,
    pub(super) caching: Caching,
    pub(super) sent: SentVersion,
}

impl Place {
    pub(super) fn new(parent: Option<Arc<Node>>, name: &CStr, mount: u64) -> Self {
        Self {
            parent,
            name: name.into(),
            mount,
            fd: None,
            epoch: 0,
            unlinked: false,
            used: false,
            caching: Caching::default(),
            sent: SentVersion::default(),
        }
    }
}

impl Node {
    pub(super) fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether these are attributes of the same file.
    pub(super) fn is(&self, stat: &Stat) -> bool {
        let reused = matches!((self.btime, stat.btime), (Some(a), Some(b)) if a != b);
        self.key == key(stat, self.key.view) && self.kind == stat.kind() && !reused
    }

    /// The view of a directory that was found in it with these attributes.
    pub(super) fn view_below(&self, stat: &Stat) -> View {
        let crossed = stat.mount != self.place().mount;
        View {
            submount: if crossed { stat.mount } else { self.key.view.submount },
            ..self.key.view
        }
    }

    pub(super) fn dev(&self) -> u64 {
        self.key.dev
    }

    pub(super) fn is_dir(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Whether it keeps a file descriptor for its whole lifetime.
    pub(super) fn keeps_fd(&self) -> bool {
        self.btime.is_none()
    }
}

#[derive(Debug)]
struct NodeEntry {
    node: Arc<Node>,
    /// Lookup count (FUSE_FORGET).
    lookups: u64,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: HashMap<u64, NodeEntry>,
    keys: HashMap<Key, u64>,
    last: u64,
}

/// All nodes.
#[derive(Debug, Default)]
pub(super) struct Table(Mutex<Inner>);

impl Table {
    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes all nodes and adds the root.
    pub(super) fn reset(&self, root: &Stat, place: Place) -> Arc<Node> {
        let node = node(ROOT, root, View::default(), place);
        let mut inner = self.inner();
        let old = std::mem::take(&mut *inner);
        inner.keys.insert(node.key, ROOT);
        inner.nodes.insert(ROOT, NodeEntry { node: node.clone(), lookups: 1 });
        inner.last = ROOT;
        drop(inner);
        drop_all(old);
        node
    }

    pub(super) fn clear(&self) {
        let old = std::mem::take(&mut *self.inner());
        drop_all(old);
    }

    pub(super) fn get(&self, id: u64) -> io::Result<Arc<Node>> {
        let inner = self.inner();
        let known = inner.nodes.get(&id);
        known
            .map(|known| known.node.clone())
            .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
    }

    /// The node of a file, if the guest knows it; does not count a lookup.
    pub(super) fn find(&self, stat: &Stat, view: View) -> Option<Arc<Node>> {
        let inner = self.inner();
        let known = inner.nodes.get(inner.keys.get(&key(stat, view))?)?;
        known.node.is(stat).then(|| known.node.clone())
    }

    /// The node of a file, if the guest knows it; counts a lookup.
    pub(super) fn claim(&self, stat: &Stat, view: View) -> Option<Arc<Node>> {
        let key = key(stat, view);
        let mut inner = self.inner();
        let id = *inner.keys.get(&key)?;
        let known = inner.nodes.get_mut(&id)?;
        if !known.node.is(stat) {
            // Another file with that inode number: the previous one was removed.
            inner.keys.remove(&key);
            return None;
        }
        known.lookups = known.lookups.saturating_add(1);
        Some(known.node.clone())
    }

    /// Like [`Self::claim`], and creates the node if it is not known; returns whether it was
    /// created.
    pub(super) fn claim_or_insert(
        &self,
        stat: &Stat,
        view: View,
        place: Place,
    ) -> io::Result<(Arc<Node>, bool)> {
        if let Some(node) = self.claim(stat, view) {
            return Ok((node, false));
        }
        let mut inner = self.inner();
        if inner.nodes.len() >= NODES_MAX {
            return Err(io::Error::from_raw_os_error(libc::ENFILE));
        }
        let id = inner.last + 1;
        match inner.keys.entry(key(stat, view)) {
            // Another thread has created it.
            Entry::Occupied(_) => {
                drop(inner);
                let known = self.claim(stat, view).map(|node| (node, false));
                known.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
            }
            Entry::Vacant(free) => {
                free.insert(id);
                let node = node(id, stat, view, place);
                inner.nodes.insert(id, NodeEntry { node: node.clone(), lookups: 1 });
                inner.last = id;
                Ok((node, true))
            }
        }
    }

    pub(super) fn forget(&self, id: u64, count: u64) {
        // Closes file descriptors without the lock.
        let gone = self.inner().forget(id, count);
        if let Some(node) = gone {
            release(&node);
        }
    }

    /// One node per file system, a directory if there is one.
    pub(super) fn one_per_file_system(&self) -> Vec<Arc<Node>> {
        let mut found: HashMap<u64, Arc<Node>> = HashMap::new();
        for known in self.inner().nodes.values() {
            let node = &known.node;
            if !node.is_dir() && !node.is_regular() {
                continue;
            }
            match found.entry(node.dev()) {
                Entry::Occupied(mut taken) => {
                    if !taken.get().is_dir() {
                        taken.insert(node.clone());
                    }
                }
                Entry::Vacant(free) => drop(free.insert(node.clone())),
            }
        }
        found.into_values().collect()
    }

    #[cfg(test)]
    pub(super) fn len(&self) -> usize {
        self.inner().nodes.len()
    }
}

impl Inner {
    fn forget(&mut self, id: u64, count: u64) -> Option<Arc<Node>> {
        let known = self.nodes.get_mut(&id)?;
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups > 0 || id == ROOT {
            return None;
        }
        let node = self.nodes.remove(&id)?.node;
        if self.keys.get(&node.key) == Some(&id) {
            self.keys.remove(&node.key);
        }
        Some(node)
    }
}

fn node(id: u64, stat: &Stat, view: View, place: Place) -> Arc<Node> {
    let (key, kind, btime) = (key(stat, view), stat.kind(), stat.btime);
    Arc::new(Node { id, key, kind, btime, place: Mutex::new(place) })
}

/// Clears the parent: nodes that were found in each other, after renames on the host, would form a
/// reference cycle. The file descriptor of a directory stays open while nodes in it are known.
fn release(node: &Node) {
    let mut place = node.place();
    let parent = place.parent.take();
    let fd = if node.is_dir() { None } else { place.fd.take() };
    drop(place);
    drop((parent, fd));
}

fn drop_all(inner: Inner) {
    for known in inner.nodes.into_values() {
        release(&known.node);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FOLLOWS: View = View { follows: true, submount: 0 };

    fn stat(ino: u64, btime: i64) -> Stat {
        let now = Time { seconds: btime, nanos: 0 };
        Stat {
            dev: 1,
            ino,
            mode: libc::S_IFREG | 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            size: 0,
            blocks: 0,
            blksize: 4096,
            atime: now,
            mtime: now,
            ctime: now,
            btime: Some(now),
            mount: 1,
        }
    }

    fn place() -> Place {
        Place::new(None, c"x", 1)
    }

    #[test]
    fn a_file_has_one_node_until_all_lookups_are_forgotten() {
        let table = Table::default();
        table.reset(&stat(1, 0), place());
        let (first, made) = table.claim_or_insert(&stat(5, 0), View::default(), place()).unwrap();
        assert!(made);
        let (second, made) = table.claim_or_insert(&stat(5, 0), View::default(), place()).unwrap();
        assert!(!made && Arc::ptr_eq(&first, &second));
        table.forget(first.id, 1);
        assert!(table.get(first.id).is_ok());
        table.forget(first.id, 9);
        assert!(table.get(first.id).is_err() && table.find(&stat(5, 0), View::default()).is_none());
        // Forgetting unknown nodes has no effect; the root is never forgotten.
        for (id, count) in [(first.id, 1), (0, 1), (u64::MAX, u64::MAX), (ROOT, u64::MAX)] {
            table.forget(id, count);
        }
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn a_reused_inode_number_is_another_file() {
        let table = Table::default();
        table.reset(&stat(1, 0), place());
        let (old, _) = table.claim_or_insert(&stat(5, 1), View::default(), place()).unwrap();
        let (new, made) = table.claim_or_insert(&stat(5, 2), View::default(), place()).unwrap();
        assert!(made && old.id != new.id);
        assert!(Arc::ptr_eq(&table.find(&stat(5, 2), FOLLOWS).unwrap(), &new));
        // Forgetting the old one does not touch the new one.
        table.forget(old.id, 1);
        assert!(Arc::ptr_eq(&table.find(&stat(5, 2), FOLLOWS).unwrap(), &new));
    }

    #[test]
    fn a_directory_on_another_mount_has_its_own_node_and_a_file_has_not() {
        let table = Table::default();
        table.reset(&stat(1, 0), place());
        let folder = Stat { mode: libc::S_IFDIR | 0o755, ..stat(5, 0) };
        let (top, _) = table.claim_or_insert(&folder, View::default(), place()).unwrap();
        assert_eq!(top.view_below(&folder), View::default());
        let behind = Stat { mount: 2, ..folder };
        let view = top.view_below(&behind);
        assert_eq!(view, View { follows: false, submount: 2 });
        let place_behind = Place::new(Some(top.clone()), c"y", 2);
        let (other, made) = table.claim_or_insert(&behind, view, place_behind).unwrap();
        assert!(made && other.id != top.id);
        // Directories in it inherit its view.
        assert_eq!(other.view_below(&behind), view);
        let (file, _) = table.claim_or_insert(&stat(6, 0), View::default(), place()).unwrap();
        let same = Stat { mount: 2, ..stat(6, 0) };
        assert!(Arc::ptr_eq(&table.find(&same, other.view_below(&same)).unwrap(), &file));
    }
}
