//! Open files and their data.
//!
//! Data is copied directly between the host's page cache and guest memory (preadv2(2),
//! pwritev2(2)). System calls: open 2 (openat, statx), read 1 and one more at the end of the file,
//! write 1, release 1.

use std::ffi::CStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FallocateFlags, fallocate};
use nix::unistd::{Whence, fdatasync, fsync, ftruncate, lseek64};
use virtiofsd::filesystem::{Entry, OpenOptions, ZeroCopyReader, ZeroCopyWriter};
use virtiofsd::oslib::WritevFlags;

use super::caching::Caching;
use super::credentials::{Caller, keep_set_id};
use super::names::component;
use super::node::Node;
use super::resolve::{Resolved, stale};
use super::stat::{Stat, Time};
use super::{Passthrough, calls, own_path};

/// Flags of open(2) that the guest may set. O_APPEND is not among them: the guest can clear it
/// later, so each write request says whether it appends.
const FLAGS: i32 = libc::O_ACCMODE
    | libc::O_TRUNC
    | libc::O_DIRECT
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_NOATIME
    | libc::O_NONBLOCK;

type Opened = (u64, OpenOptions);

impl Passthrough {
    pub(super) fn open_file(
        &self,
        node: Arc<Node>,
        flags: u32,
        kill_set_id: bool,
    ) -> io::Result<Opened> {
        if !node.is_regular() {
            // The guest's kernel handles pipes, sockets and devices itself.
            let folder = node.is_dir();
            let error = if folder { libc::EISDIR } else { libc::ENXIO };
            return Err(io::Error::from_raw_os_error(error));
        }
        let (file, stat) = self.open_node(&node, flags as i32 & FLAGS, kill_set_id)?;
        let options = self.open_options(&node, &file, &stat);
        Ok((self.handles.add(node, file), options))
    }

    /// KEEP_CACHE if the guest's cached pages are of this version of the file; NOFLUSH if close(2)
    /// cannot report an error.
    fn open_options(&self, node: &Node, file: &File, stat: &Stat) -> OpenOptions {
        let mut options = OpenOptions::empty();
        let mut place = node.place();
        let kept = place.sent.keep(stat.version(), Time::now());
        options.set(OpenOptions::KEEP_CACHE, kept && place.caching != Caching::Strict);
        drop(place);
        options.set(OpenOptions::NOFLUSH, self.systems.close_needs_no_flush(node.dev(), file));
        options
    }

    fn open_node(
        &self,
        node: &Arc<Node>,
        flags: i32,
        kill_set_id: bool,
    ) -> io::Result<(File, Stat)> {
        if flags & libc::O_TRUNC != 0 {
            keep_set_id(!kill_set_id)?;
        }
        match self.descriptors.resolve(node) {
            Resolved::ByName(parent, name) => {
                match self.open_by_name(node, &parent, &name, flags) {
                    // The name refers to another file now; the node may still have a file
                    // descriptor.
                    Err(error) if error.raw_os_error() == Some(libc::ESTALE) => {}
                    result => return result,
                }
            }
            Resolved::Fd(_) | Resolved::Unreachable => {}
        }
        let file = self.reopen(&*self.descriptors.get(node)?, flags)?;
        let stat = calls::stat_of(file.as_fd())?;
        Ok((file, stat))
    }

    fn open_by_name(
        &self,
        node: &Node,
        parent: &Arc<Node>,
        name: &CStr,
        flags: i32,
    ) -> io::Result<(File, Stat)> {
        let dir = self.descriptors.get(parent)?;
        // The name may refer to another file now: O_NONBLOCK so as not to block on a pipe, no
        // O_TRUNC so as not to truncate that file.
        let first = flags & !libc::O_TRUNC | libc::O_NONBLOCK;
        let file = match calls::open_at(dir.as_fd(), name, first, 0) {
            Ok(file) => File::from(file),
            Err(error) => match error.raw_os_error() {
                Some(libc::ENOENT | libc::ENOTDIR | libc::ELOOP | libc::ENXIO) => {
                    return Err(stale());
                }
                _ => return Err(error),
            },
        };
        let stat = calls::stat_of(file.as_fd())?;
        if !node.is(&stat) {
            return Err(stale());
        }
        if flags & libc::O_TRUNC == 0 {
            return Ok((file, stat));
        }
        ftruncate(&file, 0)?;
        let stat = calls::stat_of(file.as_fd())?;
        Ok((file, stat))
    }

    /// Reopens the file of a file descriptor with other flags.
    pub(super) fn reopen(&self, fd: &OwnedFd, flags: i32) -> io::Result<File> {
        let flags = nix::fcntl::OFlag::from_bits_retain(flags | libc::O_CLOEXEC);
        let mode = nix::sys::stat::Mode::empty();
        // A magic link of /proc, which leads to the file itself.
        Ok(nix::fcntl::openat(&self.own, &*own_path(fd), flags, mode)?.into())
    }

    /// Creates and opens a file; an existing one is only opened.
    pub(super) fn create_file(
        &self,
        parent: &Arc<Node>,
        name: &CStr,
        (flags, mode): (u32, u32),
        kill_set_id: bool,
        caller: &Caller<'_>,
    ) -> io::Result<(Entry, Opened)> {
        let dir = self.descriptors.get(parent)?;
        // O_EXCL, so that an existing file is not opened with the caller's credentials.
        let create = flags as i32 & FLAGS | libc::O_CREAT | libc::O_EXCL;
        let made = {
            let _credentials = caller.assume()?;
            calls::open_at(dir.as_fd(), component(name)?, create, mode & 0o7777)
        };
        let file = match made {
            Ok(file) => File::from(file),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => {
                if flags as i32 & libc::O_EXCL != 0 {
                    return Err(error);
                }
                let entry = self.look_up(parent, name)?;
                if entry.inode == 0 {
                    return Err(stale());
                }
                let opened = self
                    .table
                    .get(entry.inode)
                    .and_then(|node| self.open_file(node, flags, kill_set_id));
                if opened.is_err() {
                    self.table.forget(entry.inode, 1);
                }
                return Ok((entry, opened?));
            }
            Err(error) => return Err(error),
        };
        let stat = calls::stat_of(file.as_fd())?;
        let (node, stat) = self.find_or_add(parent, &dir, name, stat)?;
        let entry = self.entry(parent, &node, &stat);
        let options = self.open_options(&node, &file, &stat);
        Ok((entry, (self.handles.add(node, file), options)))
    }

    pub(super) fn open_dir(&self, node: Arc<Node>) -> io::Result<Opened> {
        if !node.is_dir() {
            return Err(io::Error::from_raw_os_error(libc::ENOTDIR));
        }
        let dir = self.descriptors.get(&node)?;
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let file = calls::open_at(dir.as_fd(), c".", flags, 0)?;
        Ok((self.handles.add(node, file.into()), OpenOptions::empty()))
    }

    pub(super) fn read_data<W: ZeroCopyWriter>(
        &self,
        (node, handle): (u64, u64),
        mut to: W,
        size: u32,
        offset: u64,
    ) -> io::Result<usize> {
        let handle = self.handles.get(node, handle)?;
        range(offset, u64::from(size))?;
        to.read_from_file_at(&handle.file, size as usize, offset, None)
    }

    pub(super) fn write_data<R: ZeroCopyReader>(
        &self,
        (node, handle): (u64, u64),
        mut from: R,
        size: u32,
        offset: u64,
        append: bool,
        kill_set_id: bool,
    ) -> io::Result<usize> {
        let handle = self.handles.get(node, handle)?;
        range(offset, u64::from(size))?;
        keep_set_id(!kill_set_id)?;
        let flags = append.then_some(WritevFlags::RWF_APPEND);
        from.write_to_file_at(&handle.file, size as usize, offset, flags)
    }

    pub(super) fn sync_file(&self, node: u64, handle: u64, data: bool) -> io::Result<()> {
        let handle = self.handles.get(node, handle)?;
        let file = &handle.file;
        let done = if data { fdatasync(file) } else { fsync(file) };
        Ok(done?)
    }

    /// Errors that close(2) may report on the host: write errors of network file systems.
    pub(super) fn flush_file(&self, node: u64, handle: u64) -> io::Result<()> {
        let handle = self.handles.get(node, handle)?;
        let copy = handle.file.try_clone()?;
        Ok(nix::unistd::close(copy)?)
    }

    pub(super) fn allocate(
        &self,
        (node, handle): (u64, u64),
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        let handle = self.handles.get(node, handle)?;
        let (offset, length) = range(offset, length)?;
        keep_set_id(true)?;
        let mode = FallocateFlags::from_bits_retain(mode as i32);
        Ok(fallocate(&handle.file, mode, offset, length)?)
    }

    /// SEEK_DATA and SEEK_HOLE; the guest's kernel handles the others itself.
    pub(super) fn seek(&self, node: u64, handle: u64, offset: u64, whence: u32) -> io::Result<u64> {
        let handle = self.handles.get(node, handle)?;
        let whence = match whence as i32 {
            libc::SEEK_DATA => Whence::SeekData,
            libc::SEEK_HOLE => Whence::SeekHole,
            _ => return Err(Errno::EINVAL.into()),
        };
        let (offset, _) = range(offset, 0)?;
        Ok(lseek64(&handle.file, offset, whence)? as u64)
    }

    pub(super) fn copy_data(
        &self,
        from: (u64, u64, u64),
        to: (u64, u64, u64),
        length: u64,
    ) -> io::Result<usize> {
        let (source, target) = (self.handles.get(from.0, from.1)?, self.handles.get(to.0, to.1)?);
        let ((read, _), (write, _)) = (range(from.2, 0)?, range(to.2, 0)?);
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        keep_set_id(true)?;
        calls::copy_range((source.file.as_fd(), read), (target.file.as_fd(), write), length)
    }

    /// syncfs(2) on all file systems of the host of which the guest knows a file.
    pub(super) fn sync_all(&self) -> io::Result<()> {
        let mut result = Ok(());
        for node in self.table.one_per_file_system() {
            let flags = libc::O_RDONLY | libc::O_NONBLOCK;
            let opened = self.descriptors.get(&node).and_then(|fd| self.reopen(&fd, flags));
            // A file that was removed needs no sync.
            let Ok(file) = opened else { continue };
            let done = nix::unistd::syncfs(&file).map_err(io::Error::from);
            result = result.and(done);
        }
        result
    }
}

/// Offset and length as signed numbers; EINVAL if their sum overflows.
fn range(offset: u64, length: u64) -> io::Result<(i64, i64)> {
    let invalid = || io::Error::from_raw_os_error(libc::EINVAL);
    let end = offset.checked_add(length).ok_or_else(invalid)?;
    i64::try_from(end).map_err(|_| invalid())?;
    Ok((offset as i64, length as i64))
}
