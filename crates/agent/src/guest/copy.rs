//! Copies a directory tree with its metadata: owners, modes, times, extended attributes, hard
//! links, holes, special files. Source and target must not change during the copy.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use nix::dir::Dir;
use nix::errno::Errno;
use nix::fcntl::{AtFlags, OFlag, openat, readlinkat};
use nix::sys::stat::{
    FchmodatFlags, FileStat, Mode, SFlag, UtimensatFlags, fchmodat, fstat, fstatat, mkdirat,
    mknodat, utimensat,
};
use nix::sys::time::TimeSpec;
use nix::unistd::{Gid, Uid, Whence, fchownat, linkat, lseek64, symlinkat};

/// Maximum depth; each level uses two descriptors and some of the stack.
const MAX_DEPTH: usize = 128;
/// Buffer size, bytes.
const CHUNK: usize = 128 << 10;
/// Block size of the target file systems: zeros of this size become holes.
const BLOCK: usize = 4096;

const SELF: &str = ".";

/// Limits of a copy.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Bytes of content, without holes.
    pub bytes: u64,
    pub entries: u64,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Copied {
    All,
    /// The limits were exceeded; the copy is incomplete.
    LimitExceeded,
}

enum Stop {
    LimitExceeded,
    Failed(io::Error),
}

impl<E: Into<io::Error>> From<E> for Stop {
    fn from(error: E) -> Self {
        Self::Failed(error.into())
    }
}

/// Copies the content and attributes of directory `from` into the empty directory `to`; reduces
/// `left` by the amount copied. Blocks.
pub fn tree(from: &OwnedFd, to: &Path, left: &mut Limits) -> io::Result<Copied> {
    let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
    let from = openat(from, SELF, flags, Mode::empty())?;
    let to = nix::fcntl::open(to, flags, Mode::empty())?;
    let mut copy =
        Copy { top: to.try_clone()?, left, links: HashMap::new(), buffer: vec![0; CHUNK] };
    match copy.dir(&from, &to, Path::new(""), 0) {
        Ok(()) => Ok(Copied::All),
        Err(Stop::LimitExceeded) => Ok(Copied::LimitExceeded),
        Err(Stop::Failed(error)) => Err(error),
    }
}

struct Copy<'a> {
    top: OwnedFd,
    left: &'a mut Limits,
    /// First path below `top` of each file with several hard links.
    links: HashMap<(u64, u64), PathBuf>,
    buffer: Vec<u8>,
}

impl Copy<'_> {
    /// `below` is the path of `to` relative to the top.
    fn dir(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        below: &Path,
        depth: usize,
    ) -> Result<(), Stop> {
        if depth > MAX_DEPTH {
            return Err(Stop::LimitExceeded);
        }
        let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_CLOEXEC;
        let mut dir = Dir::openat(from, SELF, flags, Mode::empty())?;
        for entry in dir.iter() {
            let entry = entry?;
            let name: CString = entry.file_name().to_owned();
            if name.as_c_str() == c"." || name.as_c_str() == c".." {
                continue;
            }
            self.left.entries = self.left.entries.checked_sub(1).ok_or(Stop::LimitExceeded)?;
            let name = OsStr::from_bytes(name.as_bytes());
            self.entry(from, to, &below.join(name), name, depth)?;
        }
        // After the content, which changes the times.
        let stat = fstat(from)?;
        attributes(&of(from, SELF), &of(to, SELF), to, OsStr::new(SELF), &stat)
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        path: &Path,
        name: &OsStr,
        depth: usize,
    ) -> Result<(), Stop> {
        let stat = fstatat(from, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        let kind = SFlag::from_bits_truncate(stat.st_mode & SFlag::S_IFMT.bits());
        let private = Mode::S_IRUSR | Mode::S_IWUSR;
        if kind == SFlag::S_IFDIR {
            mkdirat(to, name, Mode::S_IRWXU)?;
            let flags = OFlag::O_RDONLY | OFlag::O_DIRECTORY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
            let from = openat(from, name, flags, Mode::empty())?;
            let to = openat(to, name, flags, Mode::empty())?;
            return self.dir(&from, &to, path, depth + 1);
        }
        if stat.st_nlink > 1 {
            let file = (stat.st_dev, stat.st_ino);
            if let Some(first) = self.links.get(&file) {
                return Ok(linkat(&self.top, first.as_path(), to, name, AtFlags::empty())?);
            }
            self.links.insert(file, path.to_owned());
        }
        match kind {
            SFlag::S_IFREG => {
                let flags = OFlag::O_RDONLY | OFlag::O_NOFOLLOW | OFlag::O_CLOEXEC;
                let source = openat(from, name, flags, Mode::empty())?;
                let flags = OFlag::O_WRONLY | OFlag::O_CREAT | OFlag::O_EXCL | OFlag::O_CLOEXEC;
                let target = openat(to, name, flags, private)?;
                self.content(&File::from(source), &File::from(target), stat.st_size)?;
            }
            SFlag::S_IFLNK => {
                let target = readlinkat(from, name)?;
                symlinkat(target.as_os_str(), to, name)?;
            }
            // Pipes, sockets, devices.
            kind => mknodat(to, name, kind, private, stat.st_rdev)?,
        }
        attributes(&of(from, name), &of(to, name), to, name, &stat)
    }

    fn content(&mut self, from: &File, to: &File, size: i64) -> Result<(), Stop> {
        to.set_len(size.unsigned_abs())?;
        let mut at: i64 = 0;
        while at < size {
            at = match lseek64(from, at, Whence::SeekData) {
                Err(Errno::ENXIO) => return Ok(()), // no data after `at`
                // The file system does not report holes.
                Err(Errno::EINVAL) => at,
                data => data?,
            };
            let hole = match lseek64(from, at, Whence::SeekHole) {
                Err(Errno::EINVAL) => size,
                hole => hole?.min(size),
            };
            while at < hole {
                let want = usize::try_from(hole - at).map_or(CHUNK, |left| left.min(CHUNK));
                let got = from.read_at(&mut self.buffer[..want], at.unsigned_abs())?;
                if got == 0 {
                    return Ok(());
                }
                self.left.bytes =
                    self.left.bytes.checked_sub(got as u64).ok_or(Stop::LimitExceeded)?;
                write_sparse(to, &self.buffer[..got], at.unsigned_abs())?;
                at += got as i64;
            }
        }
        Ok(())
    }
}

/// Writes the blocks that are not all zeros; adjacent ones in one write.
fn write_sparse(to: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut start = 0;
    while start < bytes.len() {
        let mut end = start;
        while end < bytes.len() && !is_zero(&bytes[end..bytes.len().min(end + BLOCK)]) {
            end = bytes.len().min(end + BLOCK);
        }
        if end > start {
            to.write_all_at(&bytes[start..end], at + start as u64)?;
        }
        start = end + BLOCK;
    }
    Ok(())
}

/// A path of an entry of an open directory, for calls without an `at` variant.
fn of(dir: &OwnedFd, name: impl AsRef<OsStr>) -> PathBuf {
    Path::new("/proc/self/fd").join(dir.as_raw_fd().to_string()).join(name.as_ref())
}

/// Copies attributes, in the order in which no call resets an earlier one.
fn attributes(
    from: &Path,
    to: &Path,
    dir: &OwnedFd,
    name: &OsStr,
    stat: &FileStat,
) -> Result<(), Stop> {
    let no_follow = AtFlags::AT_SYMLINK_NOFOLLOW;
    let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
    fchownat(dir, name, Some(uid), Some(gid), no_follow)?;
    if stat.st_mode & SFlag::S_IFMT.bits() != SFlag::S_IFLNK.bits() {
        let mode = Mode::from_bits_truncate(stat.st_mode & 0o7777);
        fchmodat(dir, name, mode, FchmodatFlags::FollowSymlink)?;
    }
    extended(from, to)?;
    let time = |seconds, nanoseconds| TimeSpec::new(seconds, nanoseconds);
    let accessed = time(stat.st_atime, stat.st_atime_nsec);
    let modified = time(stat.st_mtime, stat.st_mtime_nsec);
    utimensat(dir, name, &accessed, &modified, UtimensatFlags::NoFollowSymlink)?;
    Ok(())
}

/// Copies extended attributes, including ACLs and file capabilities.
fn extended(from: &Path, to: &Path) -> io::Result<()> {
    let unsupported = |error: &io::Error| error.raw_os_error() == Some(libc::EOPNOTSUPP);
    let names = match xattr::list(from) {
        Err(error) if unsupported(&error) => return Ok(()),
        names => names?,
    };
    for name in names {
        if let Some(value) = xattr::get(from, &name)? {
            xattr::set(to, &name, &value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, lchown, symlink};
    use std::time::{Duration, SystemTime};

    use super::*;
    use crate::guest::volumes::open_dir;

    const ENOUGH: Limits = Limits { bytes: 1 << 30, entries: 1000 };

    fn copy(from: &Path, to: &Path, mut limits: Limits) -> io::Result<Copied> {
        fs::create_dir(to).unwrap();
        tree(&open_dir(from).unwrap(), to, &mut limits)
    }

    #[test]
    fn a_copy_has_the_content_and_metadata_of_the_original() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        fs::create_dir_all(from.join("a/b")).unwrap();
        fs::write(from.join("a/file"), vec![b'x'; 300_000]).unwrap();
        fs::hard_link(from.join("a/file"), from.join("a/b/same")).unwrap();
        symlink("/nowhere", from.join("link")).unwrap();
        nix::unistd::mkfifo(&from.join("pipe"), Mode::from_bits_truncate(0o640)).unwrap();
        let sparse = File::create(from.join("sparse")).unwrap();
        sparse.set_len(64 << 20).unwrap();
        sparse.write_all_at(b"end", (64 << 20) - 3).unwrap();
        let root = nix::unistd::geteuid().is_root();
        let mode = if root { 0o6751 } else { 0o751 };
        if root {
            chown(from.join("a"), Some(12), Some(34)).unwrap();
            lchown(from.join("link"), Some(56), Some(78)).unwrap();
            chown(from.join("a/file"), Some(1), Some(2)).unwrap();
            xattr::set(from.join("a"), "trusted.test", b"t").unwrap();
        }
        let named = xattr::set(from.join("a/file"), "user.test", b"value");
        fs::set_permissions(from.join("a/file"), fs::Permissions::from_mode(mode)).unwrap();
        fs::set_permissions(&from, fs::Permissions::from_mode(0o1777)).unwrap();
        let past = SystemTime::UNIX_EPOCH + Duration::from_millis(1_000_000_500);
        for path in ["a/file", "a", "."] {
            File::open(from.join(path)).unwrap().set_modified(past).unwrap();
        }
        assert_eq!(copy(&from, &to, ENOUGH).unwrap(), Copied::All);
        for path in [".", "a", "a/file", "a/b", "a/b/same", "link", "pipe", "sparse"] {
            let seen = |root: &Path| {
                let meta = fs::symlink_metadata(root.join(path)).unwrap();
                let time = (meta.mtime(), meta.mtime_nsec());
                let size = if meta.is_dir() { 0 } else { meta.size() };
                (meta.mode(), meta.uid(), meta.gid(), time, size)
            };
            assert_eq!(seen(&from), seen(&to), "{path}");
        }
        assert_eq!(fs::metadata(to.join("a")).unwrap().modified().unwrap(), past);
        let inode = |path: &str| fs::metadata(to.join(path)).unwrap().ino();
        assert_eq!(inode("a/file"), inode("a/b/same"));
        assert_eq!(fs::read(to.join("a/b/same")).unwrap(), vec![b'x'; 300_000]);
        assert_eq!(fs::read_link(to.join("link")).unwrap(), Path::new("/nowhere"));
        assert!(fs::metadata(to.join("sparse")).unwrap().blocks() < 2048);
        assert!(fs::read(to.join("sparse")).unwrap().ends_with(b"\0end"));
        if named.is_ok() {
            let value = xattr::get(to.join("a/b/same"), "user.test").unwrap();
            assert_eq!(value.as_deref(), Some(&b"value"[..]));
        }
        if root {
            let value = xattr::get(to.join("a"), "trusted.test").unwrap();
            assert_eq!(value.as_deref(), Some(&b"t"[..]));
        }
    }

    #[test]
    fn a_copy_beyond_the_limits_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let from = dir.path().join("from");
        fs::create_dir(&from).unwrap();
        fs::write(from.join("a"), [1; 5000]).unwrap();
        fs::write(from.join("b"), "").unwrap();
        let limits = |bytes, entries| Limits { bytes, entries };
        for (n, limits, copied) in [
            (0, limits(5000, 2), Copied::All),
            (1, limits(4999, 2), Copied::LimitExceeded),
            (2, limits(5000, 1), Copied::LimitExceeded),
        ] {
            assert_eq!(copy(&from, &dir.path().join(n.to_string()), limits).unwrap(), copied);
        }
        let mut deep = from.clone();
        for _ in 0..=MAX_DEPTH {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        assert_eq!(copy(&from, &dir.path().join("deep"), ENOUGH).unwrap(), Copied::LimitExceeded);
    }
}
