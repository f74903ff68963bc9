//! The passthrough file system: files of the host with one node per file.
//!
//! - [`node`]: nodes (inodes of the guest); [`resolve`]: their file descriptors; [`handles`]: open
//!   files;
//! - [`names`], [`data`], [`change`], [`directory`]: requests by topic;
//! - [`stat`]: attributes, and inode numbers that are unique in the guest;
//! - [`credentials`]: ids and capabilities per request; [`calls`]: raw system calls.
//!
//! The `virtiofsd` crate parses requests and writes answers ([`virtiofsd::server`]). Its own
//! passthrough file system identifies a file by its mount, too, so that one file reached through
//! two mounts is two inodes, and reports mounts below a share as submounts. Here the guest has one
//! file system for all shares of its pod: containers share page cache, locks, sockets, pipes and
//! inotify events.
//!
//! Names are single path components and symbolic links are never followed; the guest's kernel
//! resolves both.

mod caching;
mod calls;
mod change;
mod credentials;
mod data;
mod directory;
mod handles;
mod names;
mod node;
mod resolve;
mod stat;
mod systems;

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use nix::unistd::{UnlinkatFlags, fchdir};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;
use virtiofsd::soft_idmap::Id;

use self::caching::CACHE_TIMEOUT;
use self::credentials::Caller;
use self::directory::Entries;
use self::handles::Handles;
use self::node::{Node, Place, Table};
use self::resolve::Descriptors;
use self::stat::{InodeNumbers, Stat, Time};
use self::systems::FileSystems;

pub(crate) struct Passthrough {
    /// Directory of the shares.
    root: CString,
    /// Mount of /proc/self/fd, which is also the working directory: used to reopen files that are
    /// known by a file descriptor only.
    own: OwnedFd,
    table: Table,
    descriptors: Descriptors,
    handles: Handles,
    numbers: Arc<InodeNumbers>,
    systems: FileSystems,
    /// The guest sends supplementary groups with creating requests (from Linux 6.3 on).
    sends_groups: AtomicBool,
}

/// Path of a file descriptor in [`Passthrough::own`].
fn own_path(fd: &OwnedFd) -> CString {
    // Digits have no NUL.
    CString::new(fd.as_raw_fd().to_string()).unwrap_or_default()
}

impl Passthrough {
    /// Serves the mounts in the directory `root`. `own` is a mount of /proc/self/fd; it becomes the
    /// working directory.
    pub(crate) fn new(root: CString, own: OwnedFd) -> io::Result<Self> {
        fchdir(&own)?;
        Ok(Self {
            root,
            own,
            table: Table::default(),
            descriptors: Descriptors::default(),
            handles: Handles::default(),
            numbers: Arc::default(),
            systems: FileSystems::default(),
            sends_groups: AtomicBool::new(false),
        })
    }

    fn open_root(&self) -> io::Result<()> {
        let root = nix::fcntl::open(
            self.root.as_c_str(),
            nix::fcntl::OFlag::O_PATH | nix::fcntl::OFlag::O_CLOEXEC,
            nix::sys::stat::Mode::empty(),
        )?;
        let stat = calls::stat_of(root.as_fd())?;
        self.numbers.reset(stat.dev);
        let mut place = Place::new(None, c"", stat.mount);
        place.fd = Some(Arc::new(root));
        self.table.reset(&stat, place);
        Ok(())
    }

    /// Records that these attributes are sent to the guest; returns their cache timeout.
    fn record_sent(&self, node: &Node, stat: &Stat) -> Duration {
        let mut place = node.place();
        place.sent.record(stat.version(), Time::now());
        let timeout = place.caching.timeout();
        if stat.mode & (libc::S_ISUID | libc::S_ISGID) == 0 {
            return timeout;
        }
        // The guest's kernel does not notice that a write of its own has cleared these bits.
        timeout.min(CACHE_TIMEOUT)
    }

    fn caller<'a>(&self, context: &Context, groups: &'a [u32]) -> Caller<'a> {
        Caller {
            uid: context.uid.into_inner(),
            gid: context.gid.into_inner(),
            groups,
            groups_unknown: !self.sends_groups.load(Ordering::Relaxed),
        }
    }
}

fn groups(more: &Extensions) -> Vec<u32> {
    more.sup_gids.iter().map(|gid| gid.into_inner()).collect()
}

impl FileSystem for Passthrough {
    type Inode = u64;
    type Handle = u64;
    type DirIter = Entries;

    fn init(&self, capable: FsOptions) -> io::Result<FsOptions> {
        self.destroy();
        self.open_root()?;
        self.sends_groups.store(capable.contains(FsOptions::CREATE_SUPP_GROUP), Ordering::Relaxed);
        // The crate adds further options.
        Ok(FsOptions::DO_READDIRPLUS
            | FsOptions::READDIRPLUS_AUTO
            | FsOptions::HANDLE_KILLPRIV_V2
            | FsOptions::CACHE_SYMLINKS)
    }

    fn destroy(&self) {
        self.handles.clear();
        self.table.clear();
    }

    fn lookup(&self, _: Context, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.look_up(&self.table.get(parent)?, name)
    }

    fn forget(&self, _: Context, inode: u64, count: u64) {
        self.table.forget(inode, count);
    }

    fn batch_forget(&self, _: Context, requests: Vec<(u64, u64)>) {
        for (inode, count) in requests {
            self.table.forget(inode, count);
        }
    }

    fn getattr(
        &self,
        _: Context,
        inode: u64,
        handle: Option<u64>,
    ) -> io::Result<(fuse::Attr, Duration)> {
        let node = self.table.get(inode)?;
        let stat = match handle {
            Some(handle) => calls::stat_of(self.handles.get(inode, handle)?.file.as_fd())?,
            None => self.descriptors.stat(&node)?,
        };
        let timeout = self.record_sent(&node, &stat);
        Ok((self.numbers.attributes(&stat), timeout))
    }

    fn setattr(
        &self,
        _: Context,
        inode: u64,
        attr: fuse::SetattrIn,
        handle: Option<u64>,
        valid: SetattrValid,
    ) -> io::Result<(fuse::Attr, Duration)> {
        let node = self.table.get(inode)?;
        let stat = self.set_attributes(&node, &attr, handle, valid)?;
        let timeout = self.record_sent(&node, &stat);
        Ok((self.numbers.attributes(&stat), timeout))
    }

    fn readlink(&self, _: Context, inode: u64) -> io::Result<Vec<u8>> {
        self.read_link(&self.table.get(inode)?)
    }

    fn symlink(
        &self,
        context: Context,
        target: &CStr,
        parent: u64,
        name: &CStr,
        more: Extensions,
    ) -> io::Result<Entry> {
        let groups = groups(&more);
        self.make_link(&self.table.get(parent)?, name, target, &self.caller(&context, &groups))
    }

    fn mknod(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        device: u32,
        _umask: u32,
        more: Extensions,
    ) -> io::Result<Entry> {
        let (parent, groups) = (self.table.get(parent)?, groups(&more));
        self.make_special(&parent, name, mode, device, &self.caller(&context, &groups))
    }

    fn mkdir(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        _umask: u32,
        more: Extensions,
    ) -> io::Result<Entry> {
        let groups = groups(&more);
        self.make_dir(&self.table.get(parent)?, name, mode, &self.caller(&context, &groups))
    }

    fn unlink(&self, _: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(&self.table.get(parent)?, name, UnlinkatFlags::NoRemoveDir)
    }

    fn rmdir(&self, _: Context, parent: u64, name: &CStr) -> io::Result<()> {
        self.remove(&self.table.get(parent)?, name, UnlinkatFlags::RemoveDir)
    }

    fn rename(
        &self,
        _: Context,
        from: u64,
        old: &CStr,
        to: u64,
        new: &CStr,
        flags: u32,
    ) -> io::Result<()> {
        let (from, to) = (self.table.get(from)?, self.table.get(to)?);
        self.move_name((&from, old), (&to, new), flags)
    }

    fn link(&self, _: Context, inode: u64, parent: u64, name: &CStr) -> io::Result<Entry> {
        self.add_name(&self.table.get(inode)?, &self.table.get(parent)?, name)
    }

    fn open(
        &self,
        _: Context,
        inode: u64,
        kill: bool,
        flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.open_file(self.table.get(inode)?, flags, kill)?;
        Ok((Some(handle), options))
    }

    fn create(
        &self,
        context: Context,
        parent: u64,
        name: &CStr,
        mode: u32,
        kill: bool,
        flags: u32,
        _umask: u32,
        more: Extensions,
    ) -> io::Result<(Entry, Option<u64>, OpenOptions)> {
        let (parent, groups) = (self.table.get(parent)?, groups(&more));
        let caller = self.caller(&context, &groups);
        let (entry, opened) = self.create_file(&parent, name, (flags, mode), kill, &caller)?;
        Ok((entry, Some(opened.0), opened.1))
    }

    fn read<W: ZeroCopyWriter>(
        &self,
        _: Context,
        inode: u64,
        handle: u64,
        to: W,
        size: u32,
        offset: u64,
        _owner: Option<u64>,
        _flags: u32,
    ) -> io::Result<usize> {
        self.read_data((inode, handle), to, size, offset)
    }

    fn write<R: ZeroCopyReader>(
        &self,
        _: Context,
        inode: u64,
        handle: u64,
        from: R,
        size: u32,
        offset: u64,
        _owner: Option<u64>,
        delayed: bool,
        kill: bool,
        flags: u32,
    ) -> io::Result<usize> {
        // Writeback of cached pages has explicit offsets.
        let append = !delayed && flags as i32 & libc::O_APPEND != 0;
        self.write_data((inode, handle), from, size, offset, append, kill)
    }

    fn flush(&self, _: Context, inode: u64, handle: u64, _owner: u64) -> io::Result<()> {
        self.flush_file(inode, handle)
    }

    fn fsync(&self, _: Context, inode: u64, data: bool, handle: u64) -> io::Result<()> {
        self.sync_file(inode, handle, data)
    }

    fn fallocate(
        &self,
        _: Context,
        inode: u64,
        handle: u64,
        mode: u32,
        offset: u64,
        length: u64,
    ) -> io::Result<()> {
        self.allocate((inode, handle), mode, offset, length)
    }

    fn release(
        &self,
        _: Context,
        inode: u64,
        _flags: u32,
        handle: u64,
        _flush: bool,
        _flock: bool,
        _owner: Option<u64>,
    ) -> io::Result<()> {
        self.handles.remove(inode, handle)
    }

    fn statfs(&self, _: Context, inode: u64) -> io::Result<libc::statvfs64> {
        calls::statvfs(self.descriptors.get(&self.table.get(inode)?)?.as_fd())
    }

    fn setxattr(
        &self,
        _: Context,
        inode: u64,
        name: &CStr,
        value: &[u8],
        flags: u32,
        _more: SetxattrFlags,
    ) -> io::Result<()> {
        self.set_xattr(&self.table.get(inode)?, name, value, flags)
    }

    fn getxattr(
        &self,
        _: Context,
        inode: u64,
        name: &CStr,
        size: u32,
    ) -> io::Result<GetxattrReply> {
        self.get_xattr(&self.table.get(inode)?, name, size)
    }

    fn listxattr(&self, _: Context, inode: u64, size: u32) -> io::Result<ListxattrReply> {
        self.list_xattrs(&self.table.get(inode)?, size)
    }

    fn removexattr(&self, _: Context, inode: u64, name: &CStr) -> io::Result<()> {
        self.remove_xattr(&self.table.get(inode)?, name)
    }

    fn opendir(
        &self,
        _: Context,
        inode: u64,
        _flags: u32,
    ) -> io::Result<(Option<u64>, OpenOptions)> {
        let (handle, options) = self.open_dir(self.table.get(inode)?)?;
        Ok((Some(handle), options))
    }

    fn readdir(
        &self,
        _: Context,
        inode: u64,
        handle: u64,
        _size: u32,
        offset: u64,
    ) -> io::Result<Entries> {
        Entries::read(self.handles.get(inode, handle)?, self.numbers.clone(), offset)
    }

    fn fsyncdir(&self, _: Context, inode: u64, data: bool, handle: u64) -> io::Result<()> {
        self.sync_file(inode, handle, data)
    }

    fn releasedir(&self, _: Context, inode: u64, _flags: u32, handle: u64) -> io::Result<()> {
        self.handles.remove(inode, handle)
    }

    fn lseek(
        &self,
        _: Context,
        inode: u64,
        handle: u64,
        offset: u64,
        whence: u32,
    ) -> io::Result<u64> {
        self.seek(inode, handle, offset, whence)
    }

    fn copyfilerange(
        &self,
        _: Context,
        from: u64,
        from_handle: u64,
        from_offset: u64,
        to: u64,
        to_handle: u64,
        to_offset: u64,
        length: u64,
        _flags: u64,
    ) -> io::Result<usize> {
        let (from, to) = ((from, from_handle, from_offset), (to, to_handle, to_offset));
        self.copy_data(from, to, length)
    }

    fn syncfs(&self, _: Context, _inode: u64) -> io::Result<()> {
        self.sync_all()
    }
}

/// State is never transferred.
impl SerializableFileSystem for Passthrough {}
