//! CPU hotplug: brings vCPUs online and offline through sysfs
//! (Documentation/core-api/cpu_hotplug.rst).

use std::fs;
use std::path::Path;

use crate::error::{Context, Error, Result};

const CPUS: &str = "/sys/devices/system/cpu";

/// Brings the first `wanted` CPUs online and the others offline; returns the number online, which
/// is lower if there are fewer. CPU 0 is always online.
pub fn resize(wanted: u32) -> Result<u32> {
    resize_in(Path::new(CPUS), wanted)
}

fn resize_in(dir: &Path, wanted: u32) -> Result<u32> {
    if wanted == 0 {
        return Err(Error::invalid("cpus", "a pod needs at least one CPU"));
    }
    let mut numbers: Vec<u32> = fs::read_dir(dir)
        .context(|| format!("list {}", dir.display()))?
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.strip_prefix("cpu")?.parse().ok())
        .collect();
    numbers.sort_unstable();
    let mut running = 0;
    for (index, number) in (0u32..).zip(numbers) {
        let file = dir.join(format!("cpu{number}/online"));
        // CPU 0 has no such file: it cannot be taken offline.
        let Ok(now) = fs::read_to_string(&file) else {
            running += 1;
            continue;
        };
        let want = index < wanted;
        if (now.trim() == "1") != want {
            fs::write(&file, if want { "1" } else { "0" }).context(|| {
                format!("set CPU {number} {}", if want { "online" } else { "offline" })
            })?;
        }
        running += u32::from(want);
    }
    Ok(running)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_cpus_are_online_and_the_rest_offline() {
        let dir = tempfile::tempdir().unwrap();
        for (cpu, online) in [("cpu0", None), ("cpu1", Some("1")), ("cpu2", Some("0"))] {
            fs::create_dir(dir.path().join(cpu)).unwrap();
            if let Some(online) = online {
                fs::write(dir.path().join(cpu).join("online"), online).unwrap();
            }
        }
        fs::create_dir(dir.path().join("cpufreq")).unwrap();
        let online = |cpu: &str| fs::read_to_string(dir.path().join(cpu).join("online")).unwrap();
        assert_eq!(resize_in(dir.path(), 3).unwrap(), 3);
        assert_eq!((online("cpu1"), online("cpu2")), ("1".into(), "1".into()));
        assert_eq!(resize_in(dir.path(), 1).unwrap(), 1);
        assert_eq!((online("cpu1"), online("cpu2")), ("0".into(), "0".into()));
        assert_eq!(resize_in(dir.path(), 9).unwrap(), 3);
        assert!(resize_in(dir.path(), 0).is_err());
    }
}
