//! Huge pages of the guest: sizes the kernel's pool to the sum of the containers' limits
//! (Documentation/admin-guide/mm/hugetlbpage.rst), and mounts hugetlbfs volumes (emptyDir with
//! medium `HugePages`).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use nix::mount::{MsFlags, mount};
use oci_spec::runtime::LinuxResources;

use super::shm::is_mount_point;
use crate::error::{Context, Error, Result};

/// Page size in the names of the hugetlb controller's files.
const SIZE: &str = "2MB";
const BYTES: u64 = 2 << 20;
const MEMINFO: &str = "/proc/meminfo";
const POOL: &str = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages";

/// Pages reserved by container. Requests are serialized, as the kernel fulfils one as far as it
/// can.
#[derive(Debug)]
pub struct HugePages {
    /// Lock order: before the agent's state.
    pages: Mutex<BTreeMap<String, u64>>,
    pool: PathBuf,
}

impl Default for HugePages {
    fn default() -> Self {
        Self { pages: Mutex::default(), pool: POOL.into() }
    }
}

impl HugePages {
    /// Grows or shrinks the pool for the limit in `resources`, if it has one. Fails, with the pool
    /// unchanged, if there is not enough contiguous free memory. Reservations of containers for
    /// which `ended` is true are dropped. Blocks while the kernel compacts memory.
    pub fn reserve(
        &self,
        container: &str,
        resources: &LinuxResources,
        ended: impl Fn(&str) -> bool,
    ) -> Result<()> {
        let Some(bytes) = limit(resources) else { return Ok(()) };
        let wanted = bytes / BYTES;
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        pages.retain(|other, _| !ended(other));
        let before = pages.get(container).copied().unwrap_or(0);
        if wanted == before {
            return Ok(());
        }
        let total = pages.values().sum::<u64>();
        let all = (total - before).saturating_add(wanted);
        // Checked first: the kernel would reclaim all memory before it fails.
        let mut got = self.count()?.saturating_add(available()?);
        if got >= all {
            got = self.fill(all)?;
        }
        if got < all {
            self.fill(total)?;
            return Err(Error::Precondition(format!(
                "the pod's containers need {} MiB of huge pages, but the VM has room for {} MiB; \
                 give the pod more memory",
                all.saturating_mul(BYTES >> 20),
                got.saturating_mul(BYTES >> 20)
            )));
        }
        pages.insert(container.to_owned(), wanted);
        Ok(())
    }

    /// Drops a container's reservation; pages still in use are freed later.
    pub fn release(&self, container: &str) {
        let mut pages = self.pages.lock().unwrap_or_else(PoisonError::into_inner);
        if pages.remove(container).is_none_or(|pages| pages == 0) {
            return;
        }
        if let Err(error) = self.fill(pages.values().sum()) {
            tracing::error!(container, error = %error.chain(), "cannot shrink the huge page pool");
        }
    }

    /// Sets the pool size and returns the resulting one, in pages.
    fn fill(&self, pages: u64) -> Result<u64> {
        let what = || format!("set the pool to {pages} huge pages");
        fs::write(&self.pool, pages.to_string()).context(what)?;
        self.count()
    }

    fn count(&self) -> Result<u64> {
        let what = || format!("read {}", self.pool.display());
        let text = fs::read_to_string(&self.pool).context(what)?;
        text.trim().parse().map_err(std::io::Error::other).context(what)
    }
}

/// Memory available without swapping (proc_meminfo(5)), in huge pages.
fn available() -> Result<u64> {
    let text = fs::read_to_string(MEMINFO).context(|| format!("read {MEMINFO}"))?;
    let kib = text
        .lines()
        .find_map(|line| line.strip_prefix("MemAvailable:")?.trim().strip_suffix("kB"))
        .and_then(|kib| kib.trim().parse::<u64>().ok());
    let kib = kib.ok_or_else(|| Error::Precondition(format!("{MEMINFO} has no MemAvailable")))?;
    Ok(kib * 1024 / BYTES)
}

fn limit(resources: &LinuxResources) -> Option<u64> {
    let limits = resources.hugepage_limits().as_ref()?;
    let limit = limits.iter().find(|limit| limit.page_size() == SIZE)?;
    u64::try_from(limit.limit()).ok()
}

/// Whether a container with `resources` needs huge pages.
pub fn are_wanted(resources: &LinuxResources) -> bool {
    limit(resources).is_some_and(|bytes| bytes > 0)
}

/// Mounts a hugetlbfs volume below `base`, once for all its containers. Mode 0777, as kubelet's
/// directory has.
pub fn volume(base: &Path, id: &str) -> Result<PathBuf> {
    crate::ids::check("volumes.volume_id", id)?;
    let path = base.join(id);
    let what = || format!("mount huge pages for volume {id:?}");
    fs::create_dir_all(&path).context(what)?;
    if !is_mount_point(&path) {
        let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
        let data = Some("pagesize=2M,mode=0777");
        mount(Some("hugetlbfs"), &path, Some("hugetlbfs"), flags, data).context(what)?;
    }
    Ok(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(bytes: i64) -> LinuxResources {
        let json = format!(r#"{{"hugepageLimits":[{{"pageSize":"2MB","limit":{bytes}}}]}}"#);
        serde_json::from_str(&json).unwrap()
    }

    fn living(_: &str) -> bool {
        false
    }

    #[test]
    fn the_pool_has_the_sum_of_the_containers_limits() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "0").unwrap();
        let pages = HugePages { pages: Mutex::default(), pool: file.path().to_owned() };
        let pool = || fs::read_to_string(file.path()).unwrap();
        pages.reserve("none", &LinuxResources::default(), living).unwrap();
        pages.reserve("zero", &of(0), living).unwrap();
        assert_eq!(pool(), "0");
        assert!(!are_wanted(&of(0)) && !are_wanted(&LinuxResources::default()));
        assert!(are_wanted(&of(5 << 20)));
        pages.reserve("a", &of(8 << 20), living).unwrap();
        pages.reserve("b", &of(5 << 20), living).unwrap();
        assert_eq!(pool(), "6");
        pages.reserve("a", &of(4 << 20), living).unwrap();
        assert_eq!(pool(), "4");
        pages.release("a");
        pages.release("a");
        assert_eq!(pool(), "2");
        pages.reserve("again", &of(4 << 20), |other| other == "b").unwrap();
        assert_eq!(pool(), "2");
    }

    #[test]
    fn a_request_beyond_the_memory_is_refused_before_the_kernel_tries() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), "0").unwrap();
        let pages = HugePages { pages: Mutex::default(), pool: file.path().to_owned() };
        pages.reserve("a", &of(4 << 20), living).unwrap();
        let error = pages.reserve("b", &of(i64::MAX), living).unwrap_err().to_string();
        assert!(error.contains("more memory"), "{error}");
        assert_eq!(fs::read_to_string(file.path()).unwrap(), "2");
        assert_eq!(pages.pages.lock().unwrap().keys().collect::<Vec<_>>(), ["a"]);
    }
}
