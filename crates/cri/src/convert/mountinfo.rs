//! The mount of the host that contains a path, and its propagation: /proc/self/mountinfo
//! (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

#[derive(Debug, PartialEq, Eq)]
pub struct Mount {
    pub point: PathBuf,
    /// The directory of its file system that is mounted.
    pub root: PathBuf,
    /// Mounts made below it are seen by its peers.
    pub shared: bool,
    /// It sees mounts that its master gets.
    pub slave: bool,
}

/// The mount that `path`, absolute and without links, lies on.
pub fn of(path: &Path) -> io::Result<Option<Mount>> {
    std::fs::read("/proc/self/mountinfo").map(|text| find(&text, path))
}

fn find(text: &[u8], path: &Path) -> Option<Mount> {
    let mounts = text.split(|byte| *byte == b'\n').filter_map(parse);
    // Of several mounts at one place the last one is on top.
    mounts
        .filter(|mount| path.starts_with(&mount.point))
        .max_by_key(|mount| mount.point.components().count())
}

/// `id parent major:minor root point options [optional]* - type source options`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let (root, point) = (unescape(words.nth(3)?), unescape(words.next()?));
    let optional: Vec<&[u8]> = words.skip(1).take_while(|word| *word != b"-").collect();
    let has = |tag: &[u8]| optional.iter().any(|word| word.starts_with(tag));
    Some(Mount { point, root, shared: has(b"shared:"), slave: has(b"master:") })
}

/// White space and backslashes are written as `\` and three octal digits.
fn unescape(word: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        let octal = match (byte, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                rest = tail;
                Some((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'))
            }
            _ => None,
        };
        plain.push(octal.unwrap_or(byte));
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &[u8] = b"22 1 8:1 / / rw - ext4 /dev/sda rw
30 22 0:5 / /a rw,relatime shared:7 master:2 - tmpfs tmpfs rw
31 30 0:6 / /a/b\\040c rw - tmpfs tmpfs rw
32 30 0:7 / /a/b\\040c rw master:3 propagate_from:2 - tmpfs tmpfs rw
";

    #[test]
    fn a_path_lies_on_the_topmost_mount_above_it() {
        let at = |path: &str| find(TEXT, Path::new(path)).unwrap();
        let mount = |point: &str, shared, slave| Mount {
            point: point.into(),
            root: "/".into(),
            shared,
            slave,
        };
        assert_eq!(at("/etc"), mount("/", false, false));
        assert_eq!(at("/a/x"), mount("/a", true, true));
        assert_eq!(at("/ab"), mount("/", false, false));
        assert_eq!(at("/a/b c/d"), mount("/a/b c", false, true));
    }

    #[test]
    fn the_hosts_mountinfo_is_parsed() {
        assert!(of(Path::new("/proc/self")).unwrap().unwrap().point.starts_with("/proc"));
    }

    #[test]
    fn malformed_lines_are_ignored() {
        assert_eq!(find(b"a b\n\n1 2 3\n", Path::new("/x")), None);
    }
}
