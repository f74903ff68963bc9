//! What the host has mounted below a folder: /proc/self/mountinfo (proc_pid_mountinfo(5)).

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};
use std::{fs, io};

/// Folders with mounts below `source`, relative to it, at most `limit`; nothing for a file. Links
/// in `source` are followed. Blocks.
pub(crate) fn below(source: &Path, limit: usize) -> io::Result<Vec<String>> {
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

/// White space and backslashes are written as `\` and three octal digits.
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
    fn mounts_below_a_folder_are_named_once_and_its_own_is_not() {
        let below = |source: &str, limit| find(TABLE, Path::new(source), limit);
        assert_eq!(below("/data", 9), ["b c", "b c/d"]);
        assert_eq!(below("/data", 1), ["b c"]);
        assert!(below("/database", 9).is_empty());
    }

    #[test]
    fn the_hosts_own_table_is_understood() {
        assert!(below(Path::new("/"), 1000).unwrap().contains(&"proc".to_owned()));
    }
}
