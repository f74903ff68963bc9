//! The VMM alone, and a distribution kernel in it.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::Story;
use crate::client::container;
use crate::node::{self, Node};
use crate::wait;

pub const STORIES: &[Story] = &[
    ("an invalid and a missing kernel are reported", bad_kernel),
    ("Debian's cloud kernel boots with its virtio modules and runs a container", debian_kernel),
    ("a panic of the guest kernel is reported as the reason", panic),
    ("a VM of four CPUs uses them all", four_cpus),
    ("an idle VMM is jailed: no root, no capabilities, seccomp, own namespaces", jailed),
];

fn bad_kernel() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let rubbish = folder.path().join("rubbish");
    std::fs::write(&rubbish, vec![7; 100_000])?;
    for (kernel, word) in [(rubbish, "ELF"), (folder.path().join("missing"), "missing")] {
        let output = Command::new(node::bin("nacelle-vmm"))
            .args(["boot", "--memory", "128", "--kernel"])
            .arg(&kernel)
            .stdin(Stdio::null())
            .output()?;
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(!output.status.success() && stderr.contains(word), "{stderr}");
        ensure!(!stderr.contains("panicked"), "{stderr}");
    }
    Ok(())
}

fn debian_kernel() -> Result<()> {
    let folder = node::guest();
    let kernel = folder.join("debian/vmlinuz");
    ensure!(kernel.exists(), "{} is missing: make guest-image", kernel.display());
    let node = Node::start_with(|config| {
        let text = config.replace("/vmlinux\"", "/debian/vmlinuz\"");
        text.replace("/initramfs.cpio\"", "/initramfs-debian.cpio\"")
    })?;
    let image = node.image("busybox")?;
    let pod = node.pod("debian")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let release = node.cri().shell(&id, "uname -r")?;
    ensure!(release.ends_with("-cloud-amd64"), "kernel {release}");
    let address = node.cri().pod_address(&pod)?;
    ensure!(node.cri().shell(&id, "ip addr")?.contains(&address), "the network is not up");
    node.finish()
}

fn panic() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let mut config = crate::client::pod("panic", &node.logs);
    config.linux.get_or_insert_default().security_context =
        Some(cri::v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    let pod = node.cri().run_pod(config)?;
    let mut config = container("c", &image, &["sh", "-c", "echo c > /proc/sysrq-trigger"]);
    config.linux.get_or_insert_default().security_context =
        Some(cri::v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    let id = node.cri().create(&pod, config)?;
    // The reply may be lost with the guest.
    let _ = node.cri().start(&id);
    wait::until("the pod is not ready", Duration::from_secs(60), || {
        Ok((!node.cri().pod_ready(&pod)?).then_some(()))
    })?;
    let info = node.cri().pod_status(&pod)?.info;
    let info = info.get("info").context("no verbose info")?;
    ensure!(info.to_lowercase().contains("panic"), "the reason is not a panic: {info}");
    node.finish()
}

fn four_cpus() -> Result<()> {
    // As the default: a requested size is limited to the host's CPUs, and the lab has two.
    let node = Node::start_with(|config| config + "\n[pods]\ndefault_vcpus = 4\n")?;
    let image = node.image("busybox")?;
    let pod = node.pod("four")?;
    let line = "nproc; for i in 1 2 3 4; do (i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done) & done; wait; echo done";
    let id = node.cri().run(&pod, container("c", &image, &["sh", "-c", line]))?;
    ensure!(node.cri().exited(&id)?.exit_code == 0, "it failed");
    let log = node.cri().log(&id)?;
    ensure!(log[0].text == "4" && log[1].text == "done", "{log:?}");
    node.finish()
}

fn jailed() -> Result<()> {
    let node = Node::start()?;
    let pod = node.pod("jail")?;
    let pid = node.vmm_pid(&pod)?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<String> {
        let line = status.lines().find(|l| l.starts_with(name)).context(name.to_owned())?;
        Ok(line[name.len()..].trim().to_owned())
    };
    let uid = field("Uid:")?;
    ensure!(uid.split_whitespace().all(|n| n != "0"), "uids {uid}");
    for set in ["CapInh:", "CapPrm:", "CapEff:", "CapBnd:", "CapAmb:"] {
        ensure!(field(set)? == "0000000000000000", "{set} {}", field(set)?);
    }
    ensure!(field("NoNewPrivs:")? == "1", "no_new_privs");
    for task in std::fs::read_dir(format!("/proc/{pid}/task"))? {
        let path = task?.path();
        let text = std::fs::read_to_string(path.join("status"))?;
        ensure!(text.contains("Seccomp:\t2"), "a thread without seccomp: {text}");
    }
    for namespace in ["mnt", "pid", "ipc", "uts", "net"] {
        let of = |who: &str| std::fs::read_link(format!("/proc/{who}/ns/{namespace}"));
        if of(&pid.to_string())? == of("self")? {
            bail!("the VMM shares the host's {namespace} namespace");
        }
    }
    let root: Vec<_> = std::fs::read_dir(format!("/proc/{pid}/root"))?.collect();
    ensure!(root.is_empty(), "its root holds {root:?}");
    node.finish()
}
