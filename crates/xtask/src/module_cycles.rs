//! The files of a crate must not use each other in a cycle: a reader could not understand one without the
//! others. `module_uses.rs` says what counts as a use. A parent and its child count as well: a type that
//! both need has a file of its own, below both.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use crate::module_uses::{self, Uses};

/// The uses that still close a cycle, from file to file below `crates`. This list only becomes shorter:
/// one that closes no cycle any more is an error.
const REMAINING: &[(&str, &str)] = &[
    ("agent/src/agent.rs", "agent/src/containers/mod.rs"),
    ("sandbox/src/registry.rs", "sandbox/src/pod/handle.rs"),
    ("shim/src/create.rs", "shim/src/pod.rs"),
    ("shim/src/pod.rs", "shim/src/sandbox_state.rs"),
    ("shim/src/settings.rs", "shim/src/paths.rs"),
    ("virtio/src/blk/backend.rs", "virtio/src/blk/direct.rs"),
    ("virtio/src/blk/backend.rs", "virtio/src/blk/ring.rs"),
    ("virtio/src/device.rs", "virtio/src/queue.rs"),
    ("virtio/src/mem/mod.rs", "virtio/src/mem/engine.rs"),
    ("virtio/src/mem/mod.rs", "virtio/src/mem/state.rs"),
    ("virtio/src/net/engine.rs", "virtio/src/net/mod.rs"),
    ("virtio/src/worker/event_loop.rs", "virtio/src/worker.rs"),
    ("xtask/src/package/mod.rs", "xtask/src/package/deb.rs"),
    ("xtask/src/package/mod.rs", "xtask/src/package/rpm.rs"),
];

pub(crate) fn check(repo: &Path, broken: &mut Vec<String>) -> Result<()> {
    let crates = repo.join("crates");
    let mut uses = Uses::new();
    for entry in fs::read_dir(&crates).with_context(|| crates.display().to_string())? {
        for root in roots(&entry?.path().join("src"))? {
            let root = root.strip_prefix(&crates)?;
            let read = |file: &Path| fs::read_to_string(crates.join(file)).ok();
            uses.append(&mut module_uses::of_crate(root, &read)?);
        }
    }
    broken.append(&mut violations(&uses, REMAINING));
    Ok(())
}

/// The root files of a package's library and binaries.
fn roots(src: &Path) -> Result<Vec<PathBuf>> {
    let mut roots = vec![src.join("lib.rs"), src.join("main.rs")];
    if let Ok(entries) = fs::read_dir(src.join("bin")) {
        for entry in entries {
            roots.push(entry?.path());
        }
    }
    roots.retain(|root| root.is_file());
    Ok(roots)
}

fn violations(uses: &Uses, remaining: &[(&str, &str)]) -> Vec<String> {
    let mut found = Vec::new();
    let edges: BTreeSet<(&Path, &Path)> =
        uses.keys().map(|(from, to)| (from.as_path(), to.as_path())).collect();
    let listed: BTreeSet<(&Path, &Path)> =
        remaining.iter().map(|(from, to)| (Path::new(*from), Path::new(*to))).collect();
    for (from, to) in &listed {
        if !edges.contains(&(from, to)) || !reachable(&edges, to).contains(from) {
            found.push(format!(
                "crates/xtask/src/module_cycles.rs: {} -> {} closes no cycle: take it off the list",
                from.display(),
                to.display()
            ));
        }
    }
    for cycle in cycles(&edges.difference(&listed).copied().collect()) {
        let inside = uses.iter().filter(|((from, to), _)| {
            cycle.contains(from.as_path()) && cycle.contains(to.as_path())
        });
        let mut text = String::new();
        for ((from, to), name) in inside {
            text += &format!("\n  crates/{} uses {} ({name})", from.display(), to.display());
        }
        found.push(format!("{} files use each other in a cycle:{text}", cycle.len()));
    }
    found
}

/// Each greatest set of files of which every one reaches every other one.
fn cycles<'a>(edges: &BTreeSet<(&'a Path, &'a Path)>) -> BTreeSet<BTreeSet<&'a Path>> {
    let files: BTreeSet<&Path> = edges.iter().map(|(from, _)| *from).collect();
    let reach: BTreeMap<&Path, BTreeSet<&Path>> =
        files.iter().map(|file| (*file, reachable(edges, file))).collect();
    let reaches = |from: &Path, to: &Path| reach.get(from).is_some_and(|all| all.contains(to));
    let in_cycle = files.iter().filter(|file| reaches(file, file));
    in_cycle
        .map(|file| reach[file].iter().filter(|other| reaches(other, file)).copied().collect())
        .collect()
}

/// All that `from` uses, directly or through others.
fn reachable<'a>(edges: &BTreeSet<(&'a Path, &'a Path)>, from: &'a Path) -> BTreeSet<&'a Path> {
    let mut seen = BTreeSet::new();
    let mut open = vec![from];
    while let Some(file) = open.pop() {
        let of_file = edges.range((file, Path::new(""))..).take_while(|(user, _)| *user == file);
        for (_, to) in of_file {
            if seen.insert(*to) {
                open.push(to);
            }
        }
    }
    seen
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(edges: &[(&str, &str)]) -> Uses {
        edges.iter().map(|(from, to)| ((from.into(), to.into()), "X".to_owned())).collect()
    }

    #[test]
    fn layers_are_fine() {
        let uses = uses(&[("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")]);
        assert_eq!(violations(&uses, &[]), Vec::<String>::new());
    }

    #[test]
    fn a_cycle_is_reported_once_with_all_of_its_uses() {
        let uses = uses(&[("a", "b"), ("b", "c"), ("c", "a"), ("a", "d"), ("e", "f"), ("f", "e")]);
        assert_eq!(
            violations(&uses, &[]),
            [
                "3 files use each other in a cycle:\
                 \n  crates/a uses b (X)\n  crates/b uses c (X)\n  crates/c uses a (X)",
                "2 files use each other in a cycle:\n  crates/e uses f (X)\n  crates/f uses e (X)",
            ]
        );
    }

    #[test]
    fn a_listed_use_may_close_a_cycle_and_no_other_one() {
        let two = uses(&[("a", "b"), ("b", "a")]);
        assert_eq!(violations(&two, &[("b", "a")]), Vec::<String>::new());
        let three = uses(&[("a", "b"), ("b", "a"), ("b", "c"), ("c", "a")]);
        assert_eq!(violations(&three, &[("b", "a")]).len(), 1);
    }

    #[test]
    fn a_listed_use_that_closes_no_cycle_is_an_error() {
        for uses in [uses(&[("a", "b")]), uses(&[("b", "a")])] {
            let found = violations(&uses, &[("b", "a")]);
            assert_eq!(
                found,
                ["crates/xtask/src/module_cycles.rs: b -> a closes no cycle: take it off the list"]
            );
        }
    }

    #[test]
    fn the_repository_has_no_other_cycles() {
        let mut broken = Vec::new();
        check(&crate::paths::repo(), &mut broken).unwrap();
        assert_eq!(broken, Vec::<String>::new());
    }
}
