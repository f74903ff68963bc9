//! cgroup v2 of the pod and of its containers: `<mount>/<pod>/<container>`. Creates and removes
//! them, sets limits, reads counters.

use std::fs;
use std::io;
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::v1;
use nix::errno::Errno;
use oci_spec::runtime::LinuxResources;

use super::limits;
use crate::error::{Context, Error, Result};

/// Mount point of cgroup v2; the only one that libcontainer supports.
pub const MOUNT: &str = "/sys/fs/cgroup";
/// Cgroup of the agent of a pod without a VM, beside its containers.
const AGENT: &str = "agent";
/// Controllers that containers need; other controllers of a host are not changed.
const CONTAINER_CONTROLLERS: [&str; 6] = ["cpu", "cpuset", "memory", "io", "pids", "hugetlb"];
/// Maximum devices in the statistics; a pod has a few dozen disks.
const MAX_DEVICES: usize = 256;
/// Time for killed processes to leave a cgroup before it is removed.
const REMOVE_DEADLINE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone)]
pub struct Cgroup {
    /// Absolute, relative to the mount, as in `linux.cgroupsPath`.
    path: PathBuf,
}

fn write(path: &Path, value: &str) -> Result<()> {
    fs::write(path, value).context(|| format!("write {value:?} to {}", path.display()))
}

/// Enables all available controllers for the children of `dir`, one by one: one that cannot be
/// enabled must not prevent the others.
pub fn enable_controllers(dir: &Path) {
    enable_matching(dir, |_| true);
}

fn enable_matching(dir: &Path, wanted: impl Fn(&str) -> bool) {
    let read = |file| fs::read_to_string(dir.join(file)).unwrap_or_default();
    let (available, enabled) = (read("cgroup.controllers"), read("cgroup.subtree_control"));
    let missing = available
        .split_whitespace()
        .filter(|name| wanted(name) && !enabled.split_whitespace().any(|known| known == *name));
    for controller in missing {
        let file = dir.join("cgroup.subtree_control");
        if let Err(error) = fs::write(&file, format!("+{controller}")) {
            tracing::warn!(controller, %error, "controller is not available to containers");
        }
    }
}

impl Cgroup {
    /// Creates the pod's cgroup if it does not exist.
    pub fn pod(name: &str) -> Result<Self> {
        let cgroup = Self { path: Path::new("/").join(name) };
        enable_controllers(Path::new(MOUNT));
        fs::create_dir_all(cgroup.dir()).context(|| format!("create cgroup {name}"))?;
        enable_controllers(&cgroup.dir());
        Ok(cgroup)
    }

    /// Uses the cgroup in which the launcher started the agent of a pod without a VM. The agent
    /// moves to a child, as a cgroup with controllers enabled for children may not hold processes
    /// (cgroup-v2.rst, "No Internal Process Constraint").
    pub fn host_pod(name: &str) -> Result<Self> {
        let cgroup = Self { path: Path::new("/").join(name) };
        let own = cgroup.create(AGENT)?;
        write(&own.dir().join("cgroup.procs"), "0")?;
        let dir = cgroup.dir();
        let mut all: Vec<&Path> =
            dir.ancestors().take_while(|path| path.starts_with(MOUNT)).collect();
        all.reverse();
        for dir in all {
            enable_matching(dir, |controller| CONTAINER_CONTROLLERS.contains(&controller));
        }
        Ok(cgroup)
    }

    /// Creates the cgroup of a container.
    pub fn create(&self, container: &str) -> Result<Self> {
        let cgroup = Self { path: self.path.join(container) };
        fs::create_dir(cgroup.dir())
            .context(|| format!("create cgroup of container {container}"))?;
        Ok(cgroup)
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn dir(&self) -> PathBuf {
        Path::new(MOUNT).join(self.path.strip_prefix("/").unwrap_or(&self.path))
    }

    pub fn apply(&self, resources: &LinuxResources) -> Result<()> {
        for setting in limits::settings(resources)? {
            let path = self.dir().join(&setting.file);
            let result = write(&path, &setting.value);
            // Without swap in the guest there is nothing to limit.
            let no_swap = setting.file == "memory.swap.max" && !path.exists();
            // Without huge pages in the kernel a limit of 0 always holds.
            let no_pages = setting.file.starts_with("hugetlb.") && setting.value == "0";
            if no_swap || no_pages && !path.exists() {
                continue;
            }
            if let Err(error) = result {
                return Err(if path.exists() {
                    error
                } else {
                    Error::invalid(
                        "resources",
                        format!("the kernel does not support {}", setting.file),
                    )
                });
            }
        }
        Ok(())
    }

    fn read(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.dir().join(file)).ok()
    }

    /// Value of a key in a flat keyed file.
    fn keyed(&self, file: &str, key: &str) -> Option<u64> {
        value_of(&self.read(file)?, key)
    }

    /// Number of processes killed by the OOM killer.
    pub fn oom_kills(&self) -> u64 {
        self.keyed("memory.events", "oom_kill").unwrap_or(0)
    }

    /// Kills all processes, including those of sub-cgroups.
    pub fn kill(&self) -> Result<()> {
        match fs::write(self.dir().join("cgroup.kill"), "1") {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error).context(|| format!("kill cgroup {}", self.path.display())),
        }
    }

    /// Starts to freeze or thaw all processes, including those of sub-cgroups. Succeeds if the cgroup
    /// does not exist any more.
    pub fn set_frozen(&self, frozen: bool) -> Result<()> {
        match fs::write(self.dir().join("cgroup.freeze"), if frozen { "1" } else { "0" }) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(error).context(|| format!("freeze or thaw cgroup {}", self.path.display()))
            }
            _ => Ok(()),
        }
    }

    /// Whether processes are to be frozen, or are: a process that joins the cgroup would be.
    pub fn is_freezing(&self) -> bool {
        let wanted = self.read("cgroup.freeze").is_some_and(|text| text.trim() == "1");
        wanted || self.is_frozen()
    }

    /// Whether all processes are frozen.
    pub fn is_frozen(&self) -> bool {
        self.keyed("cgroup.events", "frozen").is_some_and(|frozen| frozen != 0)
    }

    /// All processes, including those of sub-cgroups.
    pub fn processes(&self) -> Vec<i32> {
        self.processes_up_to(usize::MAX)
    }

    /// At most `limit` processes from at most `limit` sub-cgroups: a container chooses both
    /// numbers.
    pub fn processes_up_to(&self, limit: usize) -> Vec<i32> {
        let mut pids = Vec::new();
        let mut dirs = vec![self.dir()];
        let mut seen: usize = 0;
        while let Some(dir) = dirs.pop() {
            let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
            pids.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
            seen += 1;
            if pids.len() >= limit || seen >= limit {
                pids.truncate(limit);
                break;
            }
            dirs.extend(children(&dir));
        }
        pids
    }

    pub fn is_populated(&self) -> bool {
        self.keyed("cgroup.events", "populated").is_some_and(|populated| populated != 0)
    }

    /// Kills all processes and removes the cgroup with its children.
    pub async fn remove(&self) -> Result<()> {
        let deadline = tokio::time::Instant::now() + REMOVE_DEADLINE;
        let mut pause = Duration::from_millis(1);
        loop {
            self.kill()?;
            match remove_tree(&self.dir()) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    let busy = error.raw_os_error() == Some(Errno::EBUSY as i32);
                    if !busy || tokio::time::Instant::now() > deadline {
                        return Err(error)
                            .context(|| format!("remove cgroup {}", self.path.display()));
                    }
                }
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(Duration::from_millis(100));
        }
    }

    pub fn cpu(&self) -> v1::Cpu {
        let text = self.read("cpu.stat").unwrap_or_default();
        let microseconds = |key| value_of(&text, key).unwrap_or(0).saturating_mul(1000);
        v1::Cpu {
            usage_ns: microseconds("usage_usec"),
            throttled_ns: microseconds("throttled_usec"),
            periods: value_of(&text, "nr_periods").unwrap_or(0),
            throttled_periods: value_of(&text, "nr_throttled").unwrap_or(0),
            user_ns: microseconds("user_usec"),
            system_ns: microseconds("system_usec"),
            pressure: self.pressure("cpu.pressure"),
        }
    }

    pub fn memory(&self) -> v1::Memory {
        let stat = self.read("memory.stat").unwrap_or_default();
        let of = |key| value_of(&stat, key).unwrap_or(0);
        let events = self.read("memory.events").unwrap_or_default();
        let usage = self.number("memory.current").unwrap_or(0);
        let working_set = usage.saturating_sub(of("inactive_file"));
        v1::Memory {
            usage,
            working_set,
            // "max" does not parse: without a limit the field is 0.
            available: self.number("memory.max").map_or(0, |max| max.saturating_sub(working_set)),
            rss: of("anon"),
            page_faults: of("pgfault"),
            major_page_faults: of("pgmajfault"),
            cache: of("file"),
            mapped_file: of("file_mapped"),
            swap: self.number("memory.swap.current").unwrap_or(0),
            kernel: of("kernel"),
            limit: self.number("memory.max").unwrap_or(0),
            failures: value_of(&events, "max").unwrap_or(0),
            peak: self.number("memory.peak").unwrap_or(0),
            total_active_file: of("active_file"),
            total_inactive_file: of("inactive_file"),
            pressure: self.pressure("memory.pressure"),
        }
    }

    pub fn pids(&self) -> u64 {
        self.number("pids.current").unwrap_or_else(|| self.processes().len() as u64)
    }

    /// None if the kernel has no PSI.
    pub fn pressure(&self, file: &str) -> Option<v1::Pressure> {
        let text = self.read(file)?;
        let total = |kind: &str| {
            let line = text.lines().find(|line| line.starts_with(kind))?;
            line.rsplit_once("total=")?.1.trim().parse().ok()
        };
        Some(v1::Pressure { some_us: total("some")?, full_us: total("full").unwrap_or(0) })
    }

    /// Makes the user namespace's root the owner of the files that a manager of sub-cgroups writes
    /// (cgroup-v2.rst, "Model of Delegation").
    pub fn delegate(&self, (uid, gid): (u32, u32)) -> Result<()> {
        let dir = self.dir();
        let what = || format!("delegate cgroup {}", self.path.display());
        chown(&dir, Some(uid), Some(gid)).context(what)?;
        for file in ["cgroup.procs", "cgroup.subtree_control", "cgroup.threads"] {
            chown(dir.join(file), Some(uid), Some(gid)).context(what)?;
        }
        Ok(())
    }

    /// memory.current; 0 without the memory controller.
    pub fn usage(&self) -> u64 {
        self.number("memory.current").unwrap_or(0)
    }

    /// Sets memory.max, bytes.
    pub fn limit_memory(&self, bytes: u64) -> Result<()> {
        write(&self.dir().join("memory.max"), &bytes.to_string())
    }

    /// pids.max; 0 if unlimited.
    pub fn pids_max(&self) -> u64 {
        self.number("pids.max").unwrap_or(0)
    }

    pub fn block_io(&self) -> Vec<v1::BlockIo> {
        block_io(&self.read("io.stat").unwrap_or_default())
    }

    fn number(&self, file: &str) -> Option<u64> {
        self.read(file)?.trim().parse().ok()
    }
}

fn value_of(text: &str, key: &str) -> Option<u64> {
    text.lines().find_map(|line| {
        let (name, value) = line.split_once(' ')?;
        if name == key { value.trim().parse().ok() } else { None }
    })
}

/// Parses `io.stat`: one line `254:0 rbytes=1 wbytes=2 rios=3 wios=4 ...` for each device.
fn block_io(text: &str) -> Vec<v1::BlockIo> {
    text.lines()
        .filter_map(|line| {
            let mut words = line.split(' ');
            let (major, minor) = words.next()?.split_once(':')?;
            let mut io = v1::BlockIo {
                major: major.parse().ok()?,
                minor: minor.parse().ok()?,
                ..Default::default()
            };
            for (key, value) in words.filter_map(|word| word.split_once('=')) {
                let value = value.parse().unwrap_or(0);
                match key {
                    "rbytes" => io.read_bytes = value,
                    "wbytes" => io.written_bytes = value,
                    "rios" => io.reads = value,
                    "wios" => io.writes = value,
                    _ => {}
                }
            }
            Some(io)
        })
        .take(MAX_DEVICES)
        .collect()
}

fn children(dir: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
        .collect()
}

/// Removes a cgroup and its children, deepest first. Not recursive, as the container chooses the
/// depth.
fn remove_tree(dir: &Path) -> io::Result<()> {
    let mut order = vec![dir.to_owned()];
    let mut next = 0;
    while next < order.len() {
        let below = children(&order[next]);
        order.extend(below);
        next += 1;
    }
    for dir in order.iter().rev() {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_io_is_read_by_device() {
        let text = "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=0 dios=0\n7:0\ngarbage\n";
        let all = block_io(text);
        assert_eq!(all.len(), 2);
        assert_eq!((all[0].major, all[0].read_bytes, all[0].written_bytes), (254, 4096, 8192));
        assert_eq!((all[0].reads, all[0].writes, all[1].major), (1, 2, 7));
    }

    #[test]
    fn values_are_found_by_their_whole_key() {
        let text = "oom 3\noom_kill 2\noom_group_kill 0\n";
        assert_eq!(value_of(text, "oom_kill"), Some(2));
        assert_eq!(value_of(text, "oom"), Some(3));
        assert_eq!(value_of(text, "kill"), None);
    }
}
