//! Descriptors of nodes.
//!
//! Most nodes have none: a file is reached through its folder and its name, and what is found there
//! is compared with what the node stands for, so a name that leads to another file by now gives
//! ESTALE, upon which the guest's kernel looks the path up anew. So hundreds of thousands of known
//! files cost no descriptors, and the host's kernel may forget their inodes. A descriptor (O_PATH) is
//! kept by
//! - folders in use, of which the least recently used are closed when they are too many;
//! - what a guest has just removed or replaced, as it may go on using it without a name;
//! - files on file systems without birth times ([`super::node`]).
//!
//! A descriptor belongs to the mount through which it was opened, so write protection and what is
//! mounted below depend on it. When a folder is seen through another mount than before (a share was
//! taken away and came back, the host has mounted something anew), a new epoch begins: descriptors of
//! earlier epochs are replaced by way of their names when they are next needed, where that is
//! possible.

use std::collections::VecDeque;
use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::calls;
use super::node::Node;
use super::stat::Stat;

/// Folders that keep a descriptor.
const OPEN_FOLDERS: usize = 16 << 10;
/// Folders above each other that are opened to reach one. Attack: a host whose folders change places
/// while a guest looks, so that the ways recorded here go round.
pub(super) const DEPTH_MAX: usize = 4096;

pub(super) fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

#[derive(Debug)]
pub(super) struct Descriptors {
    epoch: AtomicU64,
    /// Folders with a descriptor, the one that has it longest first.
    folders: Mutex<VecDeque<Weak<Node>>>,
    /// Most of them.
    limit: usize,
}

impl Default for Descriptors {
    fn default() -> Self {
        Self::new(OPEN_FOLDERS)
    }
}

/// How a node is reached.
pub(super) enum Way {
    Open(Arc<OwnedFd>),
    /// By its folder and its name there.
    Through(Arc<Node>, Box<CStr>),
    None,
}

impl Descriptors {
    pub(super) fn new(limit: usize) -> Self {
        Self { epoch: AtomicU64::new(1), folders: Mutex::default(), limit }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Begins another epoch; its number.
    pub(super) fn next_epoch(&self) -> u64 {
        self.epoch.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn way(&self, node: &Node) -> Way {
        let mut place = node.place();
        place.used = true;
        let current = place.epoch == self.epoch() || place.nameless || place.parent.is_none();
        match (&place.fd, &place.parent) {
            (Some(fd), _) if current => Way::Open(fd.clone()),
            (_, Some(parent)) if !place.nameless => {
                Way::Through(parent.clone(), place.name.clone())
            }
            _ => Way::None,
        }
    }

    /// A descriptor of the node: its own, or one just opened.
    pub(super) fn get(&self, node: &Arc<Node>) -> io::Result<Arc<OwnedFd>> {
        // Upwards until there is a descriptor, then down again.
        let mut below: Vec<(Arc<Node>, Box<CStr>)> = Vec::new();
        let mut at = node.clone();
        let mut fd = loop {
            match self.way(&at) {
                Way::Open(fd) => break fd,
                Way::Through(parent, name) if below.len() < DEPTH_MAX => {
                    below.push((at, name));
                    at = parent;
                }
                // A host whose folders go round: what the node has is better than nothing.
                _ => return node.place().fd.clone().ok_or_else(stale),
            }
        };
        for (node, name) in below.into_iter().rev() {
            fd = self.open(&node, &fd, &name)?;
        }
        Ok(fd)
    }

    /// Opens the node by its name; the former descriptor goes on where the name leads elsewhere.
    fn open(&self, node: &Arc<Node>, dir: &OwnedFd, name: &CStr) -> io::Result<Arc<OwnedFd>> {
        let epoch = self.epoch();
        let opened = calls::open_at(dir.as_fd(), name, libc::O_PATH, 0).and_then(|fd| {
            let stat = calls::stat_of(fd.as_fd())?;
            if node.is(&stat) { Ok((fd, stat.mount)) } else { Err(stale()) }
        });
        let mut place = node.place();
        let (fd, mount) = match (opened, &place.fd) {
            (Ok((fd, mount)), _) => (Arc::new(fd), mount),
            (Err(_), Some(old)) => {
                let old = old.clone();
                place.epoch = epoch;
                return Ok(old);
            }
            (Err(error), None) => {
                let gone = matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENOTDIR));
                return Err(if gone { stale() } else { error });
            }
        };
        let kept = place.fd.is_some();
        if node.is_folder() || kept {
            place.fd = Some(fd.clone());
            place.epoch = epoch;
            place.mount = mount;
        }
        drop(place);
        if node.is_folder() && !kept {
            self.opened(node);
        }
        Ok(fd)
    }

    /// Counts a folder that has a descriptor now, and closes those of others.
    pub(super) fn opened(&self, node: &Arc<Node>) {
        let mut closed = Vec::new();
        let mut folders = self.folders.lock().unwrap_or_else(PoisonError::into_inner);
        folders.push_back(Arc::downgrade(node));
        // Each one used meanwhile gets a second chance, so the oldest may have to be asked for twice.
        let mut attempts = 2 * folders.len();
        while folders.len() > self.limit && attempts > 0 {
            attempts -= 1;
            let Some(oldest) = folders.pop_front() else { break };
            let Some(node) = oldest.upgrade() else { continue };
            let mut place = node.place();
            if place.nameless || node.is_held() || place.parent.is_none() {
                // Stays open as long as the guest knows it.
                continue;
            }
            if std::mem::take(&mut place.used) {
                drop(place);
                folders.push_back(oldest);
                continue;
            }
            closed.extend(place.fd.take());
        }
        drop(folders);
        drop(closed);
    }

    /// The attributes of the file as it is now, at the least cost.
    pub(super) fn stat(&self, node: &Arc<Node>) -> io::Result<Stat> {
        if node.is_folder() {
            return calls::stat_of(self.get(node)?.as_fd());
        }
        match self.way(node) {
            Way::Open(fd) => calls::stat_of(fd.as_fd()),
            Way::Through(parent, name) => {
                let found = calls::stat_at(self.get(&parent)?.as_fd(), &name);
                match found {
                    Ok(stat) if node.is(&stat) => Ok(stat),
                    _ => calls::stat_of(self.get(node)?.as_fd()),
                }
            }
            Way::None => Err(stale()),
        }
    }

    /// Whether nothing can be written through the mount by which the node was seen last.
    pub(super) fn is_read_only(&self, node: &Arc<Node>) -> bool {
        let flags = self.get(node).and_then(|fd| Ok(fstatvfs(fd.as_fd())?.flags()));
        flags.is_ok_and(|flags| flags.contains(FsFlags::ST_RDONLY))
    }
}
