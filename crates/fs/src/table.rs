//! The mount table of this namespace: /proc/self/mountinfo (proc_pid_mountinfo(5)), which can be
//! polled for changes.

use std::ffi::OsString;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;

use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::uio::pread;

/// Largest table, bytes. Attack: a pod makes its node mount very many file systems.
const TABLE_MAX: usize = 16 << 20;
/// Most reads of the table: it may change between the reads of its pages.
const ATTEMPTS: usize = 8;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Mount {
    pub(crate) id: u64,
    /// Id of the mount that it is mounted on.
    pub(crate) parent: u64,
    /// Device number of the file system (`major:minor`), and the directory of it that is mounted.
    pub(crate) device: Vec<u8>,
    pub(crate) root: PathBuf,
    /// Mount point without the leading `/`.
    pub(crate) point: PathBuf,
    /// It is a slave of a peer group: it receives mounts by propagation.
    pub(crate) slave: bool,
    /// Mounted read-only.
    pub(crate) read_only: bool,
}

impl Mount {
    /// Whether a file may be contained in both.
    pub(crate) fn overlaps(&self, other: &Self) -> bool {
        let nested = self.root.starts_with(&other.root) || other.root.starts_with(&self.root);
        self.device == other.device && nested
    }
}

/// The open mount table; it must be opened before /proc is unmounted.
#[derive(Debug)]
pub struct Table(File);

impl Table {
    pub(crate) fn open() -> std::io::Result<Self> {
        File::open("/proc/self/mountinfo").map(Self)
    }

    /// Reports POLLPRI when the table has changed since the last poll.
    pub(crate) fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    pub(crate) fn read(&self) -> nix::Result<Vec<Mount>> {
        let mut text = self.text()?;
        for _ in 1..ATTEMPTS {
            if !self.has_changed()? {
                break;
            }
            text = self.text()?;
        }
        Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
    }

    fn has_changed(&self) -> nix::Result<bool> {
        let mut fds = [PollFd::new(self.as_fd(), PollFlags::POLLPRI)];
        match poll(&mut fds, PollTimeout::ZERO) {
            Ok(count) => Ok(count > 0),
            Err(Errno::EINTR) => Ok(true),
            Err(e) => Err(e),
        }
    }

    fn text(&self) -> nix::Result<Vec<u8>> {
        let (mut text, mut piece) = (Vec::new(), vec![0; 64 << 10]);
        loop {
            let got = match pread(&self.0, &mut piece, text.len().try_into().unwrap_or(i64::MAX)) {
                Ok(0) => return Ok(text),
                Ok(got) => got,
                Err(Errno::EINTR) => continue,
                Err(e) => return Err(e),
            };
            text.extend_from_slice(&piece[..got]);
            if text.len() > TABLE_MAX {
                return Err(Errno::EFBIG);
            }
        }
    }
}

/// `id parent major:minor root point options [optional]* - type source options`
fn parse(line: &[u8]) -> Option<Mount> {
    let mut words = line.split(|byte| *byte == b' ');
    let mut number = || std::str::from_utf8(words.next()?).ok()?.parse().ok();
    let (id, parent) = (number()?, number()?);
    let device = words.next()?.to_vec();
    let (root, point) = (unescape(words.next()?), unescape(words.next()?));
    let point = point.strip_prefix("/").ok()?.to_owned();
    let read_only = words.next()?.split(|byte| *byte == b',').any(|option| option == b"ro");
    let slave = words.take_while(|word| *word != b"-").any(|word| word.starts_with(b"master:"));
    Some(Mount { id, parent, device, root, point, slave, read_only })
}

/// White space and backslashes are escaped as `\` and three octal digits.
fn unescape(word: &[u8]) -> PathBuf {
    let mut plain = Vec::with_capacity(word.len());
    let mut rest = word;
    while let Some((&byte, after)) = rest.split_first() {
        rest = after;
        plain.push(match (byte, after) {
            (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', tail @ ..]) => {
                rest = tail;
                (a - b'0') << 6 | (b - b'0') << 3 | (c - b'0')
            }
            _ => byte,
        });
    }
    PathBuf::from(OsString::from_vec(plain))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mountinfo_is_parsed_with_escaped_names_and_optional_fields() {
        let line =
            br"36 35 98:0 /a\040b /sources/x\134y\012z rw,noatime shared:1 master:7 - ext3 /dev rw";
        let mount = parse(line).unwrap();
        assert_eq!((mount.id, mount.parent, mount.slave), (36, 35, true));
        assert_eq!(mount.device, b"98:0");
        assert_eq!(mount.root, PathBuf::from("/a b"));
        assert_eq!(mount.point, PathBuf::from("sources/x\\y\nz"));
        assert!(!mount.read_only);
        assert!(!parse(b"1 2 0:1 / / rw - tmpfs master:1 rw").unwrap().slave);
        assert!(parse(b"1 2 0:1 / / noatime,ro - tmpfs none rw").unwrap().read_only);
        for bad in [&b""[..], b"1", b"x 2 0:1 / / rw - a b c", b"1 2 0:1 / nowhere rw - a b c"] {
            assert_eq!(parse(bad), None, "{bad:?}");
        }
    }

    #[test]
    fn mounts_of_a_directory_and_of_one_inside_it_overlap() {
        let at = |device: &str, root: &str| {
            parse(format!("1 2 {device} {root} /x rw - a b c").as_bytes()).unwrap()
        };
        assert!(at("8:1", "/d").overlaps(&at("8:1", "/d")));
        assert!(at("8:1", "/d").overlaps(&at("8:1", "/d/sub")));
        assert!(at("8:1", "/d/sub").overlaps(&at("8:1", "/")));
        assert!(!at("8:1", "/d").overlaps(&at("8:1", "/da")));
        assert!(!at("8:1", "/d").overlaps(&at("8:2", "/d")));
    }

    #[test]
    fn the_table_has_the_mounts_of_this_process() {
        let table = Table::open().unwrap();
        let mounts = table.read().unwrap();
        assert!(mounts.iter().any(|mount| mount.point.to_str() == Some("proc")));
    }
}
