//! Names in directories: lookup, create, remove, rename, link.
//!
//! System calls of a request whose directory has a file descriptor, without those for the caller's
//! ids (four for a user other than root, [`super::credentials`]):
//!
//! | request | calls |
//! |---|---|
//! | lookup of a file, or of a known directory | statx |
//! | lookup of a new directory | statx, openat, statx |
//! | create | openat, statx |
//! | mkdir | mkdirat, statx, openat, statx |
//! | mknod, symlink | mknodat or symlinkat, statx |
//! | unlink, rmdir | openat, statx, unlinkat |
//! | rename | statx, openat (of the target, mostly ENOENT), renameat2 |
//! | link | openat, statx, linkat, statx, close |

use std::ffi::CStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use nix::fcntl::{AtFlags, RenameFlags, readlinkat, renameat2};
use nix::sys::stat::{Mode, SFlag, mkdirat, mknodat};
use nix::sys::statvfs::{FsFlags, fstatvfs};
use nix::unistd::{UnlinkatFlags, linkat, symlinkat, unlinkat};
use virtiofsd::filesystem::Entry;

use super::caching::{Caching, caching, follows};
use super::credentials::Caller;
use super::node::{Node, Place, ROOT, View};
use super::resolve::DEPTH_MAX;
use super::stat::Stat;
use super::{Passthrough, calls, own_path};

/// Checks that the name is one path component.
pub(super) fn component(name: &CStr) -> io::Result<&CStr> {
    let bytes = name.to_bytes();
    if matches!(bytes, b"" | b"." | b"..") || bytes.contains(&b'/') {
        return Err(io::Error::from_raw_os_error(libc::EINVAL));
    }
    Ok(name)
}

/// Cache timeout of a name in `parent`. Names of shares are not cached, as shares are added and
/// removed.
fn entry_timeout(parent: &Node) -> Duration {
    if parent.id == ROOT { Duration::ZERO } else { parent.place().caching.timeout() }
}

/// What may be cached of a file found as `name` in `parent`. A directory that has several nodes is
/// also changed through the others, of which the guest's kernel does not know.
fn caching_below(parent: &Node, name: &CStr, view: View) -> Caching {
    let caching = if parent.id == ROOT { caching(name).0 } else { parent.place().caching };
    if view == View::default() { caching } else { caching.min(Caching::Usual) }
}

impl Passthrough {
    pub(super) fn entry(&self, parent: &Node, node: &Node, stat: &Stat) -> Entry {
        let entry_timeout = entry_timeout(parent);
        let attr_timeout = self.record_sent(node, stat);
        let attr = self.numbers.attributes(stat);
        Entry { inode: node.id, generation: 0, attr, attr_timeout, entry_timeout }
    }

    /// LOOKUP: returns the entry, and counts the lookup.
    pub(super) fn look_up(&self, parent: &Arc<Node>, name: &CStr) -> io::Result<Entry> {
        let dir = self.descriptors.get(parent)?;
        match calls::stat_at(dir.as_fd(), component(name)?) {
            Ok(stat) => {
                let (node, stat) = self.find_or_add(parent, &dir, name, stat)?;
                Ok(self.entry(parent, &node, &stat))
            }
            // A negative entry, which the guest may cache. FUSE_READDIRPLUS continues with the next
            // name after it, but not after an error.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(Entry {
                inode: 0,
                generation: 0,
                attr: Default::default(),
                attr_timeout: Duration::ZERO,
                entry_timeout: entry_timeout(parent),
            }),
            Err(error) => Err(error),
        }
    }

    /// The node of the file found as `name`; counts a lookup.
    pub(super) fn find_or_add(
        &self,
        parent: &Arc<Node>,
        dir: &OwnedFd,
        name: &CStr,
        stat: Stat,
    ) -> io::Result<(Arc<Node>, Stat)> {
        let view = match parent.id {
            ROOT => View { follows: follows(name), submount: 0 },
            _ => parent.view_below(&stat),
        };
        let caching = caching_below(parent, name, view);
        if let Some(node) = self.table.claim(&stat, view) {
            self.relocate(&node, (parent, dir, name), &stat, caching)?;
            return Ok((node, stat));
        }
        let mut stat = stat;
        let mut place = Place::new(Some(parent.clone()), name, stat.mount);
        place.caching = caching;
        if stat.kind() == libc::S_IFDIR || stat.btime.is_none() {
            let epoch = self.descriptors.epoch();
            let fd = calls::open_at(dir.as_fd(), name, libc::O_PATH, 0)?;
            stat = calls::stat_of(fd.as_fd())?;
            place.mount = stat.mount;
            place.fd = Some(Arc::new(fd));
            place.epoch = epoch;
        }
        let (node, made) = self.table.claim_or_insert(&stat, view, place)?;
        if !made {
            self.relocate(&node, (parent, dir, name), &stat, caching)?;
        } else if node.is_dir() {
            self.descriptors.opened(&node);
        }
        Ok((node, stat))
    }

    /// A known file was found, perhaps by another name or through another mount than before.
    fn relocate(
        &self,
        node: &Arc<Node>,
        (parent, dir, name): (&Arc<Node>, &OwnedFd, &CStr),
        stat: &Stat,
        caching: Caching,
    ) -> io::Result<()> {
        let (other_mount, same) = {
            let place = node.place();
            let same = matches!(&place.parent, Some(known) if Arc::ptr_eq(known, parent));
            (place.mount != stat.mount, same)
        };
        if !same && node.is_dir() && is_above(node, parent) {
            // A directory inside itself, through a bind mount of the host. The guest's kernel does
            // not support that.
            self.table.forget(node.id, 1);
            return Err(io::Error::from_raw_os_error(libc::ELOOP));
        }
        let better = if other_mount { self.replacement_fd(node, dir, name) } else { None };
        let mut place = node.place();
        place.caching = place.caching.min(caching);
        if other_mount && better.is_none() {
            return Ok(());
        }
        if !same || *place.name != *name {
            place.parent = Some(parent.clone());
            place.name = name.into();
        }
        place.mount = stat.mount;
        let was_unlinked = std::mem::take(&mut place.unlinked);
        let keeps = node.is_dir() || node.keeps_fd();
        let closed = match better {
            Some(fd) if keeps => {
                // Files below were also found through the other mount.
                place.epoch = self.descriptors.next_epoch();
                place.fd.replace(Arc::new(fd))
            }
            None if keeps || !was_unlinked => None,
            _ => place.fd.take(),
        };
        drop(place);
        drop(closed);
        Ok(())
    }

    /// A file descriptor of a node through the mount by which its name was found now; none if it is
    /// not to be replaced: a read-only mount does not replace a writable one.
    fn replacement_fd(&self, node: &Arc<Node>, dir: &OwnedFd, name: &CStr) -> Option<OwnedFd> {
        let fd = calls::open_at(dir.as_fd(), name, libc::O_PATH, 0).ok()?;
        let stat = calls::stat_of(fd.as_fd()).ok()?;
        let better = !is_read_only(&fd) || self.descriptors.is_read_only(node);
        (better && node.is(&stat)).then_some(fd)
    }

    /// Keeps a file descriptor of a file whose name is about to be removed: the guest may use it
    /// without having opened it (O_PATH, a mount, a working directory).
    fn keep_fd(&self, parent: &Arc<Node>, dir: &OwnedFd, name: &CStr) -> Option<Arc<Node>> {
        let fd = calls::open_at(dir.as_fd(), name, libc::O_PATH, 0).ok()?;
        let stat = calls::stat_of(fd.as_fd()).ok()?;
        let node = self.table.find(&stat, parent.view_below(&stat))?;
        let mut place = node.place();
        let here = matches!(&place.parent, Some(known) if Arc::ptr_eq(known, parent));
        if !here || *place.name != *name {
            // The node has another name of the file (hard link).
            return None;
        }
        if place.fd.is_none() {
            place.fd = Some(Arc::new(fd));
            place.epoch = self.descriptors.epoch();
        }
        drop(place);
        Some(node)
    }

    pub(super) fn remove(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        flag: UnlinkatFlags,
    ) -> io::Result<()> {
        let dir = self.descriptors.get(parent)?;
        let held = self.keep_fd(parent, &dir, component(name)?);
        let removed = unlinkat(&*dir, name, flag);
        if let Some(node) = held {
            finish_unlink(&node, removed.is_ok());
        }
        Ok(removed?)
    }

    pub(super) fn move_name(
        &self,
        from: (&Arc<Node>, &CStr),
        to: (&Arc<Node>, &CStr),
        flags: u32,
    ) -> io::Result<()> {
        let flags = RenameFlags::from_bits_truncate(flags);
        let (old, new) = (self.descriptors.get(from.0)?, self.descriptors.get(to.0)?);
        let (old_name, new_name) = (component(from.1)?, component(to.1)?);
        let known = |parent: &Node, dir: &OwnedFd, name| {
            let stat = calls::stat_at(dir.as_fd(), name).ok()?;
            self.table.find(&stat, parent.view_below(&stat))
        };
        let moved = known(from.0, &old, old_name);
        let exchange = flags.contains(RenameFlags::RENAME_EXCHANGE);
        let other =
            if exchange { known(to.0, &new, new_name) } else { self.keep_fd(to.0, &new, new_name) };
        let done = renameat2(&*old, old_name, &*new, new_name, flags);
        if let Some(other) = other {
            match exchange {
                true if done.is_ok() => set_name(&other, from),
                true => {}
                false => finish_unlink(&other, done.is_ok()),
            }
        }
        if let (Some(moved), Ok(())) = (moved, done) {
            set_name(&moved, to);
        }
        Ok(done?)
    }

    pub(super) fn make_dir(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        mode: u32,
        caller: &Caller<'_>,
    ) -> io::Result<Entry> {
        let dir = self.descriptors.get(parent)?;
        let made = {
            let _credentials = caller.assume()?;
            mkdirat(&*dir, component(name)?, Mode::from_bits_truncate(mode))
        };
        made?;
        self.look_up(parent, name)
    }

    pub(super) fn make_special(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        mode: u32,
        device: u32,
        caller: &Caller<'_>,
    ) -> io::Result<Entry> {
        let dir = self.descriptors.get(parent)?;
        let kind = SFlag::from_bits_truncate(mode & libc::S_IFMT);
        let made = {
            let _credentials = caller.assume()?;
            let mode = Mode::from_bits_truncate(mode);
            mknodat(&*dir, component(name)?, kind, mode, u64::from(device))
        };
        made?;
        self.look_up(parent, name)
    }

    pub(super) fn make_link(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        target: &CStr,
        caller: &Caller<'_>,
    ) -> io::Result<Entry> {
        let dir = self.descriptors.get(parent)?;
        let made = {
            let _credentials = caller.assume()?;
            symlinkat(target, &*dir, component(name)?)
        };
        made?;
        self.look_up(parent, name)
    }

    pub(super) fn add_name(
        &self,
        node: &Arc<Node>,
        parent: &Arc<Node>,
        name: &CStr,
    ) -> io::Result<Entry> {
        let (file, dir) = (self.descriptors.get(node)?, self.descriptors.get(parent)?);
        let follow = AtFlags::AT_SYMLINK_FOLLOW;
        linkat(&self.own, &*own_path(&file), &*dir, component(name)?, follow)?;
        self.look_up(parent, name)
    }

    pub(super) fn read_link(&self, node: &Arc<Node>) -> io::Result<Vec<u8>> {
        let link = self.descriptors.get(node)?;
        Ok(std::os::unix::ffi::OsStringExt::into_vec(readlinkat(&*link, c"")?))
    }
}

/// Whether `node` is `below` or one of its ancestors.
fn is_above(node: &Arc<Node>, below: &Arc<Node>) -> bool {
    let mut at = Some(below.clone());
    for _ in 0..DEPTH_MAX {
        let Some(folder) = at else { return false };
        if Arc::ptr_eq(&folder, node) {
            return true;
        }
        at = folder.place().parent.clone();
    }
    true
}

fn is_read_only(dir: &OwnedFd) -> bool {
    fstatvfs(dir.as_fd()).is_ok_and(|found| found.flags().contains(FsFlags::ST_RDONLY))
}

/// The name of a node was removed (`gone`), or its removal has failed.
fn finish_unlink(node: &Node, gone: bool) {
    let mut place = node.place();
    let closed = if gone {
        place.unlinked = true;
        None
    } else if node.is_dir() || node.keeps_fd() {
        None
    } else {
        place.fd.take()
    };
    drop(place);
    drop(closed);
}

fn set_name(node: &Node, (parent, name): (&Arc<Node>, &CStr)) {
    let mut place = node.place();
    let former = place.parent.replace(parent.clone());
    place.name = name.into();
    drop(place);
    drop(former);
}
