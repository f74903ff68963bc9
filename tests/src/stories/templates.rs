//! Pods that start from the saved VM of an earlier pod.

use std::collections::BTreeSet;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};

use super::Story;
use crate::client::container;
use crate::node::Node;

pub const STORIES: &[Story] =
    &[("pods that start from one template differ in all that must differ", differ)];

/// Values that must not be the same in two pods, one per line.
const IDENTITY: &str = "cat /proc/sys/kernel/random/boot_id /proc/sys/kernel/random/uuid; hostname; \
                        head -c 16 /dev/urandom | od -An -tx1 | tr -d ' \\n'; echo; \
                        ip addr show eth0 | grep -o 'link/ether [0-9a-f:]*'; \
                        ip addr show eth0 | grep -o 'inet [0-9.]*'";

fn differ() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let mut seen = BTreeSet::new();
    let mut lines = 0;
    for name in ["one", "two", "three"] {
        let pod = node.pod(name)?;
        let phases = start_phases(&node, name)?;
        let restored = phases.contains("restore");
        ensure!(restored == (name != "one"), "{name} started with {phases}");
        let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
        for line in node.cri().shell(&id, IDENTITY)?.lines() {
            lines += 1;
            ensure!(seen.insert(line.to_owned()), "{line:?} is in two pods");
        }
        let date = node.cri().shell(&id, "date +%s")?.trim().parse::<u64>()?;
        let now = SystemTime::now().duration_since(UNIX_EPOCH)?;
        ensure!(now.abs_diff(Duration::from_secs(date)) < Duration::from_secs(20), "date {date}");
        // The monotonic clock runs and timers fire.
        let line = "up() { cut -d. -f1 /proc/uptime; }; a=$(up); sleep 2; echo $(($(up) - a))";
        let slept = node.cri().shell(&id, line)?;
        let slept: u64 = slept.trim().parse()?;
        ensure!((1..60).contains(&slept), "slept {slept} s");
        ensure!(node.cri().shell(&id, "nproc")?.trim() == "2", "CPUs");
    }
    ensure!(lines == 3 * 6, "{lines} lines: {seen:?}");
    // Templates are gone with the daemon; its pods are not.
    node.kill_daemon()?;
    node.start_daemon()?;
    for pod in node.cri().pods()? {
        ensure!(node.cri().pod_ready(&pod.id)?, "a pod of before is not ready");
    }
    node.pod("four")?;
    let phases = start_phases(&node, "four")?;
    ensure!(phases.contains("template") && !phases.contains("restore"), "{phases}");
    node.finish()
}

/// The output of `nacelle trace`.
fn start_phases(node: &Node, pod: &str) -> Result<String> {
    let output = std::process::Command::new(crate::node::bin("nacelle"))
        .args(["--socket"])
        .arg(node.socket())
        .args(["trace", pod])
        .output()
        .context("nacelle trace")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8(output.stdout)?)
}
