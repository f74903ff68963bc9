//! The pass-through file system with one remedy.
//!
//! Setuid and setgid bits go when somebody else changes a file, because CAP_FSETID is put aside for
//! the change. The crate asks libcap-ng whether the thread has it, and that answers from memory: from
//! what it read while the thread acted as an unprivileged user to make a file (guest kernels before
//! 6.3 make it look then), when there was nothing. From then on the bits would stay. So it is told
//! the truth again before each change that may have to take them away.

use std::ffi::CStr;
use std::io;
use std::time::Duration;

use capng::{Action, CUpdate, Type};
use virtiofsd::filesystem::{
    Context, Entry, Extensions, FileSystem, FsOptions, GetxattrReply, ListxattrReply, OpenOptions,
    SerializableFileSystem, SetattrValid, SetxattrFlags, ZeroCopyReader, ZeroCopyWriter,
};
use virtiofsd::fuse;
use virtiofsd::passthrough::PassthroughFs;

use crate::jail;

pub(crate) struct Files(pub(crate) PassthroughFs);

type Inode = <PassthroughFs as FileSystem>::Inode;
type Handle = <PassthroughFs as FileSystem>::Handle;
type Opened = io::Result<(Option<Handle>, OpenOptions)>;

/// What libcap-ng is to believe of this thread; changes nothing but that.
fn remember_capabilities() {
    let update = |(capability, _): &(u32, &str)| CUpdate {
        action: Action::ADD,
        cap_type: Type::EFFECTIVE,
        capability: *capability,
    };
    let updates = jail::SERVER.iter().map(update).collect();
    // It refuses until it has looked for the first time; as root, it sees what is to be seen.
    let told = capng::update(updates).or_else(|_| capng::get_caps_process());
    if let Err(error) = told {
        log::error!("libcap-ng: {error:?}");
    }
}

/// Hands calls on.
macro_rules! pass {
    ($(fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $kind:ty),* $(,)?)
        $(-> $answer:ty)?;)*) => {
        $(fn $name $(<$generic: $bound>)? (&self, $($arg: $kind),*) $(-> $answer)? {
            self.0.$name($($arg),*)
        })*
    };
}

/// Hands calls on that may take setuid bits away.
macro_rules! pass_remembering {
    ($(fn $name:ident $(<$generic:ident: $bound:path>)? ($($arg:ident: $kind:ty),* $(,)?)
        -> $answer:ty where $needed:expr;)*) => {
        $(fn $name $(<$generic: $bound>)? (&self, $($arg: $kind),*) -> $answer {
            if $needed {
                remember_capabilities();
            }
            self.0.$name($($arg),*)
        })*
    };
}

impl FileSystem for Files {
    type Inode = Inode;
    type Handle = Handle;
    type DirIter = <PassthroughFs as FileSystem>::DirIter;

    pass! {
        fn init(capable: FsOptions) -> io::Result<FsOptions>;
        fn destroy();
        fn lookup(ctx: Context, parent: Inode, name: &CStr) -> io::Result<Entry>;
        fn forget(ctx: Context, inode: Inode, count: u64);
        fn batch_forget(ctx: Context, requests: Vec<(Inode, u64)>);
        fn getattr(ctx: Context, inode: Inode, handle: Option<Handle>)
            -> io::Result<(fuse::Attr, Duration)>;
        fn readlink(ctx: Context, inode: Inode) -> io::Result<Vec<u8>>;
        fn symlink(ctx: Context, target: &CStr, parent: Inode, name: &CStr, more: Extensions)
            -> io::Result<Entry>;
        fn mknod(
            ctx: Context,
            parent: Inode,
            name: &CStr,
            mode: u32,
            rdev: u32,
            umask: u32,
            more: Extensions,
        ) -> io::Result<Entry>;
        fn mkdir(
            ctx: Context,
            parent: Inode,
            name: &CStr,
            mode: u32,
            umask: u32,
            more: Extensions,
        ) -> io::Result<Entry>;
        fn unlink(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rmdir(ctx: Context, parent: Inode, name: &CStr) -> io::Result<()>;
        fn rename(
            ctx: Context,
            from: Inode,
            old: &CStr,
            to: Inode,
            new: &CStr,
            flags: u32,
        ) -> io::Result<()>;
        fn link(ctx: Context, inode: Inode, parent: Inode, name: &CStr) -> io::Result<Entry>;
        fn read<W: ZeroCopyWriter>(
            ctx: Context,
            inode: Inode,
            handle: Handle,
            to: W,
            size: u32,
            offset: u64,
            owner: Option<u64>,
            flags: u32,
        ) -> io::Result<usize>;
        fn flush(ctx: Context, inode: Inode, handle: Handle, owner: u64) -> io::Result<()>;
        fn fsync(ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()>;
        fn fallocate(
            ctx: Context,
            inode: Inode,
            handle: Handle,
            mode: u32,
            offset: u64,
            length: u64,
        ) -> io::Result<()>;
        fn release(
            ctx: Context,
            inode: Inode,
            flags: u32,
            handle: Handle,
            flush: bool,
            flock: bool,
            owner: Option<u64>,
        ) -> io::Result<()>;
        fn statfs(ctx: Context, inode: Inode) -> io::Result<libc::statvfs64>;
        fn setxattr(
            ctx: Context,
            inode: Inode,
            name: &CStr,
            value: &[u8],
            flags: u32,
            more: SetxattrFlags,
        ) -> io::Result<()>;
        fn getxattr(ctx: Context, inode: Inode, name: &CStr, size: u32)
            -> io::Result<GetxattrReply>;
        fn listxattr(ctx: Context, inode: Inode, size: u32) -> io::Result<ListxattrReply>;
        fn removexattr(ctx: Context, inode: Inode, name: &CStr) -> io::Result<()>;
        fn opendir(ctx: Context, inode: Inode, flags: u32) -> Opened;
        fn readdir(ctx: Context, inode: Inode, handle: Handle, size: u32, offset: u64)
            -> io::Result<Self::DirIter>;
        fn fsyncdir(ctx: Context, inode: Inode, data: bool, handle: Handle) -> io::Result<()>;
        fn releasedir(ctx: Context, inode: Inode, flags: u32, handle: Handle) -> io::Result<()>;
        fn access(ctx: Context, inode: Inode, mask: u32) -> io::Result<()>;
        fn lseek(ctx: Context, inode: Inode, handle: Handle, offset: u64, whence: u32)
            -> io::Result<u64>;
        fn copyfilerange(
            ctx: Context,
            from: Inode,
            from_handle: Handle,
            from_offset: u64,
            to: Inode,
            to_handle: Handle,
            to_offset: u64,
            length: u64,
            flags: u64,
        ) -> io::Result<usize>;
        fn syncfs(ctx: Context, inode: Inode) -> io::Result<()>;
    }

    pass_remembering! {
        fn setattr(
            ctx: Context,
            inode: Inode,
            attr: fuse::SetattrIn,
            handle: Option<Handle>,
            valid: SetattrValid,
        ) -> io::Result<(fuse::Attr, Duration)> where valid.contains(SetattrValid::KILL_SUIDGID);
        fn open(ctx: Context, inode: Inode, kill: bool, flags: u32) -> Opened where kill;
        fn create(
            ctx: Context,
            parent: Inode,
            name: &CStr,
            mode: u32,
            kill: bool,
            flags: u32,
            umask: u32,
            more: Extensions,
        ) -> io::Result<(Entry, Option<Handle>, OpenOptions)> where kill;
        fn write<R: ZeroCopyReader>(
            ctx: Context,
            inode: Inode,
            handle: Handle,
            from: R,
            size: u32,
            offset: u64,
            owner: Option<u64>,
            delayed: bool,
            kill: bool,
            flags: u32,
        ) -> io::Result<usize> where kill;
    }
}

/// State is never transferred.
impl SerializableFileSystem for Files {}
