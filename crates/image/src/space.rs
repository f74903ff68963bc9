//! The free space of the store's file system, of which a part is reserved for the node.

use std::io;
use std::os::fd::AsFd;

/// Bytes written between two checks of the free space.
pub const SPACE_CHECK_INTERVAL: u64 = 64 << 20;
/// Upper bound of [`Space`]'s reserve in bytes.
const MAX_RESERVE: u64 = 1 << 30;

/// Free space of a file system.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Space {
    free: u64,
    /// 2 % of the file system, at most 1 GiB, which neither images nor downloads may use: the
    /// node's other components need it.
    reserve: u64,
}

impl Space {
    /// Of the file system that contains this file.
    pub fn of(file: impl AsFd) -> io::Result<Self> {
        let stat = nix::sys::statvfs::fstatvfs(file)?;
        let total = stat.blocks() as u64 * stat.fragment_size() as u64;
        let free = stat.blocks_available() as u64 * stat.fragment_size() as u64;
        Ok(Self::new(total, free))
    }

    fn new(total: u64, free: u64) -> Self {
        // Some file systems report no block count.
        let free = if total == 0 { u64::MAX } else { free };
        Self { free, reserve: (total / 50).min(MAX_RESERVE) }
    }

    /// Fails unless `needed` bytes fit without using the reserve.
    pub fn check(self, needed: u64) -> io::Result<()> {
        let Self { free, reserve } = self;
        if free >= reserve.saturating_add(needed) {
            return Ok(());
        }
        let message = match needed {
            0 => format!("{free} bytes are free, {reserve} are reserved for the node"),
            _ => format!(
                "{needed} bytes are needed, {free} are free, of which {reserve} are reserved for \
                 the node"
            ),
        };
        Err(io::Error::new(io::ErrorKind::StorageFull, message))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reserve_is_kept_for_the_node() {
        for (total, reserve) in [(100 << 20, 2 << 20), (1 << 40, MAX_RESERVE)] {
            let space = Space::new(total, reserve + 10);
            space.check(0).unwrap();
            space.check(10).unwrap();
            let error = space.check(11).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::StorageFull);
            let message = format!("11 bytes are needed, {} are free", reserve + 10);
            assert!(error.to_string().starts_with(&message), "{error}");
            Space::new(total, reserve - 1).check(0).unwrap_err();
            space.check(u64::MAX).unwrap_err();
        }
        Space::new(0, 0).check(1 << 40).unwrap();
    }

    #[test]
    fn the_free_space_of_a_real_file_system_is_read() {
        let file = tempfile::tempfile().unwrap();
        assert!(Space::of(&file).unwrap().free > 0);
    }
}
