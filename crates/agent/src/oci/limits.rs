//! Converts OCI `LinuxResources` to cgroup v2 settings (runtime-spec config-linux.md, "Control
//! groups"; kernel Documentation/admin-guide/cgroup-v2.rst). Pure conversion.

use oci_spec::runtime::LinuxResources;

use crate::error::{Error, Result};

/// One write: file name in the cgroup and value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Setting {
    pub file: String,
    pub value: String,
}

/// Default CFS period, microseconds, for a quota without a period.
const DEFAULT_PERIOD_US: u64 = 100_000;
/// Controllers whose files `unified` may contain.
const UNIFIED: [&str; 7] = ["cpu", "cpuset", "io", "memory", "pids", "hugetlb", "misc"];

/// Converts cgroup v1 shares (2..=262144) to a cgroup v2 weight (1..=10000), with the formula of
/// runc.
pub fn weight_of_shares(shares: u64) -> u64 {
    let shares = shares.clamp(2, 262_144);
    1 + (shares - 2) * 9999 / 262_142
}

fn limit(value: i64) -> String {
    if value < 0 { "max".to_owned() } else { value.to_string() }
}

/// The settings, in write order.
pub fn settings(resources: &LinuxResources) -> Result<Vec<Setting>> {
    let mut out = Vec::new();
    let mut set = |file: &str, value: String| out.push(Setting { file: file.into(), value });
    if let Some(cpu) = resources.cpu() {
        if let Some(shares) = cpu.shares().filter(|shares| *shares != 0) {
            set("cpu.weight", weight_of_shares(shares).to_string());
        }
        let period = cpu.period().filter(|period| *period != 0);
        match (cpu.quota(), period) {
            (Some(quota), period) if quota > 0 => {
                set("cpu.max", format!("{quota} {}", period.unwrap_or(DEFAULT_PERIOD_US)));
            }
            (Some(quota), period) if quota < 0 => {
                set("cpu.max", format!("max {}", period.unwrap_or(DEFAULT_PERIOD_US)));
            }
            (_, Some(period)) => set("cpu.max", format!("max {period}")),
            _ => {}
        }
        if let Some(burst) = cpu.burst() {
            set("cpu.max.burst", burst.to_string());
        }
        if let Some(idle) = cpu.idle() {
            set("cpu.idle", idle.to_string());
        }
        if let Some(cpus) = cpu.cpus().as_ref().filter(|cpus| !cpus.is_empty()) {
            set("cpuset.cpus", cpus.clone());
        }
        if let Some(mems) = cpu.mems().as_ref().filter(|mems| !mems.is_empty()) {
            set("cpuset.mems", mems.clone());
        }
        if cpu.realtime_runtime().is_some_and(|n| n != 0)
            || cpu.realtime_period().is_some_and(|n| n != 0)
        {
            return Err(Error::invalid("resources.cpu", "cgroup v2 has no real-time limits"));
        }
    }
    if let Some(memory) = resources.memory() {
        if let Some(bytes) = memory.reservation().filter(|bytes| *bytes != 0) {
            set("memory.low", limit(bytes));
        }
        let max = memory.limit().filter(|bytes| *bytes != 0);
        if let Some(bytes) = max {
            set("memory.max", limit(bytes));
        }
        if let Some(both) = memory.swap().filter(|bytes| *bytes != 0) {
            // OCI's swap is memory plus swap; cgroup v2's is swap only.
            let swap = match (both, max) {
                (both, _) if both < 0 => -1,
                (both, Some(max)) if max >= 0 && both >= max => both - max,
                (both, _) => {
                    return Err(Error::invalid(
                        "resources.memory.swap",
                        format!(
                            "{both} includes memory, so it needs a memory limit that is not higher"
                        ),
                    ));
                }
            };
            set("memory.swap.max", limit(swap));
        }
    }
    if let Some(pids) = resources.pids()
        && pids.limit() != 0
    {
        set("pids.max", limit(pids.limit()));
    }
    if let Some(pages) = resources.hugepage_limits() {
        for page in pages {
            let size = page.page_size();
            if !size.chars().all(|c| c.is_ascii_alphanumeric()) {
                return Err(Error::invalid("resources.hugepageLimits", "bad page size"));
            }
            // With rsvd, exceeding the limit fails in mmap(2) instead of SIGBUS at the first write.
            for kind in ["max", "rsvd.max"] {
                set(&format!("hugetlb.{size}.{kind}"), page.limit().to_string());
            }
        }
    }
    if let Some(io) = resources.block_io()
        && let Some(weight) = io.weight().filter(|weight| *weight != 0)
    {
        // blkio weight 10..=1000 to io.weight 1..=10000, with the formula of runc.
        let weight = 1 + (u64::from(weight.clamp(10, 1000)) - 10) * 9999 / 990;
        set("io.weight", format!("default {weight}"));
    }
    if let Some(unified) = resources.unified() {
        let mut keys: Vec<_> = unified.iter().collect();
        keys.sort();
        for (key, value) in keys {
            let controller = key.split('.').next().unwrap_or_default();
            // The key is used as a file name.
            if key.contains('/') || !UNIFIED.contains(&controller) {
                return Err(Error::invalid(
                    "resources.unified",
                    format!("{key:?} is not a file of a cgroup v2 controller"),
                ));
            }
            set(key, value.clone());
        }
    }
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(json: &str) -> Result<Vec<String>> {
        let resources: LinuxResources = serde_json::from_str(json).unwrap();
        Ok(settings(&resources)?
            .into_iter()
            .map(|setting| format!("{}={}", setting.file, setting.value))
            .collect())
    }

    #[test]
    fn cpu_memory_and_pids_become_cgroup_v2_files() {
        let json = r#"{"cpu":{"shares":1024,"quota":50000,"period":100000},
            "memory":{"limit":1048576,"swap":3145728,"reservation":4096},"pids":{"limit":32}}"#;
        assert_eq!(
            of(json).unwrap(),
            [
                "cpu.weight=39",
                "cpu.max=50000 100000",
                "memory.low=4096",
                "memory.max=1048576",
                "memory.swap.max=2097152",
                "pids.max=32"
            ]
        );
    }

    #[test]
    fn zero_means_not_set_and_minus_one_means_no_limit() {
        let json = r#"{"cpu":{"shares":0,"quota":-1,"period":0},"memory":{"limit":-1,"swap":-1},
            "pids":{"limit":-1}}"#;
        assert_eq!(
            of(json).unwrap(),
            ["cpu.max=max 100000", "memory.max=max", "memory.swap.max=max", "pids.max=max"]
        );
        assert_eq!(of(r#"{"memory":{"limit":0}}"#).unwrap(), Vec::<String>::new());
    }

    #[test]
    fn shares_keep_their_order_as_weights() {
        assert_eq!(weight_of_shares(0), 1);
        assert_eq!(weight_of_shares(2), 1);
        assert_eq!(weight_of_shares(1024), 39);
        assert_eq!(weight_of_shares(u64::MAX), 10000);
    }

    #[test]
    fn a_unified_key_cannot_leave_the_cgroup() {
        assert!(of(r#"{"unified":{"memory.oom.group":"1"}}"#).is_ok());
        for key in ["../x", "memory/../../cgroup.procs", "cgroup.procs", ""] {
            assert!(of(&format!(r#"{{"unified":{{"{key}":"1"}}}}"#)).is_err(), "{key}");
        }
    }

    #[test]
    fn swap_below_the_memory_limit_is_refused() {
        assert!(of(r#"{"memory":{"limit":100,"swap":50}}"#).is_err());
        assert!(of(r#"{"memory":{"swap":50}}"#).is_err());
    }
}
