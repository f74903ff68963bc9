//! Unused memory of a pod is returned to the host.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use super::limits::PodCgroup;
use crate::client::{self, Cri, container};
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("freed memory of a pod is returned to the host, and the pod's limit can be lowered", freed),
    ("unused page cache of an idle pod is returned to the host", page_cache),
];

const MIB: u64 = 1 << 20;
/// Allowed growth in addition to a fifth of the memory before: VMM, page tables.
const SLACK: u64 = 8 * MIB;
/// The daemon detects an idle pod by statistics every 5 s, and the guest's kernel reports free pages
/// 2 s after they were freed, some at a time; the rest is for a busy machine.
const WITHIN: Duration = Duration::from_secs(40);

/// A privileged pod of `mib` in `cgroup`, as a kubelet would run it, and its container.
fn pod(node: &Node, cgroup: &str, mib: u64, image: &str) -> Result<(String, String)> {
    let mut config = client::pod(cgroup, &node.logs);
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent = format!("/{cgroup}");
    linux.security_context =
        Some(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
    linux.resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: (mib * MIB) as i64,
        ..Default::default()
    });
    let pod = node.cri().run_pod(config)?;
    let mut config = container("c", image, &["sleep", "1000"]);
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
    let id = node.cri().run(&pod, config)?;
    Ok((pod, id))
}

/// Bytes charged to a cgroup: total, and guest memory.
fn charged(cgroup: &PodCgroup) -> Result<(u64, u64)> {
    let all = cgroup.read("memory.current")?.trim().parse()?;
    let stat = cgroup.read("memory.stat")?;
    let shmem = stat.lines().find_map(|line| line.strip_prefix("shmem "));
    Ok((all, shmem.context("no shmem in memory.stat")?.parse()?))
}

/// The value of `read` after it has changed by at most 1 MiB for five seconds.
fn settled(read: impl Fn() -> Result<u64>) -> Result<u64> {
    let mut last = (Instant::now(), read()?);
    wait::until("a pod's memory settles", Duration::from_secs(60), || {
        let now = read()?;
        if now.abs_diff(last.1) > MIB {
            last = (Instant::now(), now);
        }
        Ok((last.0.elapsed() > Duration::from_secs(5)).then_some(last.1))
    })
}

fn resize(cri: &Cri, pod: &str, id: &str, pod_bytes: u64, bytes: u64) -> Result<()> {
    let limit = |bytes: u64| v1::LinuxContainerResources {
        memory_limit_in_bytes: bytes as i64,
        ..Default::default()
    };
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.into(),
        linux: Some(limit(bytes)),
        ..Default::default()
    };
    let mut client = cri.runtime.clone();
    cri.block_on(async move { client.update_container_resources(request).await })?;
    let request = v1::UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: pod.into(),
        resources: Some(limit(pod_bytes)),
        ..Default::default()
    };
    let mut client = cri.runtime.clone();
    cri.block_on(async move { client.update_pod_sandbox_resources(request).await })?;
    Ok(())
}

fn freed() -> Result<()> {
    let cgroup = PodCgroup::make("stories-freed")?;
    // As a kubelet does for a pod whose containers all have limits.
    cgroup.limit("memory.max", &(640 * MIB).to_string())?;
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let (pod, id) = pod(&node, "stories-freed", 400, &image)?;
    let before = settled(|| Ok(charged(&cgroup)?.0))?;
    let line = "mkdir /t && mount -t tmpfs tmpfs /t && dd if=/dev/zero of=/t/f bs=1M count=155 && \
                dd if=/dev/zero of=/f bs=1M count=155 && sync";
    cri.shell(&id, line)?;
    let used = charged(&cgroup)?;
    ensure!(used.1 > 200 * MIB, "the pod holds {used:?} bytes only");
    cri.shell(&id, "rm /t/f /f")?;
    let begin = Instant::now();
    let most = before + before / 5 + SLACK;
    let result = wait::until("freed memory goes back", WITHIN, || {
        let now = charged(&cgroup)?.0;
        Ok((now <= most).then_some(now))
    });
    let now = result.with_context(|| {
        let stat = cgroup.read("memory.stat").unwrap_or_default();
        format!("{before} bytes before, {used:?} in use; now {:?}\n{stat}", charged(&cgroup))
    })?;
    println!("before {before}, in use {}, {now} after {:?}", used.0, begin.elapsed());

    // The usage that a kubelet compares with a new limit before it requests it.
    let usage = || -> Result<u64> {
        let request = v1::PodSandboxStatsRequest { pod_sandbox_id: pod.clone() };
        let mut client = cri.runtime.clone();
        let reply = cri.block_on(async move { client.pod_sandbox_stats(request).await })?;
        let linux = reply.into_inner().stats.and_then(|s| s.linux).context("no stats")?;
        let memory = linux.memory.context("no memory stats")?;
        let bytes = |value: Option<v1::UInt64Value>| value.map_or(0, |v| v.value);
        Ok(bytes(memory.usage_bytes).max(bytes(memory.working_set_bytes)))
    };
    wait::until("statistics follow", WITHIN, || Ok((usage()? < 20 * MIB).then_some(())))
        .with_context(|| format!("{:?} bytes are said to be in use", usage()))?;
    resize(cri, &pod, &id, 192 * MIB, 64 * MIB)?;
    cgroup.limit("memory.max", &(192 * MIB).to_string())?;
    ensure!(
        cri.shell(&id, "cat /sys/fs/cgroup/memory.max")? == (64 * MIB).to_string(),
        "memory.max"
    );
    // The container can still use memory up to its new limit.
    cri.shell(&id, "dd if=/dev/zero of=/t/f bs=1M count=40 && rm /t/f && echo alive")?;
    ensure!(cri.pod_ready(&pod)?, "the pod has died");
    let events = cgroup.read("memory.events")?;
    ensure!(events.lines().any(|line| line == "oom_kill 0"), "{events}");
    node.finish()
}

fn page_cache() -> Result<()> {
    let cgroup = PodCgroup::make("stories-cache")?;
    let node = Node::start()?;
    let image = node.image("python")?;
    let cri = node.cri();
    let (_, id) = pod(&node, "stories-cache", 512, &image)?;
    let before = settled(|| Ok(charged(&cgroup)?.1))?;
    // The files of the image alone have little more than what is required below.
    let line = "dd if=/dev/zero of=/big bs=1M count=48 && sync && \
                find / -xdev -type f -size +300k -exec cat {} + > /dev/null";
    let output = cri.exec_within(&id, &["sh", "-c", line], 110)?;
    ensure!(output.code == 0, "{output:?}");
    let used = charged(&cgroup)?.1;
    ensure!(used > before + before / 5 + SLACK + 8 * MIB, "{before} before, {used} after reading");
    let begin = Instant::now();
    let most = before + before / 5 + SLACK;
    let result = wait::until("page cache goes back", WITHIN, || {
        let now = charged(&cgroup)?.1;
        Ok((now <= most).then_some(now))
    });
    let now = result.with_context(|| {
        let memory = cri.shell(&id, "cat /proc/meminfo").unwrap_or_default();
        format!("{before} bytes before, {used} in use; now {:?}\n{memory}", charged(&cgroup))
    })?;
    println!("before {before}, in use {used}, {now} after {:?}", begin.elapsed());
    node.finish()
}
