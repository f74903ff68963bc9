//! File descriptors of nodes.
//!
//! Most nodes have none: a file is opened by its directory and name, and the attributes found are
//! compared with the node. If the name refers to another file now, the error is ESTALE, upon which
//! the guest's kernel looks the path up again. So hundreds of thousands of known files need no file
//! descriptors, and the host's kernel can reclaim their inodes. A file descriptor (O_PATH) is kept
//! for
//! - directories in use; the least recently used ones are closed when there are too many;
//! - files that the guest has removed or replaced, as it may still use them without a name;
//! - files on file systems without birth times ([`super::node`]).
//!
//! A file descriptor belongs to the mount through which it was opened, on which write protection
//! and the mounts below depend. When a directory is found through another mount than before (a
//! share was removed and added again, the host has mounted something), a new epoch begins: file
//! descriptors of earlier epochs are reopened by name when they are next needed, if possible.

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

/// Most directories with a file descriptor.
const OPEN_DIRECTORIES: usize = 16 << 10;
/// Most ancestors that are opened to reach a directory. Attack: renames on the host while a guest
/// looks files up, so that the recorded parents form a cycle.
pub(super) const DEPTH_MAX: usize = 4096;

pub(super) fn stale() -> io::Error {
    io::Error::from_raw_os_error(libc::ESTALE)
}

#[derive(Debug)]
pub(super) struct Descriptors {
    epoch: AtomicU64,
    /// Directories with a file descriptor, the oldest first.
    directories: Mutex<VecDeque<Weak<Node>>>,
    /// Most directories with a file descriptor.
    limit: usize,
}

impl Default for Descriptors {
    fn default() -> Self {
        Self::new(OPEN_DIRECTORIES)
    }
}

/// How a node is reached.
pub(super) enum Resolved {
    Fd(Arc<OwnedFd>),
    /// By its directory and name.
    ByName(Arc<Node>, Box<CStr>),
    Unreachable,
}

impl Descriptors {
    pub(super) fn new(limit: usize) -> Self {
        Self { epoch: AtomicU64::new(1), directories: Mutex::default(), limit }
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Relaxed)
    }

    /// Begins a new epoch and returns its number.
    pub(super) fn next_epoch(&self) -> u64 {
        self.epoch.fetch_add(1, Ordering::Relaxed) + 1
    }

    pub(super) fn resolve(&self, node: &Node) -> Resolved {
        let mut place = node.place();
        place.used = true;
        let current = place.epoch == self.epoch() || place.unlinked || place.parent.is_none();
        match (&place.fd, &place.parent) {
            (Some(fd), _) if current => Resolved::Fd(fd.clone()),
            (_, Some(parent)) if !place.unlinked => {
                Resolved::ByName(parent.clone(), place.name.clone())
            }
            _ => Resolved::Unreachable,
        }
    }

    /// A file descriptor of the node: its own, or a new one.
    pub(super) fn get(&self, node: &Arc<Node>) -> io::Result<Arc<OwnedFd>> {
        // Collects ancestors up to one with a file descriptor, then opens them downwards.
        let mut below: Vec<(Arc<Node>, Box<CStr>)> = Vec::new();
        let mut at = node.clone();
        let mut fd = loop {
            match self.resolve(&at) {
                Resolved::Fd(fd) => break fd,
                Resolved::ByName(parent, name) if below.len() < DEPTH_MAX => {
                    below.push((at, name));
                    at = parent;
                }
                // The recorded parents form a cycle: an old file descriptor is used if there is
                // one.
                _ => return node.place().fd.clone().ok_or_else(stale),
            }
        };
        for (node, name) in below.into_iter().rev() {
            fd = self.open(&node, &fd, &name)?;
        }
        Ok(fd)
    }

    /// Opens the node by its name. If the name refers to another file, the old file descriptor is
    /// kept.
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
        if node.is_dir() || kept {
            place.fd = Some(fd.clone());
            place.epoch = epoch;
            place.mount = mount;
        }
        drop(place);
        if node.is_dir() && !kept {
            self.opened(node);
        }
        Ok(fd)
    }

    /// Registers a directory with a file descriptor, and closes those of others over the limit.
    pub(super) fn opened(&self, node: &Arc<Node>) {
        let mut closed = Vec::new();
        let mut directories = self.directories.lock().unwrap_or_else(PoisonError::into_inner);
        directories.push_back(Arc::downgrade(node));
        // Directories used since the last check get a second chance, so each may be checked twice.
        let mut attempts = 2 * directories.len();
        while directories.len() > self.limit && attempts > 0 {
            attempts -= 1;
            let Some(oldest) = directories.pop_front() else { break };
            let Some(node) = oldest.upgrade() else { continue };
            let mut place = node.place();
            if place.unlinked || node.keeps_fd() || place.parent.is_none() {
                // Stays open while the guest knows it.
                continue;
            }
            if std::mem::take(&mut place.used) {
                drop(place);
                directories.push_back(oldest);
                continue;
            }
            closed.extend(place.fd.take());
        }
        drop(directories);
        drop(closed);
    }

    /// The current attributes of the file, with as few system calls as possible.
    pub(super) fn stat(&self, node: &Arc<Node>) -> io::Result<Stat> {
        if node.is_dir() {
            return calls::stat_of(self.get(node)?.as_fd());
        }
        match self.resolve(node) {
            Resolved::Fd(fd) => calls::stat_of(fd.as_fd()),
            Resolved::ByName(parent, name) => {
                let found = calls::stat_at(self.get(&parent)?.as_fd(), &name);
                match found {
                    Ok(stat) if node.is(&stat) => Ok(stat),
                    _ => calls::stat_of(self.get(node)?.as_fd()),
                }
            }
            Resolved::Unreachable => Err(stale()),
        }
    }

    /// Whether the mount through which the node was last found is read-only.
    pub(super) fn is_read_only(&self, node: &Arc<Node>) -> bool {
        let flags = self.get(node).and_then(|fd| Ok(fstatvfs(fd.as_fd())?.flags()));
        flags.is_ok_and(|flags| flags.contains(FsFlags::ST_RDONLY))
    }
}
