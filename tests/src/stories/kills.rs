//! SIGKILL of any process at any moment.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{container, parse_log, pod};
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("a killed daemon loses no pod, no log line and no exit code", daemon_under_output),
    ("a daemon killed at any phase of a pod's start leaves nothing behind", daemon_while_starting),
    ("a daemon killed at any phase of a container recovers its state", daemon_in_container_phases),
    ("a killed VMM makes its pod not ready with a reason", vmm),
    ("a stopped VMM blocks no other call, and its pod can be removed", stopped_vmm),
    ("a VMM killed while the daemon is down is detected at the next start", vmm_while_daemon_down),
    ("a graceful stop leaves pods running", stop),
];

fn daemon_under_output() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("lines")?;
    let line = "i=0; while [ $i -lt 40000 ]; do i=$((i+1)); echo line $i; done; exit 9";
    let id = node.cri().run(&pod, container("c", &image, &["sh", "-c", line]))?;
    for _ in 0..4 {
        std::thread::sleep(Duration::from_millis(250));
        node.kill_daemon()?;
        std::thread::sleep(Duration::from_millis(150));
        node.start_daemon()?;
    }
    let status = node.cri().exited(&id)?;
    ensure!(status.exit_code == 9, "{status:?}");
    let bytes = std::fs::read(&status.log_path)?;
    let lines: Vec<String> = parse_log(&bytes)?.into_iter().map(|l| l.text).collect();
    for (at, line) in lines.iter().enumerate() {
        ensure!(*line == format!("line {}", at + 1), "line {} of the log is {line:?}", at + 1);
    }
    ensure!(lines.len() == 40_000, "{} lines", lines.len());
    node.finish()
}

fn daemon_while_starting() -> Result<()> {
    let mut node = Node::start()?;
    node.image("busybox")?;
    for (round, delay) in [5u64, 120, 500, 900, 2000].into_iter().enumerate() {
        let name = format!("start{round}");
        let config = pod(&name, &node.logs);
        let mut client = node.cri().runtime.clone();
        let request = v1::RunPodSandboxRequest { config: Some(config), ..Default::default() };
        node.cri().block_on(async move {
            let call = client.run_pod_sandbox(request);
            // Either it is finished by then, or it is interrupted.
            let _ = tokio::time::timeout(Duration::from_millis(delay), call).await;
        });
        node.kill_daemon()?;
        node.start_daemon()?;
        // What is listed can be removed; the same pod can be created again; nothing is left.
        for left in node.cri().pods()? {
            node.cri().remove_pod(&left.id).with_context(|| format!("after {delay} ms"))?;
        }
        // The name is reserved until the interrupted start is undone; a kubelet retries, too.
        let second = wait::until("the pod's name is free", Duration::from_secs(60), || match node
            .cri()
            .run_pod(pod(&name, &node.logs))
        {
            Ok(id) => Ok(Some(id)),
            Err(status) if status.code() == tonic::Code::AlreadyExists => Ok(None),
            Err(status) => Err(status).with_context(|| format!("second after {delay} ms")),
        })?;
        ensure!(node.cri().pod_ready(&second)?, "after {delay} ms");
        node.cri().remove_pod(&second)?;
        node.nothing_left().with_context(|| format!("after a kill at {delay} ms"))?;
    }
    node.finish()
}

fn daemon_in_container_phases() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("phases")?;
    let kill = |node: &mut Node| -> Result<()> {
        node.kill_daemon()?;
        node.start_daemon()
    };
    let created = node.cri().create(&pod, container("c", &image, &["sleep", "1000"]))?;
    kill(&mut node)?;
    let state = |node: &Node, id: &str| Ok::<_, anyhow::Error>(node.cri().status(id)?.state);
    ensure!(
        state(&node, &created)? == v1::ContainerState::ContainerCreated as i32,
        "a created container is not so after a kill"
    );
    node.cri().start(&created)?;
    kill(&mut node)?;
    ensure!(node.cri().shell(&created, "echo here")? == "here", "exec after a kill");
    // It exits while the daemon is down.
    let short = container("short", &image, &["sh", "-c", "sleep 1; exit 5"]);
    let short = node.cri().run(&pod, short)?;
    node.kill_daemon()?;
    std::thread::sleep(Duration::from_secs(2));
    node.start_daemon()?;
    ensure!(node.cri().exited(&short)?.exit_code == 5, "its exit code is lost");
    node.cri().stop(&created, 0)?;
    kill(&mut node)?;
    ensure!(node.cri().status(&created)?.exit_code == 137, "exit code of a stopped container");
    node.cri().remove(&created)?;
    kill(&mut node)?;
    ensure!(node.cri().containers()?.len() == 1, "a removed container came back");
    node.cri().stop_pod(&pod)?;
    kill(&mut node)?;
    ensure!(!node.cri().pod_ready(&pod)?, "a stopped pod is ready again");
    node.finish()
}

fn signal(pid: i32, signal: nix::sys::signal::Signal) -> Result<()> {
    Ok(nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), signal)?)
}

fn becomes_not_ready(node: &Node, pod: &str) -> Result<()> {
    wait::until("the pod is not ready", Duration::from_secs(90), || {
        Ok((!node.cri().pod_ready(pod)?).then_some(()))
    })
}

fn vmm() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("killed")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    signal(node.vmm_pid(&pod)?, nix::sys::signal::Signal::SIGKILL)?;
    becomes_not_ready(&node, &pod)?;
    let status = node.cri().exited(&id)?;
    ensure!(status.exit_code != 0, "a container that died with its VM has exit code 0");
    ensure!(!status.reason.is_empty(), "no reason");
    let exec = node.cri().exec(&id, &["true"]).unwrap_err();
    ensure!(exec.message().contains("is not ready"), "{exec}");
    let other = node.pod("other")?;
    ensure!(node.cri().pod_ready(&other)?, "another pod is affected");
    node.finish()
}

fn stopped_vmm() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("frozen")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let pid = node.vmm_pid(&pod)?;
    signal(pid, nix::sys::signal::Signal::SIGSTOP)?;
    let begin = std::time::Instant::now();
    ensure!(node.cri().pods()?.len() == 1 && node.cri().containers()?.len() == 1, "listing");
    node.cri().status(&id)?;
    // A call into the guest has ten seconds.
    ensure!(begin.elapsed() < Duration::from_secs(8), "listing waits for a guest");
    let exec = node.cri().exec_within(&id, &["true"], 5);
    ensure!(exec.is_err(), "an exec in a frozen VM succeeded");
    node.cri().remove_pod(&pod)?;
    node.finish()
}

fn vmm_while_daemon_down() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("away")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let pid = node.vmm_pid(&pod)?;
    node.kill_daemon()?;
    signal(pid, nix::sys::signal::Signal::SIGKILL)?;
    node.start_daemon()?;
    becomes_not_ready(&node, &pod)?;
    ensure!(node.cri().exited(&id)?.exit_code != 0, "exit code 0");
    node.finish()
}

fn stop() -> Result<()> {
    let mut node = Node::start()?;
    let image = node.image("busybox")?;
    let pod = node.pod("stop")?;
    let id = node.cri().run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let pid = node.vmm_pid(&pod)?;
    let status = node.stop_daemon()?;
    ensure!(status.success(), "nacelled ended with {status}");
    signal(pid, nix::sys::signal::Signal::SIGCONT).context("the VMM went with the daemon")?;
    node.start_daemon()?;
    ensure!(node.cri().shell(&id, "echo here")? == "here", "exec after a restart");
    node.finish()
}
