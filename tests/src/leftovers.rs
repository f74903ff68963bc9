//! Lists of what pods create on the host, to compare before and after a story.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

/// Everything on the host that a pod may have created, by kind.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inventory(BTreeMap<&'static str, BTreeSet<String>>);

impl Inventory {
    /// Lists the host's resources, and a node's directories.
    pub fn take(root: &Path, state: &Path) -> Self {
        let mut kinds = BTreeMap::new();
        kinds.insert("process", processes());
        kinds.insert("mount", mounts());
        kinds.insert("network namespace", entries(Path::new("/run/netns")));
        kinds.insert("interface", entries(Path::new("/sys/class/net")));
        kinds.insert("cgroup", cgroups(Path::new("/sys/fs/cgroup")));
        kinds.insert("address lease", leases());
        kinds.insert("packet filter rule", rules());
        kinds.insert("loop device", loops(root));
        kinds.insert("pod folder", entries(&root.join("pods")));
        kinds.insert("pod socket folder", entries(&state.join("pods")));
        Self(kinds)
    }

    /// Items that are not in `before`; empty if nothing was left behind.
    pub fn since(&self, before: &Self) -> Vec<String> {
        let none = BTreeSet::new();
        let mut left = Vec::new();
        for (kind, now) in &self.0 {
            let then = before.0.get(kind).unwrap_or(&none);
            left.extend(now.difference(then).map(|item| format!("{kind} {item}")));
        }
        left
    }
}

fn entries(folder: &Path) -> BTreeSet<String> {
    std::fs::read_dir(folder)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect()
}

/// Running VMMs, file servers, agents and CNI plugins. Daemons are not listed: tests start them.
fn processes() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for pid in entries(Path::new("/proc")).into_iter().filter(|p| p.parse::<u32>().is_ok()) {
        let Ok(command) = std::fs::read(format!("/proc/{pid}/cmdline")) else { continue };
        let first = command.split(|&b| b == 0).next().unwrap_or_default();
        let name = String::from_utf8_lossy(first).into_owned();
        if ["nacelle-vmm", "nacelle-fs", "nacelle-agent"].iter().any(|ours| name.ends_with(ours))
            || name.contains("/cni/")
        {
            found.insert(format!("{pid} {name}"));
        }
    }
    found
}

/// Loop devices with a backing file of the node.
fn loops(root: &Path) -> BTreeSet<String> {
    let all = entries(Path::new("/sys/block")).into_iter();
    all.filter(|name| {
        let file = Path::new("/sys/block").join(name).join("loop/backing_file");
        std::fs::read_to_string(file).is_ok_and(|file| Path::new(&file).starts_with(root))
    })
    .collect()
}

fn mounts() -> BTreeSet<String> {
    std::fs::read_to_string("/proc/self/mountinfo")
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split(' ').nth(4).map(str::to_owned))
        .filter(|path| path.contains("netns/") || path.contains("/pods/"))
        .collect()
}

fn cgroups(folder: &Path) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for name in entries(folder) {
        let path = folder.join(&name);
        if path.is_dir() {
            if name.starts_with("nacelle-") {
                found.insert(path.display().to_string());
            }
            found.extend(cgroups(&path));
        }
    }
    found
}

/// Reservations of host-local: a file per address.
fn leases() -> BTreeSet<String> {
    let top = Path::new("/var/lib/cni/networks");
    entries(top)
        .into_iter()
        .flat_map(|network| {
            entries(&top.join(&network))
                .into_iter()
                .filter(|name| name.parse::<std::net::IpAddr>().is_ok())
                .map(move |address| format!("{network}/{address}"))
        })
        .collect()
}

fn rules() -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for tool in ["iptables-save", "ip6tables-save"] {
        let Ok(output) = std::process::Command::new(tool).args(["-t", "nat"]).output() else {
            continue;
        };
        let text = String::from_utf8_lossy(&output.stdout);
        // Chains and rules per pod; the plugins' shared chains stay and have no id of a pod.
        found.extend(
            text.lines()
                .filter(|line| {
                    line.contains("CNI-DN-") || line.contains("CNI-SN-") || line.contains("-s 10.")
                })
                .map(|line| format!("{tool}: {line}")),
        );
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_new_directories_are_reported() {
        let root = tempfile::tempdir().unwrap();
        let state = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(root.path().join("pods/old")).unwrap();
        let before = Inventory::take(root.path(), state.path());
        std::fs::create_dir_all(root.path().join("pods/new")).unwrap();
        let after = Inventory::take(root.path(), state.path());
        let left: Vec<_> =
            after.since(&before).into_iter().filter(|l| l.starts_with("pod folder")).collect();
        assert_eq!(left, ["pod folder new"]);
    }
}
