//! A guest of one server: the VMM's file system device over plain memory, and FUSE requests
//! (linux/fuse.h) in its queues; and the daemon's requests to the mounter.

use std::ffi::CString;
use std::fs::{self, File};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::sync::Arc;
use std::time::{Duration, Instant};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::mount::{MntFlags, MsFlags, mount, umount, umount2};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, UnixAddr, bind, connect, listen, socket,
};
use virtio::VirtioDevice;
use virtio::fs::Fs;
use virtio::mock::{MockInterrupt, MockQueue, Runner, activation, queues};
use vm_memory_of_virtio::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap};
use vmm_api::shares::{Access, Error, REQUEST_QUEUES_MAX, Reply, Request, VERSION_ACCESS};
use vmm_api::transport::{receive, send};

pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const CREATE: u32 = 35;
    pub const FALLOCATE: u32 = 43;
    pub const READDIRPLUS: u32 = 44;
    pub const LSEEK: u32 = 46;
}

pub const ROOT: u64 = 1;

const MEMORY: u64 = 8 << 20;
const IN: u64 = 4 << 20;
const OUT: u64 = 6 << 20;
const REPLY_MAX: u32 = 1 << 20;

/// Whether mounts and namespaces can be created here; prints SKIP if not.
pub fn can_run() -> bool {
    let root = nix::unistd::geteuid().is_root();
    if !root {
        eprintln!("SKIP: the file server needs root");
    }
    root
}

pub struct Server {
    _dir: tempfile::TempDir,
    child: Child,
    control: PathBuf,
    vhost: Option<OwnedFd>,
}

impl Server {
    /// Started as the launcher does, in namespaces of its own.
    pub fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let (control, peer) = (dir.path().join("c"), dir.path().join("p"));
        let listener = |path: &Path, kind| {
            let fd = socket(AddressFamily::Unix, kind, SockFlag::empty(), None).unwrap();
            bind(fd.as_raw_fd(), &UnixAddr::new(path).unwrap()).unwrap();
            listen(&fd, Backlog::new(8).unwrap()).unwrap();
            fd
        };
        let (a, b) = (listener(&control, SockType::SeqPacket), listener(&peer, SockType::Stream));
        let vhost = UnixStream::connect(&peer).unwrap();
        let child = Command::new("unshare")
            .args(["--pid", "--fork", "--kill-child", "--mount", "--ipc", "--uts", "--net"])
            .arg(env!("CARGO_BIN_EXE_nacelle-fs"))
            .args(["--control-fd", &a.as_raw_fd().to_string()])
            .args(["--vhost-fd", &b.as_raw_fd().to_string()])
            .spawn()
            .unwrap();
        for fd in [&a, &b] {
            fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC)).unwrap();
        }
        let server = Self { _dir: dir, child, control, vhost: Some(vhost.into()) };
        let none = Reply::Shares { names: vec![], version: VERSION_ACCESS };
        assert_eq!(server.call(&Request::List, None), none);
        server
    }

    pub fn call(&self, request: &Request, tree: Option<OwnedFd>) -> Reply {
        let kind = SockType::SeqPacket;
        let fd = socket(AddressFamily::Unix, kind, SockFlag::SOCK_CLOEXEC, None).unwrap();
        connect(fd.as_raw_fd(), &UnixAddr::new(&self.control).unwrap()).unwrap();
        let fds: Vec<_> = tree.iter().map(AsFd::as_fd).collect();
        send(fd.as_fd(), request, &fds).unwrap();
        receive::<Reply>(fd.as_fd()).unwrap().0
    }

    pub fn add(&self, name: &str, source: &Path) -> Reply {
        self.add_for(name, source, Access::ReadWrite)
    }

    pub fn add_for(&self, name: &str, source: &Path, access: Access) -> Reply {
        self.call(&Request::Add { name: name.into(), access }, Some(tree(source)))
    }

    pub fn access(&self, name: &str, access: Access) -> Reply {
        self.call(&Request::Access { name: name.into(), access }, None)
    }

    /// As for a volume with HostToContainer propagation.
    pub fn add_following(&self, name: &str, source: &Path) -> Reply {
        let tree = tree(source);
        propagate(&tree, libc::MS_SLAVE);
        let access = Access::ReadWrite;
        self.call(&Request::Add { name: name.into(), access }, Some(tree))
    }

    /// As for a volume without propagation.
    pub fn add_private(&self, name: &str, source: &Path) -> Reply {
        let tree = tree(source);
        propagate(&tree, libc::MS_PRIVATE);
        let access = Access::ReadWrite;
        self.call(&Request::Add { name: name.into(), access }, Some(tree))
    }

    pub fn remove(&self, name: &str) -> Reply {
        self.call(&Request::Remove { name: name.into() }, None)
    }

    /// Pids of the mounter and of the server.
    pub fn pids(&self) -> (u32, u32) {
        let only_child = |pid: u32| -> u32 {
            let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
            text.trim().parse().unwrap()
        };
        let mounter = only_child(self.child.id());
        (mounter, only_child(mounter))
    }

    /// Mount points below `folder`, in the server's root.
    pub fn mounts(&self, folder: &str) -> Vec<String> {
        let text = fs::read_to_string(format!("/proc/{}/mountinfo", self.pids().0)).unwrap();
        let points = text.lines().filter_map(|line| line.split(' ').nth(4));
        points.filter(|point| point.starts_with(folder)).map(str::to_owned).collect()
    }

    /// Number of file descriptors of the server.
    pub fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.pids().1)).unwrap().count()
    }

    pub fn guest(&mut self) -> Guest {
        Guest::new(self.vhost.take().unwrap())
    }

    pub fn exited(&mut self) -> bool {
        let end = Instant::now() + Duration::from_secs(10);
        while Instant::now() < end {
            if self.child.try_wait().unwrap().is_some() {
                return true;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        false
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn error_of(reply: Reply) -> Error {
    match reply {
        Reply::Error(error) => error,
        other => panic!("{other:?} is not an error"),
    }
}

/// A detached copy of a mount, as the daemon makes it.
#[allow(unsafe_code)] // open_tree is in no library
pub fn tree(source: &Path) -> OwnedFd {
    let path = CString::new(source.as_os_str().as_encoded_bytes()).unwrap();
    let flags =
        libc::OPEN_TREE_CLONE | libc::OPEN_TREE_CLOEXEC | libc::AT_RECURSIVE as libc::c_uint;
    // SAFETY: the path is NUL-terminated and outlives the call, which writes no memory.
    let fd = unsafe { libc::syscall(libc::SYS_open_tree, libc::AT_FDCWD, path.as_ptr(), flags) };
    assert!(fd >= 0, "open_tree {}: {}", source.display(), std::io::Error::last_os_error());
    // SAFETY: the kernel has just created this file descriptor; nothing else owns it.
    unsafe { OwnedFd::from_raw_fd(fd as i32) }
}

#[allow(unsafe_code)] // mount_setattr is in no library
fn propagate(tree: &OwnedFd, propagation: u64) {
    let attributes = libc::mount_attr { attr_set: 0, attr_clr: 0, propagation, userns_fd: 0 };
    // SAFETY: the path is static and NUL-terminated, `attributes` is readable for the given length.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | libc::AT_RECURSIVE,
            std::ptr::from_ref(&attributes),
            size_of::<libc::mount_attr>(),
        )
    };
    assert_eq!(done, 0, "{}", std::io::Error::last_os_error());
}

/// A tmpfs, detached on drop.
pub struct Mounted(pub PathBuf, bool);

impl Mounted {
    pub fn new(at: &Path) -> Self {
        fs::create_dir_all(at).unwrap();
        mount(Some("none"), at, Some("tmpfs"), MsFlags::empty(), None::<&str>).unwrap();
        Self(at.to_owned(), true)
    }

    /// With shared propagation.
    pub fn shared(at: &Path) -> Self {
        let mounted = Self::new(at);
        let none = None::<&str>;
        mount(none, at, none, MsFlags::MS_PRIVATE, none).unwrap();
        mount(none, at, none, MsFlags::MS_SHARED, none).unwrap();
        mounted
    }

    /// Without MNT_DETACH: fails while it is in use.
    pub fn unmount(mut self) {
        umount(&self.0).unwrap();
        self.1 = false;
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        if self.1 {
            let _ = umount2(&self.0, MntFlags::MNT_DETACH);
        }
    }
}

/// Reply to a lookup.
#[derive(Debug, Clone, Copy)]
pub struct Entry {
    pub node: u64,
    pub ino: u64,
    pub mode: u32,
    /// `fuse_attr.flags`: 1 is a file system of its own.
    pub flags: u32,
    pub size: u64,
}

pub struct Guest {
    mem: Arc<GuestMemoryMmap>,
    queues: Vec<MockQueue>,
    runner: Runner,
    _fs: Fs,
    unique: u64,
    pub uid: u32,
}

impl Guest {
    fn new(vhost: OwnedFd) -> Self {
        let file = File::from(memfd_create(c"guest", MFdFlags::MFD_CLOEXEC).unwrap());
        file.set_len(MEMORY).unwrap();
        let range = (GuestAddress(0), MEMORY as usize, Some(FileOffset::new(file, 0)));
        let mem = Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).unwrap());
        let mut device = Fs::new("test", vhost, REQUEST_QUEUES_MAX).unwrap();
        let queues = queues(&mem, 0x1000, device.queue_sizes());
        let interrupt = Arc::new(MockInterrupt::default());
        let made = activation(&device, &queues, interrupt, device.features());
        let runner = Runner::start(device.activate(made).unwrap()).unwrap();
        let mut guest = Self { mem, queues, runner, _fs: device, unique: 1, uid: 0 };
        guest.init();
        guest
    }

    fn init(&mut self) {
        // 7.36, a page of readahead, SUBMOUNTS and HANDLE_KILLPRIV_V2.
        let mut body = Vec::new();
        for word in [7u32, 36, 4096, 1 << 27 | 1 << 28] {
            body.extend(word.to_le_bytes());
        }
        let answer = self.request(op::INIT, 0, &body).unwrap();
        assert_eq!(answer[..4], 7u32.to_le_bytes());
    }

    /// A request without reply (FORGET).
    pub fn request_without_reply(&mut self, opcode: u32, node: u64, body: &[u8]) {
        let answer = self.exchange(opcode, node, body);
        assert!(answer.is_empty(), "opcode {opcode}: {answer:?}");
    }

    /// One request; returns the reply without its header, or the errno.
    pub fn request(&mut self, opcode: u32, node: u64, body: &[u8]) -> Result<Vec<u8>, i32> {
        let answer = self.exchange(opcode, node, body);
        let word = |at: usize| i32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
        assert_eq!(word(0) as usize, answer.len());
        assert_eq!(answer[8..16], self.unique.to_le_bytes());
        match word(4) {
            0 => Ok(answer[16..].to_vec()),
            error => Err(-error),
        }
    }

    fn exchange(&mut self, opcode: u32, node: u64, body: &[u8]) -> Vec<u8> {
        // Round-robin over all request queues, as a guest with several CPUs uses them.
        let count = self.queues.len() - 1;
        let at = 1 + (self.unique as usize + 1) % count;
        self.begin_at(at, IN, OUT, (opcode, node), body);
        let queue = &mut self.queues[at];
        let mut used = None;
        let answered = self.runner.until(|| {
            used = queue.used();
            used.is_some()
        });
        assert!(answered, "no answer to opcode {opcode}");
        let mut answer = vec![0; used.unwrap().1 as usize];
        self.mem.read_slice(&mut answer, GuestAddress(OUT)).unwrap();
        answer
    }

    fn begin_at(&mut self, at: usize, from: u64, to: u64, (opcode, node): (u32, u64), body: &[u8]) {
        self.unique += 1;
        let mut request = Vec::new();
        for word in [40 + body.len() as u32, opcode] {
            request.extend(word.to_le_bytes());
        }
        for wide in [self.unique, node] {
            request.extend(wide.to_le_bytes());
        }
        for word in [self.uid, self.uid, 1, 0] {
            request.extend(word.to_le_bytes());
        }
        request.extend(body);
        self.mem.write_slice(&request, GuestAddress(from)).unwrap();
        let queue = &mut self.queues[at];
        queue.add(&[(from, request.len() as u32)], &[(to, REPLY_MAX)]);
        queue.kick();
    }

    /// Seconds for which a name and the attributes of its file may be cached.
    pub fn timeouts(&mut self, parent: u64, name: &str) -> (u64, u64) {
        let answer = self.request(op::LOOKUP, parent, &text(name)).unwrap();
        let wide = |at: usize| u64::from_le_bytes(answer[at..at + 8].try_into().unwrap());
        (wide(16), wide(24))
    }

    pub fn lookup(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        let entry = entry(&self.request(op::LOOKUP, parent, &text(name))?);
        // Node 0: a negative entry, which may be cached.
        if entry.node == 0 { Err(libc::ENOENT) } else { Ok(entry) }
    }

    /// Looks up each component of a path.
    pub fn find(&mut self, from: u64, path: &str) -> Result<Entry, i32> {
        let mut found = Err(libc::ENOENT);
        let mut node = from;
        for name in path.split('/') {
            found = Ok(self.lookup(node, name)?);
            node = found?.node;
        }
        found
    }

    /// Like [`Self::find`], repeated until the path exists.
    pub fn await_path(&mut self, from: u64, path: &str) -> Entry {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            match self.find(from, path) {
                Ok(entry) => return entry,
                Err(error) => assert!(Instant::now() < end, "{path}: {error}"),
            }
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Looks a name up until the result is accepted.
    pub fn lookup_until(
        &mut self,
        parent: u64,
        name: &str,
        accepted: impl Fn(Result<Entry, i32>) -> bool,
    ) -> Result<Entry, i32> {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let found = self.lookup(parent, name);
            if accepted(found) {
                return found;
            }
            assert!(Instant::now() < end, "{name}: {found:?}");
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    pub fn mkdir(&mut self, parent: u64, name: &str) -> Result<Entry, i32> {
        let mut body = Vec::new();
        for word in [0o755u32, 0] {
            body.extend(word.to_le_bytes());
        }
        body.extend(text(name));
        Ok(entry(&self.request(op::MKDIR, parent, &body)?))
    }

    /// Creates and opens a file; returns its node and handle.
    pub fn create(&mut self, parent: u64, name: &str, mode: u32) -> Result<(u64, u64), i32> {
        let mut body = Vec::new();
        for word in [(libc::O_RDWR | libc::O_CREAT) as u32, libc::S_IFREG | mode, 0, 0] {
            body.extend(word.to_le_bytes());
        }
        body.extend(text(name));
        let answer = self.request(op::CREATE, parent, &body)?;
        let handle = u64::from_le_bytes(answer[128..136].try_into().unwrap());
        Ok((entry(&answer).node, handle))
    }

    pub fn open(&mut self, node: u64, flags: i32) -> Result<u64, i32> {
        self.open_with_options(node, flags).map(|(handle, _)| handle)
    }

    /// Returns the handle and FOPEN_ flags.
    pub fn open_with_options(&mut self, node: u64, flags: i32) -> Result<(u64, u32), i32> {
        let body = [(flags as u32).to_le_bytes(), [0; 4]].concat();
        let answer = self.request(op::OPEN, node, &body)?;
        let options = u32::from_le_bytes(answer[8..12].try_into().unwrap());
        Ok((u64::from_le_bytes(answer[..8].try_into().unwrap()), options))
    }

    pub fn release(&mut self, node: u64, handle: u64) {
        let body = [&handle.to_le_bytes()[..], &[0; 16]].concat();
        self.request(op::RELEASE, node, &body).unwrap();
    }

    /// FORGET has no reply; requests are processed in order.
    pub fn forget(&mut self, node: u64, count: u64) {
        self.request_without_reply(op::FORGET, node, &count.to_le_bytes());
    }

    /// Size and link count of a file.
    pub fn attributes(&mut self, node: u64) -> Result<(u64, u32), i32> {
        let answer = self.request(op::GETATTR, node, &[0; 16])?;
        let size = u64::from_le_bytes(answer[24..32].try_into().unwrap());
        Ok((size, u32::from_le_bytes(answer[80..84].try_into().unwrap())))
    }

    pub fn rename(&mut self, from: u64, old: &str, to: u64, new: &str) -> Result<(), i32> {
        let body = [&to.to_le_bytes()[..], &text(old), &text(new)].concat();
        self.request(op::RENAME, from, &body).map(drop)
    }

    pub fn link(&mut self, node: u64, parent: u64, name: &str) -> Result<Entry, i32> {
        let body = [&node.to_le_bytes()[..], &text(name)].concat();
        self.request(op::LINK, parent, &body).map(|answer| entry(&answer))
    }

    /// Names in a directory with the inode numbers of its entries, and their attributes.
    pub fn list(&mut self, folder: u64) -> Vec<(String, u64, Entry)> {
        let answer = self.request(op::OPENDIR, folder, &[0; 8]).unwrap();
        let handle = answer[..8].to_vec();
        let (mut found, mut offset) = (Vec::new(), 0u64);
        loop {
            let mut body = handle.clone();
            body.extend(offset.to_le_bytes());
            // A small buffer, so that several requests are needed.
            for word in [1024u32, 0, 0, 0, 0, 0] {
                body.extend(word.to_le_bytes());
            }
            let answer = self.request(op::READDIRPLUS, folder, &body).unwrap();
            if answer.is_empty() {
                return found;
            }
            let mut rest = &answer[..];
            while !rest.is_empty() {
                let wide = |at: usize| u64::from_le_bytes(rest[at..at + 8].try_into().unwrap());
                let length = u32::from_le_bytes(rest[144..148].try_into().unwrap()) as usize;
                let name = String::from_utf8(rest[152..152 + length].to_vec()).unwrap();
                offset = wide(136);
                found.push((name, wide(128), entry(rest)));
                rest = &rest[(152 + length).next_multiple_of(8)..];
            }
        }
    }

    /// `flags`: 4 (FUSE_WRITE_KILL_SUIDGID) for a write that clears setuid bits.
    pub fn write(&mut self, node: u64, handle: u64, data: &[u8], flags: u32) -> Result<u32, i32> {
        let mut body = Vec::new();
        body.extend(handle.to_le_bytes());
        body.extend(0u64.to_le_bytes());
        for word in [data.len() as u32, flags, 0, 0, 0, 0] {
            body.extend(word.to_le_bytes());
        }
        body.extend(data);
        let answer = self.request(op::WRITE, node, &body)?;
        Ok(u32::from_le_bytes(answer[..4].try_into().unwrap()))
    }

    pub fn read(&mut self, node: u64, handle: u64) -> Result<Vec<u8>, i32> {
        let mut body = Vec::new();
        body.extend(handle.to_le_bytes());
        body.extend(0u64.to_le_bytes());
        for word in [4096u32, 0, 0, 0, 0, 0] {
            body.extend(word.to_le_bytes());
        }
        self.request(op::READ, node, &body)
    }
}

pub fn text(name: &str) -> Vec<u8> {
    CString::new(name).unwrap().into_bytes_with_nul()
}

/// `struct fuse_entry_out`.
fn entry(answer: &[u8]) -> Entry {
    let wide = |at: usize| u64::from_le_bytes(answer[at..at + 8].try_into().unwrap());
    let word = |at: usize| u32::from_le_bytes(answer[at..at + 4].try_into().unwrap());
    Entry { node: wide(0), ino: wide(40), size: wide(48), mode: word(100), flags: word(124) }
}
