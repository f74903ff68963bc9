//! Attributes of files, on the host and for the guest.
//!
//! The guest has one file system, so inode numbers must be unique over all shared file systems of
//! the host. The upper 16 bits are replaced by an index of the host's file system and of the
//! original bits. The first file system has index 0, so its numbers mostly do not change, which
//! 32-bit programs need.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use virtiofsd::fuse;

/// Bits of an inode number that are kept.
const KEPT: u32 = 48;
/// Index of all file systems over the limit: their inode numbers may collide.
/// Attack: a guest accesses more than 65,534 file systems, which the host would have to mount.
const OVERFLOW: u16 = u16::MAX;
/// Index of the tmpfs of the directory of shares, so that a shared file system gets index 0.
const OWN: u16 = u16::MAX - 1;

/// How far the kernel's clock of timestamps lags behind at most, nanoseconds: two ticks at HZ=100. Two
/// changes within it may have the same mtime.
const GRANULARITY: i128 = 20_000_000;
const GRANULARITY_SECONDS: i128 = 1_000_000_000;

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Time {
    pub(super) seconds: i64,
    pub(super) nanos: u32,
}

impl Time {
    pub(super) fn now() -> Self {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self { seconds: now.as_secs() as i64, nanos: now.subsec_nanos() }
    }
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Stat {
    pub(super) dev: u64,
    pub(super) ino: u64,
    pub(super) mode: u32,
    pub(super) nlink: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) rdev: u64,
    /// Bytes.
    pub(super) size: u64,
    /// Units of 512 bytes.
    pub(super) blocks: u64,
    pub(super) blksize: u32,
    pub(super) atime: Time,
    pub(super) mtime: Time,
    pub(super) ctime: Time,
    /// Birth time; not every file system has it.
    pub(super) btime: Option<Time>,
    /// Id of the mount through which the file was found.
    pub(super) mount: u64,
}

impl Stat {
    pub(super) fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }

    /// The attributes on which the validity of the guest's cached data depends.
    pub(super) fn version(&self) -> Version {
        Version { mtime: self.mtime, size: self.size }
    }
}

/// See [`Stat::version`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Version {
    mtime: Time,
    size: u64,
}

impl Version {
    /// Whether a change after `now` is another version: its mtime is not the present one.
    fn is_settled(&self, now: Time) -> bool {
        let nanos = |time: Time| i128::from(time.seconds) * 1_000_000_000 + i128::from(time.nanos);
        // File systems with whole seconds have even ones only (FAT).
        let step = if self.mtime.nanos == 0 { 2 * GRANULARITY_SECONDS } else { GRANULARITY };
        (nanos(now) - nanos(self.mtime)).abs() > step
    }
}

/// Which version of a file the guest knows, of which its cached pages are.
#[derive(Debug, Default)]
pub(super) struct SentVersion {
    version: Option<Version>,
    /// All pages of it were read when it could not change any more without a new mtime.
    settled: bool,
}

impl SentVersion {
    /// Attributes were sent. Those of another version make the guest drop its pages.
    pub(super) fn record(&mut self, version: Version, now: Time) {
        if self.version != Some(version) {
            *self = Self { version: Some(version), settled: version.is_settled(now) };
        }
    }

    /// At an open: whether the guest may keep its pages; if not, it is told to drop them.
    pub(super) fn keep(&mut self, version: Version, now: Time) -> bool {
        if self.version != Some(version) {
            return false;
        }
        let kept = self.settled;
        self.settled |= version.is_settled(now);
        kept
    }
}

/// The indices of file systems.
#[derive(Debug, Default)]
pub(super) struct InodeNumbers {
    indices: RwLock<HashMap<(u64, u16), u16>>,
}

impl InodeNumbers {
    /// Clears the table. `dev` is the file system of the directory of shares.
    pub(super) fn reset(&self, dev: u64) {
        let mut indices = self.indices.write().unwrap_or_else(PoisonError::into_inner);
        indices.clear();
        indices.insert((dev, 0), OWN);
    }

    /// The inode number in the guest.
    pub(super) fn number(&self, dev: u64, ino: u64) -> u64 {
        let class = (dev, (ino >> KEPT) as u16);
        let known =
            self.indices.read().unwrap_or_else(PoisonError::into_inner).get(&class).copied();
        let index = known.unwrap_or_else(|| {
            let mut indices = self.indices.write().unwrap_or_else(PoisonError::into_inner);
            // One entry is the directory of shares.
            let next = u16::try_from(indices.len().saturating_sub(1)).unwrap_or(OVERFLOW);
            if next >= OWN {
                return OVERFLOW;
            }
            *indices.entry(class).or_insert(next)
        });
        u64::from(index) << KEPT | ino & ((1 << KEPT) - 1)
    }

    pub(super) fn attributes(&self, stat: &Stat) -> fuse::Attr {
        fuse::Attr {
            ino: self.number(stat.dev, stat.ino),
            size: stat.size,
            blocks: stat.blocks,
            atime: stat.atime.seconds as u64,
            mtime: stat.mtime.seconds as u64,
            ctime: stat.ctime.seconds as u64,
            atimensec: stat.atime.nanos,
            mtimensec: stat.mtime.nanos,
            ctimensec: stat.ctime.nanos,
            mode: stat.mode,
            nlink: stat.nlink,
            uid: stat.uid.into(),
            gid: stat.gid.into(),
            // The low half is the kernel's own 32-bit encoding (new_encode_dev).
            rdev: stat.rdev as u32,
            blksize: stat.blksize,
            // No ATTR_SUBMOUNT: mounts of the host are part of the one file system.
            flags: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_first_file_system_keeps_its_numbers_and_no_two_files_have_the_same() {
        let numbers = InodeNumbers::default();
        numbers.reset(1);
        assert_eq!(numbers.number(7, 42), 42);
        assert_eq!(numbers.number(7, 42), 42);
        let high = 0xffff << KEPT;
        let files = [(1, 2), (7, 42), (8, 42), (8, 43), (7, 42 | high), (8, 42 | high), (9, 2)];
        let seen: HashSet<u64> =
            files.iter().map(|(dev, ino)| numbers.number(*dev, *ino)).collect();
        assert_eq!(seen.len(), files.len());
    }

    #[test]
    fn pages_are_kept_only_if_a_later_change_would_have_had_another_mtime() {
        let at = |millis: u32| Time {
            seconds: 100 + i64::from(millis / 1000),
            nanos: millis % 1000 * 1_000_000,
        };
        let version = |mtime, size| Version { mtime, size };
        // Attributes and pages were sent 5 ms after a change: another one may have the same mtime.
        let one = version(at(1), 3);
        let mut sent = SentVersion::default();
        sent.record(one, at(6));
        sent.record(one, at(900));
        assert!(!sent.keep(one, at(1000)), "pages may have been read before the second change");
        assert!(sent.keep(one, at(1001)), "they were dropped at the first open");
        assert!(!sent.keep(version(at(1), 4), at(1002)), "another size");
        assert!(!sent.keep(version(at(2), 3), at(1002)), "another mtime");
        // Sent long after the change.
        sent.record(version(at(2), 3), at(500));
        assert!(sent.keep(version(at(2), 3), at(501)));
        // An mtime that was set to the future is not that of a change.
        sent.record(version(at(90_000), 3), at(500));
        assert!(sent.keep(version(at(90_000), 3), at(501)));
        // Whole seconds.
        sent.record(version(at(1000), 3), at(2900));
        assert!(!sent.keep(version(at(1000), 3), at(2901)));
        assert!(!sent.keep(version(at(1000), 3), at(3001)));
        assert!(sent.keep(version(at(1000), 3), at(3002)));
    }

    #[test]
    fn file_systems_over_the_limit_share_the_last_index() {
        let numbers = InodeNumbers::default();
        numbers.reset(0);
        for dev in 1..=70_000 {
            numbers.number(dev, 1);
        }
        assert_eq!(numbers.number(70_000, 5), u64::from(OVERFLOW) << KEPT | 5);
        assert_eq!(numbers.number(1, 5), 5);
        assert_eq!(numbers.number(0, 5), u64::from(OWN) << KEPT | 5);
    }
}
