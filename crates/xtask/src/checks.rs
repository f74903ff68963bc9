//! Rules of the repository that the compiler and clippy do not know. Each says why it is there;
//! `cargo xtask check` prints every violation with its file and fails if there is one.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::{messages, module_cycles, paths, run};

/// Lines; longer files know too much.
const FILE_LIMIT: usize = 800;

/// What a crate must never depend on, directly or through others, and why.
const WALLS: &[(&str, &[&str], &str)] = &[
    (
        "agent-api",
        &["kvm-ioctls", "kvm-bindings", "cri"],
        "the guest protocol knows neither KVM nor CRI",
    ),
    (
        "vmm-api",
        &["kvm-ioctls", "tokio", "tonic", "sandbox"],
        "the control protocol is shared by threads and tasks alike",
    ),
    (
        "pci",
        &["kvm-ioctls", "kvm-bindings", "virtio", "tokio"],
        "a bus does not know what sits on it or what runs it",
    ),
    (
        "virtio",
        &["kvm-ioctls", "kvm-bindings", "machine", "tokio"],
        "devices run on any hypervisor, and on threads",
    ),
    ("machine", &["virtio", "pci", "tokio"], "the machine does not know virtio"),
    (
        "vmm",
        &["tokio", "tonic", "sandbox", "image", "network", "cri", "agent-api"],
        "the VMM knows no pods, and runs on threads and epoll",
    ),
    (
        "fs",
        &["kvm-ioctls", "tokio", "sandbox", "agent-api"],
        "the file server knows neither VMs nor pods",
    ),
    ("agent", &["kvm-ioctls", "cri", "sandbox", "machine"], "the guest knows neither KVM nor CRI"),
    (
        "sandbox",
        &["cri", "network", "image", "machine", "virtio", "kvm-ioctls", "prometheus-client"],
        "the life cycle meets CRI, CNI and images through ports",
    ),
    (
        "network",
        &["sandbox", "vmm-api", "agent-api", "cri", "prometheus-client"],
        "the network knows no VMs",
    ),
    (
        "shim",
        &["cri", "image", "streaming", "nacelle", "kvm-ioctls"],
        "a shim is a pod of containerd and nothing else",
    ),
    (
        "image",
        &["sandbox", "network", "cri", "vmm-api", "agent-api", "prometheus-client"],
        "images know no sandboxes",
    ),
    ("cri", &["prometheus-client"], "crates report to observers; only nacelle keeps metrics"),
    (
        "streaming",
        &["sandbox", "network", "image", "cri", "vmm-api", "agent-api", "tonic"],
        "streaming carries bytes of processes that it does not know",
    ),
];

/// Crates that must not be linked at all.
const BANNED: &[(&str, &str)] = &[
    ("openssl-sys", "rustls is the TLS stack: static, memory-safe"),
    ("aws-lc-sys", "rustls with ring: no C build with cmake"),
    ("native-tls", "rustls is the TLS stack"),
];

/// Licences that an Apache-2.0 work can be linked with, by SPDX name.
const LICENCES: &[&str] = &[
    "Apache-2.0",
    "MIT",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "ISC",
    "Zlib",
    "0BSD",
    "Unlicense",
    "CC0-1.0",
    "Unicode-3.0",
    "MPL-2.0",
    "BSL-1.0",
    "CDLA-Permissive-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT-0",
    // libseccomp's bindings; the library itself is LGPL and linked from Debian's archive.
    "LGPL-2.1-only",
    "LGPL-2.1-or-later",
];

/// Crates with a licence file of the above and an empty field.
const UNNAMED_LICENCES: &[&str] = &["rust-criu"];

pub(crate) fn run() -> Result<i32> {
    let mut broken = Vec::new();
    let repo = paths::repo();
    files(&repo, &mut broken)?;
    crates(&mut broken)?;
    messages::check(&repo, &mut broken)?;
    module_cycles::check(&repo, &mut broken)?;
    deny(&repo, &mut broken)?;
    for violation in &broken {
        eprintln!("{violation}");
    }
    match broken.len() {
        0 => Ok(0),
        count => {
            eprintln!("{count} rules broken");
            Ok(1)
        }
    }
}

fn files(repo: &Path, broken: &mut Vec<String>) -> Result<()> {
    // Split, so that this file does not name them itself.
    let markers =
        [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("X", "XX"), concat!("HA", "CK")];
    let list = run::output(
        Command::new("git").args(["ls-files", "-co", "--exclude-standard"]).current_dir(repo),
    )?;
    for name in list.lines() {
        let Ok(text) = fs::read_to_string(repo.join(name)) else { continue };
        let source = name.ends_with(".rs") || name.ends_with(".proto") || name.ends_with(".sh");
        if !source {
            continue;
        }
        let count = text.lines().count();
        if count > FILE_LIMIT {
            broken.push(format!("{name}: {count} lines; the limit is {FILE_LIMIT}"));
        }
        if name.ends_with(".rs") {
            let library = name.contains("/src/") && !name.ends_with("tests.rs");
            let opens = text.lines().find(|line| !line.starts_with("#![") && !line.is_empty());
            if library && !opens.is_some_and(|line| line.starts_with("//!")) {
                broken.push(format!("{name}: no header that says what the module is for"));
            }
            if text.contains("allow(unsafe_code)") && !text.contains("SAFETY:") {
                broken
                    .push(format!("{name}: allows unsafe code and has none that gives its reason"));
            }
            // One with a reason is counted as ignored, and runs in the lab.
            if text.contains(concat!("#[", "ignore]")) {
                broken.push(format!("{name}: a test is ignored without a reason"));
            }
        }
        for (number, line) in text.lines().enumerate() {
            let words = line.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
            if let Some(marker) = words.into_iter().find(|word| markers.contains(word)) {
                broken.push(format!("{name}:{}: {marker}: do it, or say what is so", number + 1));
            }
        }
    }
    Ok(())
}

fn crates(broken: &mut Vec<String>) -> Result<()> {
    let text = run::output(Command::new("cargo").args([
        "metadata",
        "--format-version=1",
        "--locked",
        "--filter-platform=x86_64-unknown-linux-gnu",
    ]))?;
    let metadata: Value = serde_json::from_str(&text)?;
    let array = |value: &Value| value.as_array().cloned().unwrap_or_default();
    let string = |value: &Value| value.as_str().unwrap_or_default().to_owned();

    let mut names = BTreeMap::new();
    for package in array(&metadata["packages"]) {
        let (id, name) = (string(&package["id"]), string(&package["name"]));
        if let Some((_, why)) = BANNED.iter().find(|(banned, _)| *banned == name) {
            broken.push(format!("Cargo.lock: {name} is linked: {why}"));
        }
        let licence = string(&package["license"]);
        if !acceptable(&licence) && !UNNAMED_LICENCES.contains(&name.as_str()) {
            broken.push(format!("Cargo.lock: {name} has the licence '{licence}'"));
        }
        names.insert(id, name);
    }
    // Dependencies that end up in the binary; a crate's tests and build may use others.
    let mut edges: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in array(&metadata["resolve"]["nodes"]) {
        let normal = array(&node["deps"])
            .iter()
            .filter(|dep| array(&dep["dep_kinds"]).iter().any(|kind| kind["kind"].is_null()))
            .map(|dep| string(&dep["pkg"]))
            .collect();
        edges.insert(string(&node["id"]), normal);
    }
    for member in array(&metadata["workspace_members"]).iter().map(&string) {
        let name = names.get(&member).context("a member without a package")?;
        let Some((_, walls, why)) = WALLS.iter().find(|(crate_name, ..)| crate_name == name) else {
            continue;
        };
        let mut seen = BTreeSet::new();
        let mut open = vec![member.clone()];
        while let Some(id) = open.pop() {
            for next in edges.get(&id).into_iter().flatten() {
                if seen.insert(next.clone()) {
                    open.push(next.clone());
                }
            }
        }
        for id in &seen {
            if let Some(wall) = names.get(id).filter(|name| walls.contains(&name.as_str())) {
                broken.push(format!("crates/{name}: depends on {wall}: {why}"));
            }
        }
    }
    Ok(())
}

/// Whether one of a licence expression's alternatives is on the list, with all that it joins.
fn acceptable(expression: &str) -> bool {
    let plain = expression.replace(['(', ')'], " ").replace('/', " OR ");
    plain.split(" OR ").any(|alternative| {
        alternative.split(" AND ").all(|licence| LICENCES.contains(&licence.trim()))
    })
}

/// cargo-deny knows more (advisories, sources); it is not needed to build, so it may be missing.
fn deny(repo: &Path, broken: &mut Vec<String>) -> Result<()> {
    let installed = Command::new("cargo-deny").arg("--version").output().is_ok();
    if !installed {
        eprintln!("SKIP: cargo-deny is not installed; licences, bans and walls were checked here");
        return Ok(());
    }
    let config: PathBuf = repo.join("deny.toml");
    let checked = Command::new("cargo-deny")
        .args(["--config"])
        .arg(config)
        .args(["check", "bans", "licenses", "sources"])
        .current_dir(repo)
        .status()?;
    if !checked.success() {
        broken.push("deny.toml: cargo deny found violations".into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_licence_is_fine_when_one_alternative_is_fine() {
        assert!(acceptable("MIT OR GPL-3.0-only"));
        assert!(acceptable("(MIT OR Apache-2.0) AND Unicode-3.0"));
        assert!(acceptable("MIT/Apache-2.0"));
        assert!(!acceptable("GPL-3.0-only"));
        assert!(!acceptable(""));
    }
}
