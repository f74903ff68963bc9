//! Resource limits, inside the VM.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{self, Cri, container};
use crate::host;
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("a container over its memory limit is killed with reason OOMKilled", memory),
    (
        "a container without a limit that takes all memory is killed, and its pod is usable",
        all_memory,
    ),
    ("a pod whose cgroup is too small for its VM is reported as OOMKilled", small_cgroup),
    ("a pod's processes on the host have the OOM score of its containers", oom_score),
    ("a CPU quota slows a container down", cpu),
    ("a PID limit stops a fork bomb, and the pod continues to run", pids),
    ("a pod is not limited by limits of only some of its containers", some_limits),
    ("limits change while a container runs", update),
    ("CPUs and memory are added to a running pod and removed again", resize),
    ("a pod runs on the host's CPUs of its containers' cpusets", cpuset),
    ("huge pages are available up to a container's limit", huge_pages),
    ("stats report what a container uses", stats),
];

fn limited(
    name: &str,
    image: &str,
    command: &[&str],
    resources: v1::LinuxContainerResources,
) -> v1::ContainerConfig {
    let mut config = container(name, image, command);
    config.linux.get_or_insert_default().resources = Some(resources);
    config
}

fn memory() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("memory")?;
    let resources =
        v1::LinuxContainerResources { memory_limit_in_bytes: 32 << 20, ..Default::default() };
    // tail buffers a line without a newline completely.
    let hungry = ["sh", "-c", "head -c 64000000 /dev/zero | tail"];
    let config = limited("c", &image, &["sh", "-c", "exec tail /dev/zero"], resources);
    let id = node.cri().run(&pod, config)?;
    let status = node.cri().exited(&id)?;
    ensure!(status.reason == "OOMKilled" && status.exit_code == 137, "{status:?}");
    let free = node.cri().run(&pod, container("free", &image, &hungry))?;
    ensure!(
        node.cri().exited(&free)?.reason == "Completed",
        "a limit hits a container without one"
    );
    node.finish()
}

fn all_memory() -> Result<()> {
    // Small, as every page of it is touched.
    let node = Node::start_with(|config| config + "\n[pods]\ndefault_memory_mib = 192\n")?;
    let image = node.image("busybox")?;
    let pod = node.pod("greedy")?;
    let cri = node.cri();
    let other = cri.run(&pod, container("other", &image, &["sleep", "1000"]))?;
    let id = cri.run(&pod, container("greedy", &image, &["sh", "-c", "exec tail /dev/zero"]))?;
    let status = cri.exited(&id)?;
    ensure!(status.reason == "OOMKilled" && status.exit_code == 137, "{status:?}");
    ensure!(cri.shell(&other, "echo alive")? == "alive", "the other container");
    ensure!(cri.pod_ready(&pod)?, "the pod is not ready");
    ensure!(
        cri.status(&other)?.state == v1::ContainerState::ContainerRunning as i32,
        "the other container was killed"
    );
    node.finish()
}

/// A number of a container's `cpu.stat` (cgroup-v2, "CPU Interface Files").
fn cpu_stat(cri: &Cri, id: &str, name: &str) -> Result<u64> {
    let text = cri.shell(id, "cat /sys/fs/cgroup/cpu.stat")?;
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok());
    value.with_context(|| format!("no {name} in {text:?}"))
}

fn cpu() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("cpu")?;
    let cri = node.cri();
    let resources = v1::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 10_000,
        ..Default::default()
    };
    let busy = ["sh", "-c", "while :; do :; done"];
    let slow = cri.run(&pod, limited("slow", &image, &busy, resources))?;
    let free = cri.run(&pod, container("free", &image, &busy))?;
    ensure!(
        cri.shell(&slow, "cat /sys/fs/cgroup/cpu.max")? == "10000 100000",
        "cpu.max is not the quota"
    );
    wait::until("a busy container is held to its quota", Duration::from_secs(120), || {
        Ok((cpu_stat(cri, &slow, "nr_throttled ")? >= 20).then_some(()))
    })?;
    let used = cpu_stat(cri, &slow, "usage_usec ")?;
    // Read after the usage, so that it cannot be too small.
    let periods = cpu_stat(cri, &slow, "nr_periods ")?;
    // A period may exceed its quota by one slice of the scheduler.
    ensure!(used <= periods * 20_000, "{used} us in {periods} periods of 10000 us each");
    ensure!(cpu_stat(cri, &free, "nr_throttled ")? == 0, "a container without a quota is held");
    node.finish()
}

fn pids() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("forks")?;
    let mut resources = v1::LinuxContainerResources::default();
    resources.unified.insert("pids.max".into(), "20".into());
    let bomb = "i=0; while [ $i -lt 100 ]; do sleep 100 & i=$((i+1)); done; wait";
    let cri = node.cri();
    let id = cri.run(&pod, limited("c", &image, &["sh", "-c", bomb], resources))?;
    let other = cri.run(&pod, container("other", &image, &["sleep", "1000"]))?;
    std::thread::sleep(Duration::from_secs(2));
    let bomb = cri.status(&id)?;
    if bomb.state == v1::ContainerState::ContainerRunning as i32 {
        let count = cri.exec(&id, &["cat", "/sys/fs/cgroup/pids.current"]);
        if let Ok(output) = count {
            let count: u32 = output.stdout.trim().parse().unwrap_or(0);
            ensure!(count <= 20, "{count} processes under a limit of 20");
        }
    } else {
        ensure!(bomb.exit_code != 0, "a hundred processes fit under a limit of 20");
    }
    ensure!(cri.shell(&other, "echo alive")? == "alive", "the bomb took its neighbour");
    node.finish()
}

/// A cgroup as a kubelet creates it for a pod; removed on drop.
pub(super) struct PodCgroup(PathBuf);

impl PodCgroup {
    pub(super) fn make(name: &str) -> Result<Self> {
        let folder = Path::new("/sys/fs/cgroup").join(name);
        fs::create_dir(&folder).with_context(|| format!("making {}", folder.display()))?;
        Ok(Self(folder))
    }

    pub(super) fn limit(&self, file: &str, text: &str) -> Result<()> {
        let path = self.0.join(file);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    pub(super) fn read(&self, file: &str) -> Result<String> {
        let path = self.0.join(file);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    }
}

impl Drop for PodCgroup {
    fn drop(&mut self) {
        let _ = fs::remove_dir(&self.0);
    }
}

fn small_cgroup() -> Result<()> {
    // Declared first, so that it is dropped last, after the node's pods.
    let cgroup = PodCgroup::make("stories-tight")?;
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let limit =
        v1::LinuxContainerResources { memory_limit_in_bytes: 256 << 20, ..Default::default() };
    let mut config = client::pod("tight", &node.logs);
    let linux = config.linux.get_or_insert_default();
    linux.cgroup_parent = "/stories-tight".into();
    linux.resources = Some(limit);
    let pod = cri.run_pod(config)?;
    // Far less than the guest's free memory after boot.
    let held: u64 = cgroup.read("memory.current")?.trim().parse()?;
    cgroup.limit("memory.max", &(held + (64 << 20)).to_string())?;
    // tail buffers a line without a newline completely.
    let id = cri.run(&pod, container("c", &image, &["tail", "/dev/zero"]))?;
    let status = cri.exited(&id)?;
    ensure!(status.reason == "OOMKilled" && status.exit_code == 137, "{status:?}");
    let message = &status.message;
    ensure!(message.contains("/stories-tight") && message.contains("overhead"), "{message}");
    ensure!(!cri.pod_ready(&pod)?, "the pod lives without its VM");
    cri.remove_pod(&pod)?;
    node.finish()
}

fn oom_score() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let mut config = client::pod("score", &node.logs);
    config.linux.get_or_insert_default().cgroup_parent =
        "/stories-kubepods/kubepods/besteffort/podx".into();
    let pod = cri.run_pod(config)?;
    let leaf = Path::new("/sys/fs/cgroup/stories-kubepods/kubepods/besteffort/podx")
        .join(format!("nacelle-{pod}"));
    let scores = || -> Result<Vec<String>> {
        let pids = fs::read_to_string(leaf.join("cgroup.procs"))?;
        // Before Linux 6.4 a vhost worker is a kernel thread in the cgroup, which cannot be killed.
        let is_process = |pid: &&str| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|line| !line.is_empty())
        };
        pids.lines()
            .filter(is_process)
            .map(|pid| Ok(fs::read_to_string(format!("/proc/{pid}/oom_score_adj"))?.trim().into()))
            .collect()
    };
    let all = |score: &str| -> Result<()> {
        let scores = scores()?;
        ensure!(!scores.is_empty() && scores.iter().all(|s| s == score), "{scores:?}, not {score}");
        Ok(())
    };
    all("1000")?;
    let resources = v1::LinuxContainerResources { oom_score_adj: 900, ..Default::default() };
    cri.run(&pod, limited("c", &image, &["sleep", "1000"], resources))?;
    all("900")?;
    cri.remove_pod(&pod)?;
    node.finish()
}

fn some_limits() -> Result<()> {
    // Declared first, so that it is dropped last, after the node's pods.
    let cgroup = PodCgroup::make("stories-pod")?;
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    // What a kubelet sends for a container of half a CPU and 64 MiB beside one without limits.
    let run = |name: &str| -> Result<(String, u64, String)> {
        let mut config = client::pod(name, &node.logs);
        let linux = config.linux.get_or_insert_default();
        linux.cgroup_parent = "/stories-pod".into();
        linux.resources = Some(v1::LinuxContainerResources {
            cpu_period: 100_000,
            cpu_quota: 50_000,
            memory_limit_in_bytes: 64 << 20,
            ..Default::default()
        });
        let pod = cri.run_pod(config)?;
        let id = cri.run(&pod, container("c", &image, &["sleep", "1000"]))?;
        let total = cri.shell(&id, "sed -n 's/^MemTotal: *\\([0-9]*\\) kB/\\1/p' /proc/meminfo")?;
        let cap = fs::read_to_string(cgroup.0.join(format!("nacelle-{pod}/cpu.max")));
        let cap = cap.unwrap_or_else(|_| "max".into());
        let seen = (cri.shell(&id, "nproc")?, total.parse::<u64>()? / 1024, cap);
        cri.remove_pod(&pod)?;
        Ok(seen)
    };
    let (cpus, mib, cap) = run("open")?;
    ensure!(cpus == "2" && mib > 1900 && cap.starts_with("max"), "{cpus} CPUs, {mib} MiB, {cap}");
    // If all containers have limits, the kubelet limits the pod's cgroup, too. With a much smaller
    // limit the boot takes minutes in an emulated machine.
    cgroup.limit("cpu.max", "50000 100000")?;
    cgroup.limit("memory.max", "402653184")?;
    let (cpus, mib, cap) = run("closed")?;
    ensure!(cpus == "1" && mib < 256 && cap.starts_with("50000 "), "{cpus} CPUs, {mib} MiB, {cap}");
    node.finish()
}

fn update() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("update")?;
    let cri = node.cri();
    let id = cri.run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let resources = v1::LinuxContainerResources {
        memory_limit_in_bytes: 64 << 20,
        cpu_period: 100_000,
        cpu_quota: 50_000,
        ..Default::default()
    };
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(resources),
        ..Default::default()
    };
    let mut client = cri.runtime.clone();
    cri.block_on(async move { client.update_container_resources(request).await })?;
    ensure!(cri.shell(&id, "cat /sys/fs/cgroup/memory.max")? == "67108864", "memory.max");
    ensure!(cri.shell(&id, "cat /sys/fs/cgroup/cpu.max")? == "50000 100000", "cpu.max");
    let status = cri.status(&id)?;
    let linux = status.resources.and_then(|r| r.linux).context("status has no resources")?;
    ensure!(linux.memory_limit_in_bytes == 64 << 20, "{linux:?}");
    node.finish()
}

fn resize() -> Result<()> {
    let sizes = "\n[pods]\ndefault_vcpus = 1\nmax_vcpus = 2\ndefault_memory_mib = 512\n";
    let node = Node::start_with(|config| config + sizes)?;
    let image = node.image("busybox")?;
    let pod = node.pod("resize")?;
    let cri = node.cri();
    let id = cri.run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let resize_pod = |resources: v1::LinuxContainerResources| {
        let request = v1::UpdatePodSandboxResourcesRequest {
            pod_sandbox_id: pod.clone(),
            resources: Some(resources),
            ..Default::default()
        };
        let mut client = cri.runtime.clone();
        cri.block_on(async move { client.update_pod_sandbox_resources(request).await })
    };
    let cpus = |cpus: i64| v1::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 100_000 * cpus,
        ..Default::default()
    };
    ensure!(cri.shell(&id, "nproc")? == "1", "at first");
    for wanted in [2, 1, 2] {
        resize_pod(cpus(wanted))?;
        let found = cri.shell(&id, "nproc; grep -c ^processor /proc/cpuinfo")?;
        ensure!(found == format!("{wanted}\n{wanted}"), "{wanted} CPUs were asked for: {found}");
    }
    let memory = |bytes: i64| v1::LinuxContainerResources {
        memory_limit_in_bytes: bytes,
        ..Default::default()
    };
    let total = || -> Result<u64> {
        let line = cri.shell(&id, "grep MemTotal /proc/meminfo")?;
        let kib = line.split_whitespace().nth(1).context("no MemTotal")?;
        Ok(kib.parse::<u64>()? >> 10)
    };
    ensure!((400..512).contains(&total()?), "{} MiB at first", total()?);
    for _ in 0..2 {
        resize_pod(memory(1 << 30))?;
        ensure!(total()? >= 1024, "1 GiB was asked for: {} MiB", total()?);
        // Memory is used by a program and by the page cache, and freed.
        cri.shell(&id, "dd if=/dev/zero of=/dev/null bs=300M count=1")?;
        cri.shell(&id, "dd if=/dev/zero of=/big bs=1M count=64; rm /big")?;
        resize_pod(memory(256 << 20))?;
        ensure!(total()? < 512, "less was asked for: {} MiB", total()?);
    }
    let status = resize_pod(memory(1 << 40)).unwrap_err();
    ensure!(status.message().contains("memory") && status.message().contains("MiB"), "{status}");
    ensure!(cri.pod_ready(&pod)? && cri.shell(&id, "nproc")? == "2", "the pod is affected");
    node.finish()
}

fn cpuset() -> Result<()> {
    let node = Node::start_with(|config| config + "\n[pods]\ndefault_vcpus = 1\n")?;
    let image = node.image("busybox")?;
    let pod = node.pod("cpuset")?;
    let cri = node.cri();
    let on = |cpus: &str| v1::LinuxContainerResources {
        cpuset_cpus: cpus.into(),
        // As a kubelet does for every page size of its node.
        hugepage_limits: vec![v1::HugepageLimit { page_size: "2MB".into(), limit: 0 }],
        oom_score_adj: 990,
        ..Default::default()
    };
    let status = format!("/proc/{}/status", node.vmm_pid(&pod)?);
    let allowed = || -> Result<String> {
        let text = fs::read_to_string(&status)?;
        let line = text.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:"));
        Ok(line.context("no Cpus_allowed_list")?.trim().to_owned())
    };
    let free = allowed()?;
    // The guest has no CPU 1.
    let id = cri.run(&pod, limited("c", &image, &["sleep", "1000"], on("1")))?;
    ensure!(cri.shell(&id, "nproc")? == "1" && allowed()? == "1", "{}", allowed()?);
    let request = v1::UpdateContainerResourcesRequest {
        container_id: id.clone(),
        linux: Some(v1::LinuxContainerResources { oom_score_adj: 995, ..on("0") }),
        ..Default::default()
    };
    let mut client = cri.runtime.clone();
    cri.block_on(async move { client.update_container_resources(request).await })?;
    ensure!(allowed()? == "0", "{}", allowed()?);
    let linux = cri.status(&id)?.resources.and_then(|r| r.linux).context("no resources")?;
    ensure!(linux.cpuset_cpus == "0" && linux.oom_score_adj == 990, "{linux:?}");
    let other = cri.run(&pod, container("other", &image, &["sleep", "1000"]))?;
    ensure!(allowed()? == free, "beside a container that runs anywhere: {}", allowed()?);
    cri.remove(&other)?;
    ensure!(allowed()? == "0", "alone again: {}", allowed()?);
    node.finish()
}

fn huge_pages() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("python")?;
    let pod = node.pod("huge")?;
    let cri = node.cri();
    let folder = host::folder()?;
    let _huge = host::Tmpfs::huge_pages(&folder.path().join("huge"))?;
    let with = |name: &str, page_size: &str, limit: u64| {
        let limits = vec![v1::HugepageLimit { page_size: page_size.into(), limit }];
        let resources =
            v1::LinuxContainerResources { hugepage_limits: limits, ..Default::default() };
        let mounts = vec![client::mount(&folder.path().join("huge"), "/huge")];
        v1::ContainerConfig { mounts, ..limited(name, &image, &["sleep", "1000"], resources) }
    };
    let a = cri.run(&pod, with("a", "2MB", 8 << 20))?;
    let total = |id: &str| cri.shell(id, "sed -n 's/HugePages_Total: *//p' /proc/meminfo");
    ensure!(total(&a)? == "4", "pages of 2 MiB: {}", total(&a)?);
    let anonymous = |id: &str, mib: u32| {
        let flags = "mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000";
        let line = format!("import mmap; m = mmap.mmap(-1, {mib} << 20, flags={flags}); m[0] = 1");
        cri.shell(id, &format!("python3 -c '{line}' 2>&1 | tail -n 1"))
    };
    ensure!(anonymous(&a, 8)?.is_empty(), "within the limit: {}", anonymous(&a, 8)?);
    ensure!(anonymous(&a, 10)?.contains("Cannot allocate"), "beyond: {}", anonymous(&a, 10)?);
    let write = "import mmap, os; f = os.open(\"/huge/f\", os.O_RDWR | os.O_CREAT); \
                 os.ftruncate(f, 4 << 20); m = mmap.mmap(f, 4 << 20); m[0:5] = b\"hello\"";
    let output = cri.shell(&a, &format!("python3 -c '{write}' 2>&1"))?;
    ensure!(output.is_empty(), "a file of huge pages: {output}");

    // A kubelet sends limit 0 for containers that request none. The volume is the pod's, the pages
    // are a's.
    let b = cri.run(&pod, with("b", "2MB", 0))?;
    ensure!(cri.shell(&b, "head -c 5 /huge/f")? == "hello", "the volume is not the pod's");
    // Two of the four pages are free: only b's own limit prevents it.
    ensure!(anonymous(&b, 2)?.contains("Cannot allocate"), "b's limit: {}", anonymous(&b, 2)?);
    cri.remove(&a)?;
    ensure!(cri.shell(&b, "head -c 5 /huge/f; rm /huge/f")? == "hello", "gone with a container");
    ensure!(total(&b)? == "0", "kept: {}", total(&b)?);

    for (size, limit, why) in [("2MB", 1 << 40, "give the pod more memory"), ("1GB", 1, "2MB")] {
        let status = match cri.run(&pod, with("c", size, limit)) {
            Ok(_) => anyhow::bail!("{limit} bytes of {size} pages were given"),
            Err(error) => format!("{error:#}"),
        };
        ensure!(status.contains(why), "{status}");
    }
    ensure!(total(&b)? == "0", "left by a refusal: {}", total(&b)?);
    node.finish()
}

fn stats() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("stats")?;
    let cri = node.cri();
    let line = "head -c 5000000 /dev/zero > /big; while :; do :; done";
    let id = cri.run(&pod, container("c", &image, &["sh", "-c", line]))?;
    let begin = Instant::now();
    loop {
        let request = v1::ContainerStatsRequest { container_id: id.clone() };
        let mut client = cri.runtime.clone();
        let reply = cri.block_on(async move { client.container_stats(request).await })?;
        let stats = reply.into_inner().stats.context("no stats")?;
        let cpu = stats.cpu.and_then(|c| c.usage_core_nano_seconds).map_or(0, |v| v.value);
        let memory = stats.memory.and_then(|m| m.working_set_bytes).map_or(0, |v| v.value);
        let disk = stats.writable_layer.and_then(|w| w.used_bytes).map_or(0, |v| v.value);
        if cpu > 500_000_000 && memory > 0 && disk >= 5_000_000 {
            break;
        }
        ensure!(
            begin.elapsed() < Duration::from_secs(40),
            "cpu {cpu} ns, memory {memory}, disk {disk} bytes"
        );
        std::thread::sleep(Duration::from_millis(500));
    }
    node.finish()
}
