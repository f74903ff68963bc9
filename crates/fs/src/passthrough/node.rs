//! What the guest knows: a node for each file of the host, whichever way led to it.
//!
//! A node is found by the file's device and inode number alone, so all shares, mounts and hard links
//! that lead to one file give one node, and the guest's kernel has one inode for it: one page cache,
//! one set of locks, one socket.
//!
//! Folders are the exception ([`View`]), because a folder of the guest's kernel has one name only, which
//! moves when it is found under another. A folder that is reached through a mount inside a share is
//! another node than the same folder elsewhere in the share, so that a mount point in the guest stays
//! where it is. Where the host's later mounts are to appear, a folder is another one than where they are
//! not, as it may contain something else. The files in these folders are the same.
//!
//! Inode numbers are used again after a file is gone. The birth time tells the next file from the
//! last; where the file system has none, the node holds a descriptor, which keeps the number taken.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::ffi::CStr;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::stat::{Stat, Time, Version};

/// The root's id (linux/fuse.h, FUSE_ROOT_ID).
pub(super) const ROOT: u64 = 1;
/// Nodes that a guest may know of, some 250 bytes each.
/// Attack: a guest that looks up one file after the other and forgets none.
const NODES_MAX: usize = 4 << 20;

/// Which file of the host, as long as it exists.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    dev: u64,
    ino: u64,
    /// The default for all that is no folder.
    view: View,
}

/// Which of the nodes of one folder of the host.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct View {
    /// The host's later mounts appear in it.
    pub(super) follows: bool,
    /// Id of the mount inside the share through which it is reached; 0: it is on the share's own.
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
    born: Option<Time>,
    place: Mutex<Place>,
}

/// Where the file was seen last, and what refers to it meanwhile.
#[derive(Debug)]
pub(super) struct Place {
    /// None for the root, and for what the guest has forgotten.
    pub(super) parent: Option<Arc<Node>>,
    pub(super) name: Box<CStr>,
    /// Id of the mount through which it was seen.
    pub(super) mount: u64,
    pub(super) fd: Option<Arc<OwnedFd>>,
    /// The descriptor counts as long as this is the current epoch ([`super::resolve`]).
    pub(super) epoch: u64,
    /// The name leads here no more: the descriptor is all there is.
    pub(super) nameless: bool,
    /// Used since it was last looked at by those who close descriptors.
    pub(super) used: bool,
    /// A share that wants nothing cached leads here.
    pub(super) strict: bool,
    /// As the guest was last told.
    pub(super) told: Option<Version>,
}

impl Place {
    pub(super) fn new(parent: Option<Arc<Node>>, name: &CStr, mount: u64) -> Self {
        Self {
            parent,
            name: name.into(),
            mount,
            fd: None,
            epoch: 0,
            nameless: false,
            used: false,
            strict: false,
            told: None,
        }
    }
}

impl Node {
    pub(super) fn place(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether these are the attributes of this very file.
    pub(super) fn is(&self, stat: &Stat) -> bool {
        let reborn = matches!((self.born, stat.born), (Some(a), Some(b)) if a != b);
        self.key == key(stat, self.key.view) && self.kind == stat.kind() && !reborn
    }

    /// How a folder in it that is found with these attributes is seen.
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

    pub(super) fn is_folder(&self) -> bool {
        self.kind == libc::S_IFDIR
    }

    pub(super) fn is_regular(&self) -> bool {
        self.kind == libc::S_IFREG
    }

    /// Whether it holds a descriptor from the start to the end.
    pub(super) fn is_held(&self) -> bool {
        self.born.is_none()
    }
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    /// As the guest counts (FUSE_FORGET).
    lookups: u64,
}

#[derive(Debug, Default)]
struct Inner {
    nodes: HashMap<u64, Known>,
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

    /// Forgets everything but the root.
    pub(super) fn reset(&self, root: &Stat, place: Place) -> Arc<Node> {
        let node = node(ROOT, root, View::default(), place);
        let mut inner = self.inner();
        let old = std::mem::take(&mut *inner);
        inner.keys.insert(node.key, ROOT);
        inner.nodes.insert(ROOT, Known { node: node.clone(), lookups: 1 });
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

    /// The node of a file, if the guest knows it; counts nothing.
    pub(super) fn find(&self, stat: &Stat, view: View) -> Option<Arc<Node>> {
        let inner = self.inner();
        let known = inner.nodes.get(inner.keys.get(&key(stat, view))?)?;
        known.node.is(stat).then(|| known.node.clone())
    }

    /// The node of a file, counted as looked up once more.
    pub(super) fn claim(&self, stat: &Stat, view: View) -> Option<Arc<Node>> {
        let key = key(stat, view);
        let mut inner = self.inner();
        let id = *inner.keys.get(&key)?;
        let known = inner.nodes.get_mut(&id)?;
        if !known.node.is(stat) {
            // Another file with that number: the last one is gone.
            inner.keys.remove(&key);
            return None;
        }
        known.lookups = known.lookups.saturating_add(1);
        Some(known.node.clone())
    }

    /// The same, and made if it is not known; whether it was made.
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
            // Another thread was faster.
            Entry::Occupied(_) => {
                drop(inner);
                let known = self.claim(stat, view).map(|node| (node, false));
                known.ok_or_else(|| io::Error::from_raw_os_error(libc::ESTALE))
            }
            Entry::Vacant(free) => {
                free.insert(id);
                let node = node(id, stat, view, place);
                inner.nodes.insert(id, Known { node: node.clone(), lookups: 1 });
                inner.last = id;
                Ok((node, true))
            }
        }
    }

    pub(super) fn forget(&self, id: u64, count: u64) {
        // Closes descriptors, without the lock.
        let gone = self.inner().forget(id, count);
        if let Some(node) = gone {
            release(&node);
        }
    }

    /// A node in each file system, a folder where there is one.
    pub(super) fn one_of_each(&self) -> Vec<Arc<Node>> {
        let mut found: HashMap<u64, Arc<Node>> = HashMap::new();
        for known in self.inner().nodes.values() {
            let node = &known.node;
            if !node.is_folder() && !node.is_regular() {
                continue;
            }
            match found.entry(node.dev()) {
                Entry::Occupied(mut taken) => {
                    if !taken.get().is_folder() {
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
    let (key, kind, born) = (key(stat, view), stat.kind(), stat.born);
    Arc::new(Node { id, key, kind, born, place: Mutex::new(place) })
}

/// The way upwards is let go: nodes whose parents have changed places on the host since would hold
/// each other for ever. A folder's descriptor stays as long as something in it is known.
fn release(node: &Node) {
    let mut place = node.place();
    let parent = place.parent.take();
    let fd = if node.is_folder() { None } else { place.fd.take() };
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

    fn stat(ino: u64, born: i64) -> Stat {
        let now = Time { seconds: born, nanos: 0 };
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
            accessed: now,
            modified: now,
            changed: now,
            born: Some(now),
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
        let (again, made) = table.claim_or_insert(&stat(5, 0), View::default(), place()).unwrap();
        assert!(!made && Arc::ptr_eq(&first, &again));
        table.forget(first.id, 1);
        assert!(table.get(first.id).is_ok());
        table.forget(first.id, 9);
        assert!(table.get(first.id).is_err() && table.find(&stat(5, 0), View::default()).is_none());
        // What is not known can be forgotten, and the root cannot.
        for (id, count) in [(first.id, 1), (0, 1), (u64::MAX, u64::MAX), (ROOT, u64::MAX)] {
            table.forget(id, count);
        }
        assert_eq!(table.len(), 1);
    }

    #[test]
    fn an_inode_number_that_is_used_again_is_another_file() {
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
    fn a_folder_behind_a_mount_is_a_node_of_its_own_and_a_file_is_not() {
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
        // It passes on what it is to what lies in it.
        assert_eq!(other.view_below(&behind), view);
        let (file, _) = table.claim_or_insert(&stat(6, 0), View::default(), place()).unwrap();
        let same = Stat { mount: 2, ..stat(6, 0) };
        assert!(Arc::ptr_eq(&table.find(&same, other.view_below(&same)).unwrap(), &file));
    }
}
