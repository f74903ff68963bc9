//! Keeps memory free for the agent and the kernel: memory.max of the cgroup of all containers is
//! the guest's memory less a reserve. Otherwise a container without a limit takes all of it, and the
//! agent and its helpers wait for reclaim and for the OOM killer with everything else.
//!
//! The guest's memory changes when memory is plugged and when huge pages are reserved. There is no
//! event for parts of a memory block, so each ping and each request that concerns memory compares.

use std::fs;
use std::sync::{Arc, Mutex, PoisonError};

use crate::oci::cgroup::Cgroup;

const MEMINFO: &str = "/proc/meminfo";
const MIB: u64 = 1 << 20;

/// What the containers must not use of `total` bytes.
fn reserved(total: u64) -> u64 {
    (total / 64).clamp(8 * MIB, 32 * MIB)
}

/// Memory of the guest without huge pages, bytes. None if the text is not that of proc_meminfo(5).
fn total(meminfo: &str) -> Option<u64> {
    let value = |name| -> Option<u64> {
        let kib = meminfo.lines().find_map(|line| line.strip_prefix(name))?;
        kib.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    };
    Some(value("MemTotal:")?.saturating_sub(value("Hugetlb:").unwrap_or(0)))
}

/// The limit for containers that use `current` bytes: it is never set below that, as the kernel would
/// kill processes to enforce it.
fn limit(total: u64, current: u64) -> u64 {
    total.saturating_sub(reserved(total)).max(current.saturating_add(MIB))
}

#[derive(Debug, Default)]
pub struct Reserve {
    /// The limit that was set last.
    last: Mutex<u64>,
}

impl Reserve {
    /// Sets the limit if the guest's memory has changed.
    pub fn update(self: &Arc<Self>, pod: &Cgroup) {
        let Some(total) = fs::read_to_string(MEMINFO).ok().and_then(|text| total(&text)) else {
            return;
        };
        // Locked while the limit is being changed.
        if self.last.try_lock().is_err() || *self.lock() == limit(total, 0) {
            return;
        }
        let (this, pod) = (Arc::clone(self), pod.clone());
        // Lowering it may reclaim pages that were used meanwhile.
        tokio::task::spawn_blocking(move || {
            let mut last = this.lock();
            let wanted = limit(total, pod.usage());
            if *last == wanted {
                return;
            }
            match pod.limit_memory(wanted) {
                Ok(()) => *last = wanted,
                Err(error) => tracing::warn!(error = %error.chain(), "no memory is reserved"),
            }
        });
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, u64> {
        self.last.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_pages_are_not_memory_of_the_containers() {
        let text = "MemTotal:        1048576 kB\nMemFree: 7 kB\nHugetlb:          524288 kB\n";
        assert_eq!(total(text), Some(512 * MIB));
        assert_eq!(total("MemTotal: 1024 kB\n"), Some(MIB));
        assert_eq!(total("MemFree: 7 kB\n"), None);
        assert_eq!(total("MemTotal: x kB\n"), None);
    }

    #[test]
    fn the_limit_leaves_a_reserve_and_kills_nothing_that_runs() {
        assert_eq!(limit(256 * MIB, 0), 248 * MIB);
        assert_eq!(limit(1024 * MIB, 100 * MIB), 1008 * MIB);
        assert_eq!(limit(65536 * MIB, 0), 65504 * MIB);
        assert_eq!(limit(256 * MIB, 252 * MIB), 253 * MIB);
        assert_eq!(limit(0, 0), MIB);
    }
}
