//! The host's mount table and the location of a path in it: /proc/self/mountinfo
//! (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

use nix::fcntl::{OFlag, open};
use nix::sys::stat::Mode;

/// Location of a file or directory: identical for all paths and bind mounts that lead to it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Location {
    /// Canonical path.
    pub(crate) path: PathBuf,
    /// `major:minor` of the file system, and the path in it.
    pub(crate) device: Vec<u8>,
    pub(crate) root: PathBuf,
    pub(crate) dev: u64,
    pub(crate) ino: u64,
    /// Mounts below it.
    pub(crate) below: Vec<Submount>,
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Submount {
    /// Mount point relative to the location.
    pub(crate) point: PathBuf,
    pub(crate) device: Vec<u8>,
    pub(crate) root: PathBuf,
}

impl Location {
    /// Resolves `path`. Blocks.
    pub(crate) fn of(path: &Path) -> io::Result<Self> {
        let path = fs::canonicalize(path)?;
        let file = open(&path, OFlag::O_PATH | OFlag::O_CLOEXEC, Mode::empty())?;
        let known = fs::metadata(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        let mount = mount_id(file.as_raw_fd())?;
        let table = fs::read("/proc/self/mountinfo")?;
        let (dev, ino) = (known.dev(), known.ino());
        let (device, root, below) = locate(&table, mount, &path).ok_or_else(|| {
            io::Error::other(format!("mount {mount} is not in /proc/self/mountinfo"))
        })?;
        Ok(Self { path, device, root, dev, ino, below })
    }

    /// Whether the two may have files in common.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let nested = self.root.starts_with(&other.root) || other.root.starts_with(&self.root);
        self.device == other.device && nested
    }

    /// The relative path of `inner`, if exactly the same is found there.
    pub(crate) fn path_to(&self, inner: &Self) -> Option<PathBuf> {
        let path = inner.root.strip_prefix(&self.root).ok()?;
        if self.device != inner.device {
            return None;
        }
        let below = self.below.iter().filter_map(|mount| {
            let point = mount.point.strip_prefix(path).ok()?.to_owned();
            (!point.as_os_str().is_empty()).then(|| Submount { point, ..mount.clone() })
        });
        let found = fs::symlink_metadata(self.path.join(path)).ok()?;
        let same = (found.dev(), found.ino()) == (inner.dev, inner.ino);
        (same && below.eq(inner.below.iter().cloned())).then(|| path.to_owned())
    }
}

/// Mount id of a descriptor (proc_pid_fdinfo(5)).
fn mount_id(fd: i32) -> io::Result<u64> {
    let text = fs::read_to_string(format!("/proc/self/fdinfo/{fd}"))?;
    let id = text.lines().find_map(|line| line.strip_prefix("mnt_id:")?.trim().parse().ok());
    id.ok_or_else(|| io::Error::other("/proc/self/fdinfo has no mnt_id"))
}

/// `id parent major:minor root point …`
struct MountInfo {
    id: u64,
    device: Vec<u8>,
    root: PathBuf,
    point: PathBuf,
}

fn parse(line: &[u8]) -> Option<MountInfo> {
    let mut words = line.split(|byte| *byte == b' ');
    let id = std::str::from_utf8(words.next()?).ok()?.parse().ok()?;
    let device = words.nth(1)?.to_vec();
    Some(MountInfo { id, device, root: unescape(words.next()?), point: unescape(words.next()?) })
}

type Located = (Vec<u8>, PathBuf, Vec<Submount>);

/// File system, path in it, and submounts of a path that was opened on mount `id`.
fn locate(table: &[u8], id: u64, path: &Path) -> Option<Located> {
    let lines: Vec<MountInfo> = table.split(|byte| *byte == b'\n').filter_map(parse).collect();
    let own = lines.iter().find(|line| line.id == id)?;
    let inside = path.strip_prefix(&own.point).ok()?;
    // Joining an empty path would append a slash.
    let empty = inside.as_os_str().is_empty();
    let root = if empty { own.root.clone() } else { own.root.join(inside) };
    let mut below: Vec<Submount> = lines
        .iter()
        .filter_map(|line| {
            let point = line.point.strip_prefix(path).ok()?.to_owned();
            let (device, root) = (line.device.clone(), line.root.clone());
            (!point.as_os_str().is_empty()).then_some(Submount { point, device, root })
        })
        .collect();
    below.sort();
    Some((own.device.clone(), root, below))
}

/// Mount points below `source`, relative to it, at most `limit`; none for a file. Follows symlinks
/// in `source`. Blocks.
pub(crate) fn submounts(source: &Path, limit: usize) -> io::Result<Vec<String>> {
    let source = fs::canonicalize(source)?;
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(find(&table, &source, limit))
}

fn find(table: &[u8], source: &Path, limit: usize) -> Vec<String> {
    let mut found: Vec<String> = table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .filter_map(|point| {
            let below = unescape(point).strip_prefix(source).ok()?.to_str()?.to_owned();
            Some(below).filter(|path| !path.is_empty())
        })
        .collect();
    found.sort();
    found.dedup();
    found.truncate(limit);
    found
}

/// mountinfo escapes white space and backslashes as `\` and three octal digits.
fn unescape(word: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let [byte, tail @ ..] = rest {
        rest = tail;
        plain.push(match (byte, tail) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) => {
                rest = after;
                (a - b'0') << 6 | (b - b'0') << 3 | (c - b'0')
            }
            _ => *byte,
        });
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[u8] = b"22 1 8:1 / / rw - ext4 /dev/sda rw
30 22 0:5 / /data rw - tmpfs tmpfs rw
31 30 0:6 / /data/b\\040c rw - tmpfs tmpfs rw
32 31 0:7 / /data/b\\040c/d rw - tmpfs tmpfs rw
33 30 0:8 / /data/b\\040c rw - tmpfs tmpfs rw
34 22 0:9 / /database rw - tmpfs tmpfs rw
";

    #[test]
    fn submounts_are_listed_once_without_the_own_mount() {
        let below = |source: &str, limit| find(TABLE, Path::new(source), limit);
        assert_eq!(below("/data", 9), ["b c", "b c/d"]);
        assert_eq!(below("/data", 1), ["b c"]);
        assert!(below("/database", 9).is_empty());
    }

    #[test]
    fn a_location_does_not_depend_on_the_mount_that_leads_to_it() {
        let table = b"22 1 8:1 / / rw - ext4 /dev/sda rw
30 22 8:1 /data/vol/sub /pods/sub rw - ext4 /dev/sda rw
31 22 0:6 / /data/vol/sub/m rw - tmpfs none rw
";
        let at = |id, path: &str| locate(table, id, Path::new(path)).unwrap();
        let (device, root, below) = at(30, "/pods/sub/x");
        assert_eq!((&device[..], root, below.len()), (&b"8:1"[..], "/data/vol/sub/x".into(), 0));
        let (_, root, below) = at(22, "/data/vol");
        assert_eq!((root, below[0].point.clone()), ("/data/vol".into(), PathBuf::from("sub/m")));
        assert_eq!(at(30, "/pods/sub").1, PathBuf::from("/data/vol/sub"));
        assert_eq!(locate(table, 99, Path::new("/x")), None);
    }

    #[test]
    fn a_directory_has_a_path_from_an_outer_location() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join("a/b");
        fs::create_dir_all(&inner).unwrap();
        std::os::unix::fs::symlink("a", dir.path().join("link")).unwrap();
        let outer = Location::of(dir.path()).unwrap();
        let found = Location::of(&dir.path().join("link/b")).unwrap();
        assert_eq!(found, Location::of(&inner).unwrap());
        assert!(outer.overlaps(&found) && found.overlaps(&outer));
        assert_eq!(outer.path_to(&found), Some("a/b".into()));
        assert_eq!(found.path_to(&outer), None);
        assert_eq!(outer.path_to(&outer), Some(PathBuf::new()));
        // Another directory with that name.
        fs::rename(dir.path().join("a"), dir.path().join("c")).unwrap();
        fs::create_dir_all(&inner).unwrap();
        assert_eq!(outer.path_to(&found), None);
    }

    #[test]
    fn the_hosts_mountinfo_is_parsed() {
        assert!(submounts(Path::new("/"), 1000).unwrap().contains(&"proc".to_owned()));
    }
}
