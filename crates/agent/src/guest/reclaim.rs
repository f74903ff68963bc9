//! Reclaims unused page cache of an idle pod, so that free page reporting can return it to the
//! host.
//!
//! A guest without memory pressure keeps every page it has read, and the host has to back them.
//! When the pod's containers have used almost no CPU time for some seconds, the agent writes the
//! amount of cold page cache to `memory.reclaim` of the root cgroup
//! (Documentation/admin-guide/cgroup-v2.rst); the kernel chooses the pages. The amount is the size
//! of the inactive file list. With the multi-generational LRU, pages read once count as active
//! (Documentation/admin-guide/mm/multigen_lru.rst: the two youngest generations), so there it is
//! the page cache that no process has mapped. `drop_caches` would also drop mapped pages of running
//! programs, dentries and inodes.
//!
//! There is no timer, which would wake an idle guest: each stats request of the host, every few
//! seconds, is a sample.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// CPU usage below which a pod is idle, percent of one CPU.
const IDLE_PERCENT: u128 = 2;
/// Time for which a pod must be idle.
const IDLE_TIME: Duration = Duration::from_secs(4);
/// Minimum interval between two samples.
const MIN_INTERVAL: Duration = Duration::from_secs(1);
/// Minimum amount of cold page cache to reclaim, bytes.
const MIN_RECLAIM: u64 = 4 << 20;
/// Maximum attempts for page cache that could not be freed; dirty pages need a second one.
const MAX_ATTEMPTS: u32 = 3;

const MEMINFO: &str = "/proc/meminfo";
/// A bit mask; 0 if multi-generational LRU is off.
const LRU_GEN: &str = "/sys/kernel/mm/lru_gen/enabled";
const RECLAIM: &str = "/sys/fs/cgroup/memory.reclaim";

/// Decides when to reclaim and does it.
#[derive(Debug)]
pub struct Reclaim {
    enabled: AtomicBool,
    idle: Mutex<Idle>,
    meminfo: PathBuf,
    lru_gen: PathBuf,
    file: PathBuf,
}

impl Default for Reclaim {
    fn default() -> Self {
        Self {
            enabled: AtomicBool::new(false),
            idle: Mutex::default(),
            meminfo: MEMINFO.into(),
            lru_gen: LRU_GEN.into(),
            file: RECLAIM.into(),
        }
    }
}

impl Reclaim {
    pub fn enable(&self, enabled: bool) {
        self.enabled.store(enabled, Ordering::Release);
    }

    /// Adds a sample: total CPU time of the pod's containers, nanoseconds. Starts a reclaim in the
    /// background if it is due.
    pub fn sample(self: &Arc<Self>, cpu_ns: u64) {
        if !self.enabled.load(Ordering::Acquire) || !self.is_due(Instant::now(), cpu_ns) {
            return;
        }
        let reclaim = Arc::clone(self);
        // May take seconds; nothing waits for it.
        tokio::task::spawn_blocking(move || reclaim.run());
    }

    fn is_due(&self, now: Instant, cpu_ns: u64) -> bool {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.sample(now, cpu_ns) && idle.begin(self.cold())
    }

    fn run(&self) {
        let before = self.cold();
        // EAGAIN: less than requested could be reclaimed.
        match fs::write(&self.file, before.to_string()) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::warn!(%error, "cannot reclaim page cache");
            }
            _ => {}
        }
        let left = self.cold();
        tracing::debug!(before, left, "reclaimed page cache of an idle pod");
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).end(left);
    }

    /// Amount of cold page cache, bytes.
    fn cold(&self) -> u64 {
        let text = fs::read_to_string(&self.meminfo).unwrap_or_default();
        let value = |name| bytes(&text, name);
        let mask = fs::read_to_string(&self.lru_gen).unwrap_or_default();
        let generations = mask.trim().trim_start_matches("0x").chars().any(|digit| digit != '0');
        if generations {
            (value("Inactive(file):") + value("Active(file):")).saturating_sub(value("Mapped:"))
        } else {
            value("Inactive(file):")
        }
    }
}

/// A value of `/proc/meminfo` in bytes; 0 if it is missing.
fn bytes(text: &str, name: &str) -> u64 {
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u32>().ok());
    u64::from(kib.unwrap_or(0)) * 1024
}

/// Idle state of the pod.
///
/// ```text
///  busy --idle for long enough, enough cold cache--> reclaiming --> reclaimed
///    ^------------------------ CPU time -----------------------------'
/// ```
#[derive(Debug, Default)]
struct Idle {
    /// Time and value of the last sample.
    last: Option<(Instant, u64)>,
    idle_time: Duration,
    reclaiming: bool,
    attempts: u32,
    /// Cold bytes left after the last attempt.
    left: u64,
}

impl Idle {
    /// Adds a sample; returns whether the pod is idle.
    fn sample(&mut self, now: Instant, cpu_ns: u64) -> bool {
        let Some((then, before)) = self.last else {
            self.last = Some((now, cpu_ns));
            return false;
        };
        let passed = now.saturating_duration_since(then);
        if passed < MIN_INTERVAL {
            return false;
        }
        self.last = Some((now, cpu_ns));
        let used = u128::from(cpu_ns.saturating_sub(before));
        if used * 100 > passed.as_nanos() * IDLE_PERCENT {
            self.idle_time = Duration::ZERO;
            self.attempts = 0;
            self.left = 0;
            return false;
        }
        self.idle_time = self.idle_time.saturating_add(passed);
        self.idle_time >= IDLE_TIME
    }

    /// Whether to reclaim with `cold` bytes of cold page cache; if true, the attempt has begun.
    fn begin(&mut self, cold: u64) -> bool {
        if self.reclaiming || cold < MIN_RECLAIM {
            return false;
        }
        // More cold cache than was left: new data, new attempts.
        if cold >= self.left.saturating_add(MIN_RECLAIM) {
            self.attempts = 0;
        }
        self.reclaiming = self.attempts < MAX_ATTEMPTS;
        self.reclaiming
    }

    fn end(&mut self, left: u64) {
        self.reclaiming = false;
        self.attempts += 1;
        self.left = left;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn a_pod_is_idle_when_it_has_used_no_cpu_for_some_seconds() {
        let (start, mut idle) = (Instant::now(), Idle::default());
        let second = Duration::from_secs(1);
        assert!(!idle.sample(start, 5_000_000_000), "nothing is known yet");
        assert!(!idle.sample(start + second / 2, 5_000_000_000), "too soon");
        assert!(!idle.sample(start + 5 * second, 9_000_000_000), "busy");
        assert!(!idle.sample(start + 8 * second, 9_050_000_000), "not for long enough");
        assert!(idle.sample(start + 13 * second, 9_149_000_000), "less than 2 %");
        assert!(idle.sample(start + 18 * second, 9_149_000_000));
        assert!(!idle.sample(start + 23 * second, 9_249_000_001), "busy again");
        assert!(!idle.sample(start + 24 * second, 9_249_000_001));
    }

    #[test]
    fn attempts_are_limited_until_there_is_new_cold_cache_or_cpu_use() {
        let mut idle = Idle::default();
        assert!(!idle.begin(MIN_RECLAIM - 1));
        assert!(idle.begin(100 * MIB));
        assert!(!idle.begin(100 * MIB), "it is being done");
        idle.end(60 * MIB);
        for left in [58 * MIB, 56 * MIB] {
            assert!(idle.begin(60 * MIB));
            idle.end(left);
        }
        assert!(!idle.begin(56 * MIB), "given up");
        assert!(idle.begin(56 * MIB + MIN_RECLAIM), "there is more");
        idle.end(0);
        let now = Instant::now();
        idle.sample(now, 0);
        (idle.attempts, idle.left) = (MAX_ATTEMPTS, 100 * MIB);
        idle.sample(now + MIN_INTERVAL, 1_000_000_000);
        assert!(idle.begin(MIN_RECLAIM), "the pod has worked since");
    }

    #[test]
    fn the_amount_to_reclaim_is_the_cold_page_cache() {
        let dir = tempfile::tempdir().unwrap();
        let (meminfo, file) = (dir.path().join("meminfo"), dir.path().join("memory.reclaim"));
        let text = "MemTotal:       2045080 kB\nActive(file):      20480 kB\n\
                    Inactive(file):     8192 kB\nMapped:            12288 kB\n";
        fs::write(&meminfo, text).unwrap();
        let lru_gen = dir.path().join("enabled");
        let reclaim =
            Reclaim { meminfo, lru_gen: lru_gen.clone(), file: file.clone(), ..Reclaim::default() };
        let now = Instant::now();
        assert!(!reclaim.is_due(now, 0));
        assert!(reclaim.is_due(now + 5 * MIN_INTERVAL, 0));
        reclaim.run();
        let requested = || fs::read_to_string(&file).unwrap().parse::<u64>().unwrap();
        assert_eq!(requested(), 8 * MIB);
        fs::write(&lru_gen, "0x0000\n").unwrap();
        reclaim.run();
        assert_eq!(requested(), 8 * MIB, "two lists");
        fs::write(&lru_gen, "0x0007\n").unwrap();
        reclaim.run();
        assert_eq!(requested(), 16 * MIB, "what is not mapped");
        assert_eq!(bytes("", "Mapped:"), 0);
    }
}
