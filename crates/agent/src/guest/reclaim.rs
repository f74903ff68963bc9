//! Page cache that an idle pod does not use is freed, so that free page reporting can give it back to
//! the host.
//!
//! A guest that is not short of memory keeps every page it has ever read, and its host has to hold
//! them. So when the pod's containers have used next to no CPU time for some seconds, the kernel is
//! asked to reclaim what is cold (`memory.reclaim` of the root cgroup,
//! Documentation/admin-guide/cgroup-v2.rst), and chooses the pages itself. Cold is as much as the list
//! of inactive file pages holds. A kernel with the multi-generational LRU counts pages as active that
//! were read once (Documentation/admin-guide/mm/multigen_lru.rst: the youngest two generations, and
//! there are always two), so there it is as much as no process has mapped. `drop_caches` would take
//! the pages of running programs too, with every dentry and inode, and the pod would read them again.
//!
//! No timer runs for this, as an idle guest is not to be woken: the host asks for statistics every few
//! seconds anyway, and each such request is a sample.

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Of one CPU's time: what a pod uses that does nothing but wait.
const IDLE_PERCENT: u128 = 2;
/// A pod that has been idle for so long is taken to stay so.
const QUIET: Duration = Duration::from_secs(4);
/// Samples that follow each other sooner say nothing.
const SHORTEST: Duration = Duration::from_secs(1);
/// Bytes of cold page cache that are not worth the work.
const LITTLE: u64 = 4 << 20;
/// Times that page cache which could not be freed is tried again: dirty pages are written first.
const TRIES: u32 = 3;

const MEMINFO: &str = "/proc/meminfo";
/// A bit mask; 0: the kernel has two lists.
const LRU_GEN: &str = "/sys/kernel/mm/lru_gen/enabled";
const RECLAIM: &str = "/sys/fs/cgroup/memory.reclaim";

/// Decides when, and has the kernel do it.
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

    /// Takes a sample: CPU time that the pod's containers have used in all. Starts to reclaim, in the
    /// background, if it is time for that.
    pub fn sample(self: &Arc<Self>, cpu_ns: u64) {
        if !self.enabled.load(Ordering::Acquire) || !self.is_due(Instant::now(), cpu_ns) {
            return;
        }
        let reclaim = Arc::clone(self);
        // It may take seconds. Nothing waits for it.
        tokio::task::spawn_blocking(move || reclaim.run());
    }

    fn is_due(&self, now: Instant, cpu_ns: u64) -> bool {
        let mut idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        idle.sample(now, cpu_ns) && idle.begin(self.cold())
    }

    fn run(&self) {
        let before = self.cold();
        // EAGAIN: it was not that much.
        match fs::write(&self.file, before.to_string()) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                tracing::warn!(%error, "page cache of an idle pod is kept");
            }
            _ => {}
        }
        let left = self.cold();
        tracing::debug!(before, left, "page cache of an idle pod");
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).end(left);
    }

    /// Bytes of file pages that are cold.
    fn cold(&self) -> u64 {
        let text = fs::read_to_string(&self.meminfo).unwrap_or_default();
        let of = |name| bytes(&text, name);
        let mask = fs::read_to_string(&self.lru_gen).unwrap_or_default();
        let generations = mask.trim().trim_start_matches("0x").chars().any(|digit| digit != '0');
        if generations {
            (of("Inactive(file):") + of("Active(file):")).saturating_sub(of("Mapped:"))
        } else {
            of("Inactive(file):")
        }
    }
}

/// A number of `/proc/meminfo`; 0 where it is missing.
fn bytes(text: &str, name: &str) -> u64 {
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u32>().ok());
    u64::from(kib.unwrap_or(0)) * 1024
}

/// How long the pod has been idle, and what was done about it since.
///
/// ```text
///  busy --quiet for long enough, much cold cache--> reclaiming --> reclaimed
///    ^------------------------ CPU time -----------------------------'
/// ```
#[derive(Debug, Default)]
struct Idle {
    /// When the last sample was taken, and what it was.
    last: Option<(Instant, u64)>,
    quiet: Duration,
    reclaiming: bool,
    tries: u32,
    /// Cold bytes that the last try could not free.
    left: u64,
}

impl Idle {
    /// Whether the pod is idle.
    fn sample(&mut self, now: Instant, cpu_ns: u64) -> bool {
        let Some((then, before)) = self.last else {
            self.last = Some((now, cpu_ns));
            return false;
        };
        let passed = now.saturating_duration_since(then);
        if passed < SHORTEST {
            return false;
        }
        self.last = Some((now, cpu_ns));
        let used = u128::from(cpu_ns.saturating_sub(before));
        if used * 100 > passed.as_nanos() * IDLE_PERCENT {
            self.quiet = Duration::ZERO;
            self.tries = 0;
            self.left = 0;
            return false;
        }
        self.quiet = self.quiet.saturating_add(passed);
        self.quiet >= QUIET
    }

    /// Whether to reclaim, with `cold` bytes that could be freed; it has begun then.
    fn begin(&mut self, cold: u64) -> bool {
        if self.reclaiming || cold < LITTLE {
            return false;
        }
        // An idle pod that reads a little now and then fills its memory as well.
        if cold >= self.left.saturating_add(LITTLE) {
            self.tries = 0;
        }
        self.reclaiming = self.tries < TRIES;
        self.reclaiming
    }

    fn end(&mut self, left: u64) {
        self.reclaiming = false;
        self.tries += 1;
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
    fn what_cannot_be_freed_is_tried_some_times_and_what_comes_anew_again() {
        let mut idle = Idle::default();
        assert!(!idle.begin(LITTLE - 1));
        assert!(idle.begin(100 * MIB));
        assert!(!idle.begin(100 * MIB), "it is being done");
        idle.end(60 * MIB);
        for left in [58 * MIB, 56 * MIB] {
            assert!(idle.begin(60 * MIB));
            idle.end(left);
        }
        assert!(!idle.begin(56 * MIB), "given up");
        assert!(idle.begin(56 * MIB + LITTLE), "there is more");
        idle.end(0);
        let now = Instant::now();
        idle.sample(now, 0);
        (idle.tries, idle.left) = (TRIES, 100 * MIB);
        idle.sample(now + SHORTEST, 1_000_000_000);
        assert!(idle.begin(LITTLE), "the pod has worked since");
    }

    #[test]
    fn the_kernel_is_asked_for_what_is_cold() {
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
        assert!(reclaim.is_due(now + 5 * SHORTEST, 0));
        reclaim.run();
        let asked = || fs::read_to_string(&file).unwrap().parse::<u64>().unwrap();
        assert_eq!(asked(), 8 * MIB);
        fs::write(&lru_gen, "0x0000\n").unwrap();
        reclaim.run();
        assert_eq!(asked(), 8 * MIB, "two lists");
        fs::write(&lru_gen, "0x0007\n").unwrap();
        reclaim.run();
        assert_eq!(asked(), 16 * MIB, "what is not mapped");
        assert_eq!(bytes("", "Mapped:"), 0);
    }
}
