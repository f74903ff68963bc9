//! The pod's leaf in the host's cgroup v2 tree; it has the VMM and the file server.
//!
//! Spec: Documentation/admin-guide/cgroup-v2.rst, "Basic Operations" and "Core Interface Files".

use std::fs::{self, File};
use std::io;
use std::path::{Component, Path, PathBuf};
use std::time::Duration;

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, statfs};

use super::ignore_not_found;
use crate::error::Error;
use crate::model::CpuLimits;

/// Default parent cgroup.
const DEFAULT_PARENT: &str = "nacelle";
/// cpu.max, microseconds: the kernel's default period, and the smallest quota that it accepts.
const DEFAULT_PERIOD: u64 = 100_000;
const MIN_QUOTA: u64 = 1000;
/// The kernel's default cpu.weight.
const DEFAULT_WEIGHT: u64 = 100;
/// Most entries searched for a lost leaf; containers may create any number of cgroups.
const MAX_SEARCHED: usize = 1 << 20;
/// The agent's cgroup below the leaf of a host pod (`agent/src/oci/cgroup.rs`).
const AGENT: &str = "agent";
/// Longest wait for the leaf to become empty after cgroup.kill.
const EMPTY_LIMIT: Duration = Duration::from_secs(10);

/// Mount point of cgroup v2: the configured or the host's.
pub(crate) fn find_root(configured: &Path) -> Result<PathBuf, Error> {
    let candidates = if configured.as_os_str().is_empty() {
        vec![PathBuf::from("/sys/fs/cgroup"), PathBuf::from("/sys/fs/cgroup/unified")]
    } else {
        vec![configured.to_owned()]
    };
    let is_v2 = |p: &PathBuf| statfs(p).is_ok_and(|s| s.filesystem_type() == CGROUP2_SUPER_MAGIC);
    candidates.iter().find(|p| is_v2(p)).cloned().ok_or_else(|| {
        Error::precondition(format!(
            "no cgroup v2 at {}: nacelle needs it; mount it (mount -t cgroup2 none /sys/fs/cgroup) \
             or boot with systemd.unified_cgroup_hierarchy=1",
            candidates.iter().map(|p| p.display().to_string()).collect::<Vec<_>>().join(" or ")
        ))
    })
}

/// Path of a pod's leaf.
///
/// `parent` is a path below the root, or the name of a systemd slice, which implies its path:
/// `a-b.slice` is in `a.slice` (systemd.slice(5)).
pub(crate) fn leaf(root: &Path, parent: &str, pod: &str) -> Result<PathBuf, Error> {
    let relative = match parent.trim_matches('/') {
        "" => PathBuf::from(DEFAULT_PARENT),
        name if !name.contains('/') && name.ends_with(".slice") => slice_path(name),
        path => PathBuf::from(path),
    };
    if !relative.components().all(|c| matches!(c, Component::Normal(_))) {
        return Err(Error::invalid(format!("invalid cgroup parent {parent:?}")));
    }
    Ok(root.join(relative).join(leaf_name(pod)))
}

/// All leaves of a pod in the tree; for a pod of which only the id is known. Blocks.
pub(crate) fn find_leaves(root: &Path, pod: &str) -> Vec<PathBuf> {
    let name = leaf_name(pod);
    let (mut directories, mut found) = (vec![root.to_owned()], Vec::new());
    let mut seen = 0;
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            seen += 1;
            if seen > MAX_SEARCHED {
                return found;
            }
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            // Do not search inside the leaf.
            match entry.file_name() == *name {
                true => found.push(entry.path()),
                false => directories.push(entry.path()),
            }
        }
    }
    found
}

/// Effective uids of the processes in a leaf (proc_pid_status(5)). Blocks.
pub(crate) fn uids(leaf: &Path) -> Vec<u32> {
    let procs = fs::read_to_string(leaf.join("cgroup.procs")).unwrap_or_default();
    let pids = procs.lines().filter_map(|line| line.parse::<u32>().ok());
    let uid = |pid| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
        let uids = status.lines().find_map(|line| line.strip_prefix("Uid:"))?;
        uids.split_whitespace().nth(1)?.parse().ok()
    };
    pids.filter_map(uid).collect()
}

fn leaf_name(pod: &str) -> String {
    format!("nacelle-{pod}")
}

/// Whether the caller's parent cgroup of a pod exists and has no limit in `file`, such as
/// memory.max. Blocks.
pub(crate) fn is_unlimited(root: &Path, parent: &str, file: &str) -> bool {
    if parent.trim_matches('/').is_empty() {
        return false;
    }
    let Ok(leaf) = leaf(root, parent, "") else { return false };
    let text = fs::read_to_string(leaf.with_file_name(file));
    text.is_ok_and(|text| text.split_whitespace().next() == Some("max"))
}

fn slice_path(name: &str) -> PathBuf {
    let stem = name.trim_end_matches(".slice");
    let mut path = PathBuf::new();
    for (at, _) in stem.match_indices('-').filter(|(at, _)| *at > 0) {
        path.push(format!("{}.slice", &stem[..at]));
    }
    path.join(name)
}

/// Ancestors of `leaf` that [`make`] will create, outermost first.
pub(crate) fn missing_parents(root: &Path, leaf: &Path) -> Vec<PathBuf> {
    let mut missing: Vec<PathBuf> = leaf
        .ancestors()
        .skip(1)
        .take_while(|p| *p != root && !p.exists())
        .map(Path::to_owned)
        .collect();
    missing.reverse();
    missing
}

/// Creates the leaf and opens it for CLONE_INTO_CGROUP.
pub(crate) fn make(leaf: &Path) -> io::Result<File> {
    fs::create_dir_all(leaf)?;
    File::open(leaf)
}

/// Sets the leaf's CPU limits, and resets those that are not given. Blocks.
pub(crate) fn limit_cpu(root: &Path, leaf: &Path, limits: CpuLimits) -> io::Result<()> {
    let is_set = limits != CpuLimits::default();
    if is_set {
        enable_controller(root, leaf, "cpu")?;
    }
    let CpuLimits { quota_us, period_us, shares } = limits;
    let quota = quota_us.map_or("max".to_owned(), |q| q.max(MIN_QUOTA).to_string());
    let period = period_us.unwrap_or(DEFAULT_PERIOD);
    for (file, text) in [
        ("cpu.max", format!("{quota} {period}")),
        ("cpu.weight", shares.map_or(DEFAULT_WEIGHT, weight).to_string()),
    ] {
        let path = leaf.join(file);
        if is_set || path.exists() {
            fs::write(&path, text)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        }
    }
    Ok(())
}

/// cgroup v1 shares to v2 weight, 2..=262144 to 1..=10000, as runc converts them.
fn weight(shares: u64) -> u64 {
    1 + (shares.clamp(2, 262_144) - 2) * 9999 / 262_142
}

/// Sets cpuset.cpus and cpuset.mems of the leaf (lists; empty: all that its parent has). Blocks.
///
/// If the controller cannot be enabled, the sets have no effect, which is logged; a list that the
/// kernel refuses is an error.
pub(crate) fn pin(root: &Path, leaf: &Path, cpus: &str, mems: &str) -> io::Result<()> {
    let is_set = !cpus.is_empty() || !mems.is_empty();
    if is_set && let Err(error) = enable_controller(root, leaf, "cpuset") {
        tracing::warn!(cgroup = %leaf.display(), %error, "cannot enable cpuset, using all CPUs");
        return Ok(());
    }
    for (file, list) in [("cpuset.cpus", cpus), ("cpuset.mems", mems)] {
        let path = leaf.join(file);
        let now = match fs::read_to_string(&path) {
            Ok(now) => now,
            Err(e) if e.kind() == io::ErrorKind::NotFound && !is_set => continue,
            Err(e) => return Err(e),
        };
        let now = now.trim();
        if now.is_empty() && list.is_empty() {
            continue;
        }
        // A set cannot be cleared while the cgroup has processes (ENOSPC).
        let all;
        let list = if list.is_empty() {
            let parent = leaf.parent().unwrap_or(root);
            all = fs::read_to_string(parent.join(format!("{file}.effective")))?;
            all.trim()
        } else {
            list
        };
        if now != list {
            fs::write(&path, list)
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))?;
        }
    }
    Ok(())
}

/// A kill of a pod's process by the OOM killer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OomKill {
    /// The cgroup that reached its memory.max (path from the root), and that limit, bytes. None:
    /// the host ran out of memory.
    pub(crate) limit: Option<(PathBuf, u64)>,
}

/// Enables the memory controller for the leaf, so that its OOM kills are counted there. If that
/// fails, the pod's parent counts. Blocks.
pub(crate) fn count_memory(root: &Path, leaf: &Path) {
    if let Err(error) = enable_controller(root, leaf, "memory") {
        tracing::debug!(cgroup = %leaf.display(), %error, "cannot enable the memory controller");
    }
}

/// Whether the OOM killer has killed a process of the leaf itself (memory.events.local) or of
/// [`AGENT`]: containers of a host pod have their own cgroups below. Blocks.
pub(crate) fn oom_kill(root: &Path, leaf: &Path) -> io::Result<Option<OomKill>> {
    let parent = leaf.parent().filter(|parent| *parent != root);
    let counting = [Some(leaf), parent].into_iter().flatten();
    let mut kills = None;
    for cgroup in counting {
        // A parent without a limit may have other pods too.
        if cgroup != leaf && memory_max(cgroup)?.is_none() {
            break;
        }
        if let Some(count) = local_event(cgroup, "oom_kill")? {
            kills = Some(count);
            break;
        }
    }
    let agent = local_event(&leaf.join(AGENT), "oom_kill")?.unwrap_or(0);
    if kills.unwrap_or(0) + agent == 0 {
        return Ok(None);
    }
    for cgroup in leaf.ancestors().take_while(|path| *path != root) {
        if let Some(limit) = memory_max(cgroup)?
            && local_event(cgroup, "oom")?.is_some_and(|count| count > 0)
        {
            let path = Path::new("/").join(cgroup.strip_prefix(root).unwrap_or(cgroup));
            return Ok(Some(OomKill { limit: Some((path, limit)) }));
        }
    }
    Ok(Some(OomKill { limit: None }))
}

/// memory.max; None: unlimited or no memory controller.
fn memory_max(cgroup: &Path) -> io::Result<Option<u64>> {
    Ok(read(&cgroup.join("memory.max"))?.and_then(|text| text.trim().parse().ok()))
}

/// A counter of memory.events.local; None: not counted there.
fn local_event(cgroup: &Path, event: &str) -> io::Result<Option<u64>> {
    let text = read(&cgroup.join("memory.events.local"))?;
    Ok(text.and_then(|text| {
        text.lines().find_map(|line| line.strip_prefix(event)?.strip_prefix(' ')?.parse().ok())
    }))
}

/// None if the file does not exist.
fn read(path: &Path) -> io::Result<Option<String>> {
    match fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(None),
        // The cgroup is being removed.
        Err(e) if e.raw_os_error() == Some(libc::ENODEV) => Ok(None),
        Err(e) => Err(io::Error::new(e.kind(), format!("{}: {e}", path.display()))),
    }
}

/// Enables a controller for the leaf: in subtree_control of every ancestor.
fn enable_controller(root: &Path, leaf: &Path, controller: &str) -> io::Result<()> {
    let mut ancestors: Vec<&Path> =
        leaf.ancestors().skip(1).take_while(|p| p.starts_with(root)).collect();
    ancestors.reverse();
    for directory in ancestors {
        let file = directory.join("cgroup.subtree_control");
        let has = fs::read_to_string(&file)?;
        if !has.split_whitespace().any(|c| c == controller) {
            fs::write(&file, format!("+{controller}"))
                .map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", file.display())))?;
        }
    }
    Ok(())
}

/// Kills the processes of the leaf except `stays`. Blocks.
pub(crate) fn kill_others(leaf: &Path, stays: Option<u32>) -> io::Result<()> {
    let procs = || fs::read_to_string(leaf.join("cgroup.procs"));
    for pid in procs()?.lines().filter_map(|line| line.parse().ok()) {
        if Some(pid) == stays {
            continue;
        }
        let Ok(pidfd) = super::process::pidfd_open(pid) else { continue };
        // Checked again with the pidfd open: it refers to a process of the leaf.
        if procs()?.lines().any(|line| line.parse() == Ok(pid)) {
            super::process::kill(pidfd)?;
        }
    }
    Ok(())
}

/// Kills all processes of the leaf and removes it, then those of `parents` that are empty.
pub(crate) async fn remove(leaf: &Path, parents: &[PathBuf]) -> io::Result<()> {
    let until = tokio::time::Instant::now() + EMPTY_LIMIT;
    loop {
        // cgroup.kill (Linux 5.14) kills the whole subtree, also processes that fork.
        ignore_not_found(fs::write(leaf.join("cgroup.kill"), "1"))?;
        match remove_below(leaf).and_then(|()| ignore_not_found(fs::remove_dir(leaf))) {
            Ok(()) => break,
            Err(e) if e.raw_os_error() == Some(libc::EBUSY) => {
                if tokio::time::Instant::now() > until {
                    return Err(e);
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            Err(e) => return Err(e),
        }
    }
    for parent in parents.iter().rev() {
        // Not empty: another pod uses it.
        if fs::remove_dir(parent).is_err() {
            break;
        }
    }
    Ok(())
}

/// Removes the cgroups below a host pod's leaf, deepest first. Not recursive, as containers choose
/// the depth.
fn remove_below(leaf: &Path) -> io::Result<()> {
    let mut found = vec![leaf.to_owned()];
    let mut next = 0;
    while let Some(directory) = found.get(next) {
        next += 1;
        let Ok(entries) = fs::read_dir(directory) else { continue };
        let directories =
            entries.flatten().filter(|e| e.file_type().is_ok_and(|kind| kind.is_dir()));
        found.extend(directories.map(|entry| entry.path()).collect::<Vec<_>>());
    }
    found.iter().skip(1).rev().try_for_each(|directory| ignore_not_found(fs::remove_dir(directory)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parents_in_cgroupfs_and_systemd_form_are_below_the_root() {
        let leaf_of = |parent| leaf(Path::new("/cg"), parent, "p").unwrap();
        assert_eq!(leaf_of(""), Path::new("/cg/nacelle/nacelle-p"));
        assert_eq!(leaf_of("/kubepods/podx"), Path::new("/cg/kubepods/podx/nacelle-p"));
        assert_eq!(
            leaf_of("kubepods-burstable-podx.slice"),
            Path::new(
                "/cg/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice/nacelle-p"
            )
        );
    }

    #[test]
    fn leaves_of_a_pod_are_found_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let leaf = dir.path().join("a.slice/b.slice/nacelle-p");
        fs::create_dir_all(leaf.join("nacelle-p")).unwrap();
        fs::create_dir(dir.path().join("nacelle-q")).unwrap();
        assert_eq!(find_leaves(dir.path(), "p"), std::slice::from_ref(&leaf));
        fs::write(leaf.join("cgroup.procs"), format!("{}\n", std::process::id())).unwrap();
        assert_eq!(uids(&leaf), [nix::unistd::geteuid().as_raw()]);
        assert!(uids(dir.path()).is_empty());
    }

    #[test]
    fn a_parent_cgroup_is_unlimited_without_a_limit() {
        let dir = tempfile::tempdir().unwrap();
        let pod = dir.path().join("kubepods/podx");
        fs::create_dir_all(&pod).unwrap();
        fs::write(pod.join("cpu.max"), "max 100000\n").unwrap();
        fs::write(pod.join("memory.max"), "1048576\n").unwrap();
        let unlimited = |parent, file| is_unlimited(dir.path(), parent, file);
        assert!(unlimited("/kubepods/podx", "cpu.max"));
        assert!(
            !unlimited("/kubepods/podx", "memory.max") && !unlimited("/kubepods/podx", "pids.max")
        );
        // The default parent is not the caller's cgroup.
        let ours = dir.path().join(DEFAULT_PARENT);
        fs::create_dir(&ours).unwrap();
        fs::write(ours.join("cpu.max"), "max 100000\n").unwrap();
        assert!(
            !unlimited("", "cpu.max") && !unlimited("/", "cpu.max") && !unlimited("/..", "cpu.max")
        );
    }

    #[test]
    fn a_parent_with_dot_dot_is_refused() {
        assert!(leaf(Path::new("/cg"), "/a/../../etc", "p").is_err());
    }

    #[test]
    fn shares_are_converted_to_weights_as_in_runc() {
        assert_eq!([2, 1024, 262_144, 0].map(weight), [1, 39, 10_000, 1]);
    }

    #[test]
    fn cpu_limits_are_set_and_reset() {
        let dir = tempfile::tempdir().unwrap();
        let leaf = dir.path().join("a/b");
        fs::create_dir_all(&leaf).unwrap();
        for directory in [dir.path(), &dir.path().join("a")] {
            fs::write(directory.join("cgroup.subtree_control"), "memory").unwrap();
        }
        limit_cpu(dir.path(), &leaf, CpuLimits::default()).unwrap();
        assert!(!leaf.join("cpu.max").exists());
        let half = CpuLimits { quota_us: Some(50_000), period_us: None, shares: Some(1024) };
        limit_cpu(dir.path(), &leaf, half).unwrap();
        let read = |file: &str| fs::read_to_string(leaf.join(file)).unwrap();
        assert_eq!((read("cpu.max"), read("cpu.weight")), ("50000 100000".into(), "39".into()));
        let handed = fs::read_to_string(dir.path().join("a/cgroup.subtree_control")).unwrap();
        assert_eq!(handed, "+cpu");
        limit_cpu(dir.path(), &leaf, CpuLimits::default()).unwrap();
        assert_eq!((read("cpu.max"), read("cpu.weight")), ("max 100000".into(), "100".into()));
    }

    #[test]
    fn a_cpuset_is_set_and_reset() {
        let dir = tempfile::tempdir().unwrap();
        let leaf = dir.path().join("leaf");
        fs::create_dir(&leaf).unwrap();
        // Without the controller both have no effect.
        pin(dir.path(), &leaf, "", "").unwrap();
        pin(dir.path(), &leaf, "1", "").unwrap();
        fs::write(dir.path().join("cgroup.subtree_control"), "cpuset").unwrap();
        for file in ["cpuset.cpus", "cpuset.mems"] {
            fs::write(leaf.join(file), "\n").unwrap();
            fs::write(dir.path().join(format!("{file}.effective")), "0-7\n").unwrap();
        }
        let read = |file: &str| fs::read_to_string(leaf.join(file)).unwrap();
        pin(dir.path(), &leaf, "3,5", "").unwrap();
        assert_eq!((read("cpuset.cpus").trim(), read("cpuset.mems").trim()), ("3,5", ""));
        pin(dir.path(), &leaf, "", "").unwrap();
        assert_eq!((read("cpuset.cpus").trim(), read("cpuset.mems").trim()), ("0-7", ""));
    }

    fn counts(cgroup: &Path, max: &str, oom: u64, oom_kill: u64) {
        fs::create_dir_all(cgroup).unwrap();
        fs::write(cgroup.join("memory.max"), format!("{max}\n")).unwrap();
        let events = format!("low 0\nhigh 0\nmax 9\noom {oom}\noom_kill {oom_kill}\n");
        fs::write(cgroup.join("memory.events.local"), events).unwrap();
    }

    #[test]
    fn an_oom_kill_is_found_with_the_limit_that_was_reached() {
        let dir = tempfile::tempdir().unwrap();
        let (root, pod) = (dir.path(), dir.path().join("kubepods/podx"));
        let leaf = pod.join("nacelle-p");
        let limit = |path: &str, bytes| Some(OomKill { limit: Some((path.into(), bytes)) });
        fs::create_dir_all(&leaf).unwrap();
        // No memory controller.
        assert_eq!(oom_kill(root, &leaf).unwrap(), None);
        // The kubelet's pod cgroup counts, without a limit.
        counts(&pod, "max", 0, 1);
        assert_eq!(oom_kill(root, &leaf).unwrap(), None, "the killed process may be another pod's");
        counts(&pod, "67108864", 1, 1);
        assert_eq!(oom_kill(root, &leaf).unwrap(), limit("/kubepods/podx", 64 << 20));
        // The leaf counts too; only its counters apply.
        counts(&leaf, "max", 0, 0);
        assert_eq!(oom_kill(root, &leaf).unwrap(), None);
        counts(&leaf, "max", 0, 1);
        assert_eq!(oom_kill(root, &leaf).unwrap(), limit("/kubepods/podx", 64 << 20));
        // The host ran out of memory.
        counts(&pod, "67108864", 0, 0);
        assert_eq!(oom_kill(root, &leaf).unwrap(), Some(OomKill { limit: None }));
        // A kill in a container of a host pod does not count.
        counts(&leaf, "max", 0, 0);
        counts(&leaf.join("container"), "4096", 1, 1);
        assert_eq!(oom_kill(root, &leaf).unwrap(), None);
        counts(&leaf.join(AGENT), "max", 0, 1);
        assert_eq!(oom_kill(root, &leaf).unwrap(), Some(OomKill { limit: None }));
    }

    #[test]
    fn a_path_without_cgroup_v2_is_refused_with_advice() {
        let error = find_root(Path::new("/proc")).unwrap_err().to_string();
        assert!(error.contains("cgroup v2") && error.contains("/proc"), "{error}");
    }
}
