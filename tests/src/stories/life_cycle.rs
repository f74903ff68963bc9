//! The life cycle of pods and containers, from RunPodSandbox to RemovePodSandbox.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cri::v1;
use tonic::Code;

use super::Story;
use crate::client::{container, pod};
use crate::node::Node;

pub const STORIES: &[Story] = &[
    ("a container runs on the pod's own kernel, prints and exits", runs),
    ("containers of a pod share network, IPC and UTS namespaces, and no others", shared_namespaces),
    ("an init container runs before the others", init_container),
    ("a removed container can be created again in its pod", created_again),
    ("stop sends SIGTERM first and SIGKILL after the timeout", stop_grace),
    ("stop and remove are idempotent and accept unknown ids", idempotent),
    ("a second pod or container of the same name is rejected", same_name),
    ("pid namespaces are the container's, the pod's or the target's", pid_modes),
    ("environment, arguments and working directory follow image and request", environment),
    ("pods created and removed two at once, some killed, leave nothing behind", soak),
];

const EXITED: i32 = v1::ContainerState::ContainerExited as i32;

fn runs() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("first")?;
    let config = container("hello", &image, &["sh", "-c", "uname -r; echo oops >&2; exit 3"]);
    let id = node.cri().run(&pod, config)?;
    let status = node.cri().exited(&id)?;
    ensure!(status.exit_code == 3, "exit code {}", status.exit_code);
    ensure!(status.reason == "Error", "reason {}", status.reason);
    ensure!(status.started_at > 0 && status.finished_at >= status.started_at, "times {status:?}");
    let on_host = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    let log = node.cri().log(&id)?;
    let on = |stream: &str| {
        log.iter().filter(|l| l.stream == stream).map(|l| l.text.clone()).collect::<Vec<_>>()
    };
    ensure!(on("stderr") == ["oops"], "{log:?}");
    let in_guest = on("stdout").join("");
    ensure!(in_guest.ends_with("-nacelle") && in_guest != on_host.trim(), "kernel {in_guest:?}");
    node.finish()
}

fn shared_namespaces() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("two")?;
    let cri = node.cri();
    let a = cri.run(&pod, container("a", &image, &["sleep", "1000"]))?;
    let b = cri.run(&pod, container("b", &image, &["sleep", "1000"]))?;
    for namespace in ["net", "ipc", "uts"] {
        let line = format!("readlink /proc/1/ns/{namespace}");
        let (of_a, of_b) = (cri.shell(&a, &line)?, cri.shell(&b, &line)?);
        ensure!(of_a == of_b, "{namespace}: {of_a} and {of_b}");
    }
    for namespace in ["mnt", "pid"] {
        let line = format!("readlink /proc/1/ns/{namespace}");
        let (of_a, of_b) = (cri.shell(&a, &line)?, cri.shell(&b, &line)?);
        ensure!(of_a != of_b, "{namespace}: both {of_a}");
    }
    ensure!(cri.shell(&a, "hostname")? == "two", "host name");
    cri.shell(&a, "echo mine > /mine; echo ours > /dev/shm/ours")?;
    ensure!(cri.shell(&b, "cat /dev/shm/ours")? == "ours", "/dev/shm is not shared");
    ensure!(cri.exec(&b, &["cat", "/mine"])?.code != 0, "root file systems are shared");
    node.finish()
}

fn init_container() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("init")?;
    let cri = node.cri();
    let init =
        cri.run(&pod, container("init", &image, &["sh", "-c", "echo ready > /dev/shm/x"]))?;
    ensure!(cri.exited(&init)?.exit_code == 0, "init container failed");
    let main = cri.run(&pod, container("main", &image, &["cat", "/dev/shm/x"]))?;
    ensure!(cri.exited(&main)?.exit_code == 0, "main container failed");
    ensure!(cri.log(&main)?[0].text == "ready", "main does not see what init left");
    node.finish()
}

fn created_again() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("again")?;
    let cri = node.cri();
    for attempt in 0..3 {
        let mut config = container("c", &image, &["sh", "-c", "ls /left; touch /left; exit 1"]);
        config.metadata = Some(v1::ContainerMetadata { name: "c".into(), attempt });
        config.log_path = format!("c/{attempt}.log");
        let id = cri.run(&pod, config)?;
        ensure!(cri.exited(&id)?.exit_code == 1, "attempt {attempt}");
        let log = cri.log(&id)?;
        ensure!(
            log.iter().all(|l| l.stream == "stderr"),
            "attempt {attempt} sees old files: {log:?}"
        );
        cri.remove(&id)?;
    }
    ensure!(cri.containers()?.is_empty(), "containers are left");
    ensure!(cri.pod_ready(&pod)?, "pod is not ready any more");
    node.finish()
}

fn stop_grace() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("stop")?;
    let cri = node.cri();
    let handler = ["sh", "-c", "trap 'echo bye; exit 7' TERM; while :; do sleep 0.1; done"];
    let id = cri.run(&pod, container("handler", &image, &handler))?;
    std::thread::sleep(Duration::from_millis(500));
    cri.stop(&id, 20)?;
    let status = cri.exited(&id)?;
    ensure!(status.exit_code == 7, "exit code {} of one that traps TERM", status.exit_code);
    ensure!(cri.log(&id)?.iter().any(|l| l.text == "bye"), "its last words are lost");

    let ignoring = ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"];
    let id = cri.run(&pod, container("ignoring", &image, &ignoring))?;
    std::thread::sleep(Duration::from_millis(500));
    let begin = Instant::now();
    cri.stop(&id, 2)?;
    let took = begin.elapsed();
    ensure!(took >= Duration::from_secs(2), "killed after {took:?}, before the grace");
    let status = cri.status(&id)?;
    ensure!(status.state == EXITED && status.exit_code == 137, "{status:?}");
    node.finish()
}

fn idempotent() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("twice")?;
    let cri = node.cri();
    let id = cri.run(&pod, container("c", &image, &["sleep", "1000"]))?;
    cri.stop(&id, 0)?;
    cri.stop(&id, 0)?;
    cri.remove(&id)?;
    cri.remove(&id)?;
    cri.stop_pod(&pod)?;
    cri.stop_pod(&pod)?;
    ensure!(!cri.pod_ready(&pod)?, "a stopped pod is ready");
    cri.remove_pod(&pod)?;
    cri.remove_pod(&pod)?;
    let unknown = "0123456789abcdef";
    cri.stop_pod(unknown)?;
    cri.remove_pod(unknown)?;
    cri.stop(unknown, 0)?;
    cri.remove(unknown)?;
    let code = |result: Result<(), tonic::Status>| result.map_err(|status| status.code());
    ensure!(code(cri.start(unknown)) == Err(Code::NotFound), "start of an unknown container");
    ensure!(code(cri.pod_status(unknown).map(drop)) == Err(Code::NotFound), "status of a pod");
    node.finish()
}

fn same_name() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let first = node.pod("same")?;
    let second = cri.run_pod(pod("same", &node.logs));
    ensure!(second.is_err(), "a second pod of the same name, uid and attempt was made");
    let config = container("c", &image, &["sleep", "1000"]);
    cri.create(&first, config.clone())?;
    let second = cri.create(&first, config);
    ensure!(second.is_err(), "a second container of the same name and attempt was made");
    ensure!(cri.pods()?.len() == 1 && cri.containers()?.len() == 1, "more than one is listed");
    node.finish()
}

fn with_pid(
    mut config: v1::ContainerConfig,
    mode: v1::NamespaceMode,
    target: &str,
) -> v1::ContainerConfig {
    config.linux.get_or_insert_default().security_context =
        Some(v1::LinuxContainerSecurityContext {
            namespace_options: Some(v1::NamespaceOption {
                pid: mode as i32,
                target_id: target.into(),
                ..Default::default()
            }),
            ..Default::default()
        });
    config
}

fn pid_modes() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("pids")?;
    let cri = node.cri();
    let sleeper = |name: &str| container(name, &image, &["sleep", "1000"]);
    let own = cri.run(&pod, with_pid(sleeper("own"), v1::NamespaceMode::Container, ""))?;
    ensure!(cri.shell(&own, "cat /proc/1/comm")? == "sleep", "it is not PID 1 of its own");
    let one = cri.run(&pod, with_pid(sleeper("one"), v1::NamespaceMode::Pod, ""))?;
    let two = cri.run(&pod, with_pid(sleeper("two"), v1::NamespaceMode::Pod, ""))?;
    ensure!(cri.shell(&one, "cat /proc/1/comm")? != "sleep", "the pod's PID 1 is a workload");
    let sleepers = cri.shell(&two, "grep -l sleep /proc/[0-9]*/comm | wc -l")?;
    ensure!(sleepers == "2", "{sleepers} sleepers are seen in the pod's namespace");
    let debug = cri.run(&pod, with_pid(sleeper("debug"), v1::NamespaceMode::Target, &own))?;
    let seen = cri.shell(&debug, "readlink /proc/self/ns/pid")?;
    ensure!(seen == cri.shell(&own, "readlink /proc/self/ns/pid")?, "not the target's namespace");
    node.finish()
}

fn environment() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("environment")?;
    let cri = node.cri();
    let mut config = container("c", &image, &["sh", "-c", "pwd; echo $GREETING $0", "zero"]);
    config.working_dir = "/made/for/me".into();
    config.envs = vec![v1::KeyValue { key: "GREETING".into(), value: "good day".into() }];
    let id = cri.run(&pod, config)?;
    ensure!(cri.exited(&id)?.exit_code == 0, "{:?}", cri.log(&id)?);
    let text: Vec<String> = cri.log(&id)?.into_iter().map(|l| l.text).collect();
    ensure!(text == ["/made/for/me", "good day zero"], "{text:?}");
    node.finish()
}

/// Pods of a soak by default; `NACELLE_SOAK` is another even number, 300 say.
const SOAK: usize = 4;

/// Resources of the daemon and its launcher.
#[derive(Debug, Clone, Copy)]
struct Resources {
    descriptors: usize,
    threads: usize,
    /// Anonymous memory, KiB.
    memory: usize,
}

impl Resources {
    fn now(daemon: u32) -> Result<Self> {
        let children = std::fs::read_to_string(format!("/proc/{daemon}/task/{daemon}/children"))?;
        let own = std::fs::read_link(format!("/proc/{daemon}/exe"))?;
        let launchers = children.split_whitespace().filter(|pid| {
            std::fs::read_link(format!("/proc/{pid}/exe")).is_ok_and(|exe| exe == own)
        });
        let mut total = Self { descriptors: 0, threads: 0, memory: 0 };
        for pid in launchers.chain([daemon.to_string().as_str()]) {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
            let number = |name: &str| {
                let line = status.lines().find_map(|line| line.strip_prefix(name));
                let word = line.and_then(|rest| rest.split_whitespace().next());
                word.and_then(|word| word.parse::<usize>().ok())
                    .with_context(|| format!("no {name} in the status of {pid}"))
            };
            total.descriptors += std::fs::read_dir(format!("/proc/{pid}/fd"))?.count();
            total.threads += number("Threads:")?;
            total.memory += number("RssAnon:")?;
        }
        Ok(total)
    }
}

fn soak() -> Result<()> {
    let pods = match std::env::var("NACELLE_SOAK") {
        Ok(text) => text.parse().context("NACELLE_SOAK is not a number")?,
        Err(_) => SOAK,
    };
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let run = |name: String| {
        let mut client = cri.runtime.clone();
        let request =
            v1::RunPodSandboxRequest { config: Some(pod(&name, &node.logs)), ..Default::default() };
        async move { client.run_pod_sandbox(request).await }
    };
    let mut first = None;
    for round in 0..pods.div_ceil(2) {
        let (one, two) = (format!("soak{round}a"), format!("soak{round}b"));
        let (one, two) = cri.block_on(async { tokio::join!(run(one), run(two)) });
        let (one, two) = (one?.into_inner().pod_sandbox_id, two?.into_inner().pod_sandbox_id);
        let id = cri.run(&one, container("c", &image, &["true"]))?;
        ensure!(cri.exited(&id)?.exit_code == 0, "round {round}");
        cri.run(&two, container("c", &image, &["sleep", "1000"]))?;
        let vmm = nix::unistd::Pid::from_raw(node.vmm_pid(&two)?);
        nix::sys::signal::kill(vmm, nix::sys::signal::Signal::SIGKILL)?;
        for pod in [one, two] {
            cri.stop_pod(&pod)?;
            cri.remove_pod(&pod)?;
        }
        let now = Resources::now(node.daemon_pid())?;
        let before = *first.get_or_insert(now);
        ensure!(now.descriptors <= before.descriptors + 4, "{before:?}, now {now:?}");
        // The blocking thread pools have a limit.
        ensure!(now.threads <= before.threads + 32, "{before:?}, now {now:?}");
        // The allocator keeps pages per thread.
        ensure!(now.memory <= before.memory + (16 << 10), "{before:?}, now {now:?}");
    }
    println!(
        "after the first two pods {first:?}, after {pods} {:?}",
        Resources::now(node.daemon_pid())?
    );
    node.nothing_left()?;
    node.finish()
}
