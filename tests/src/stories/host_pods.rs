//! Host pods (hostNetwork, hostPID, hostIPC): no VM, an agent on the host.

use std::io::Write;
use std::net::TcpListener;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use streaming::client::Websocket;
use tokio_tungstenite::tungstenite::Message;

use super::Story;
use crate::client::{container, mount, pod};
use crate::host::{self, Tmpfs};
use crate::node::Node;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("a host pod is rejected with the setting to change, unless the policy allows it", policy),
    ("a hostNetwork pod sees the host's listeners and host name, and has no address", network),
    ("a hostPID pod has its own network", processes),
    ("a hostIPC pod sees the host's shared memory", shared_memory),
    ("a host pod survives a killed daemon with its log and exit codes", killed_daemon),
    ("a host pod's processes end with its agent, also while the daemon is down", killed_agent),
    ("mounts of a container appear on the host, and the host's sockets and devices in it", mounts),
    ("limits of a host pod's containers are enforced", limits),
];

const NODE: i32 = v1::NamespaceMode::Node as i32;

/// A node whose policy allows host pods in the stories' namespace.
fn node() -> Result<Node> {
    let policy = "\n[cri.host_pods]\nenabled = true\nnamespaces = [\"stories\"]\n";
    Node::start_with(|config| config + policy)
}

fn options(network: bool, pid: bool, ipc: bool) -> v1::NamespaceOption {
    let mode = |of_host| if of_host { NODE } else { v1::NamespaceMode::Pod as i32 };
    v1::NamespaceOption {
        network: mode(network),
        pid: mode(pid),
        ipc: mode(ipc),
        ..Default::default()
    }
}

fn host_pod(name: &str, node: &Node, options: &v1::NamespaceOption) -> v1::PodSandboxConfig {
    let mut config = pod(name, &node.logs);
    if options.network == v1::NamespaceMode::Node as i32 {
        config.hostname.clear();
    }
    let linux = config.linux.get_or_insert_default();
    linux.security_context = Some(v1::LinuxSandboxSecurityContext {
        namespace_options: Some(options.clone()),
        privileged: true,
        ..Default::default()
    });
    config
}

/// As a kubelet requests it: with the namespace options of the pod.
fn with_options(
    options: &v1::NamespaceOption,
    mut config: v1::ContainerConfig,
) -> v1::ContainerConfig {
    let linux = config.linux.get_or_insert_default();
    let context = linux.security_context.get_or_insert_default();
    context.namespace_options = Some(options.clone());
    config
}

fn sleeper(options: &v1::NamespaceOption, image: &str) -> v1::ContainerConfig {
    with_options(options, container("c", image, &["sleep", "100000"]))
}

fn policy() -> Result<()> {
    let node = Node::start()?;
    let options = options(true, false, false);
    let refused = node.cri().run_pod(host_pod("p", &node, &options)).unwrap_err();
    ensure!(refused.message().contains("hostNetwork"), "{refused}");
    ensure!(refused.message().contains("`enabled = true` in [cri.host_pods]"), "{refused}");
    node.finish()?;
    let node = self::node()?;
    let mut config = host_pod("p", &node, &options);
    config.metadata.as_mut().context("metadata")?.namespace = "default".into();
    let refused = node.cri().run_pod(config).unwrap_err();
    ensure!(refused.message().contains("add the namespace \"default\""), "{refused}");
    let mut config = host_pod("p", &node, &options);
    config.hostname = "of-its-own".into();
    let refused = node.cri().run_pod(config).unwrap_err();
    ensure!(refused.message().starts_with("hostname: "), "{refused}");
    node.cri().run_pod(host_pod("p", &node, &options))?;
    node.finish()
}

fn network() -> Result<()> {
    let node = node()?;
    let image = node.image("busybox")?;
    let options = options(true, false, false);
    let cri = node.cri();
    let pod = cri.run_pod(host_pod("p", &node, &options))?;
    ensure!(cri.pod_address(&pod)?.is_empty(), "the host's addresses are not the pod's");
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let script = "netstat -ltn; hostname; cat /proc/1/cmdline; echo; exit 3";
    let config = with_options(&options, container("look", &image, &["sh", "-c", script]));
    let id = cri.run(&pod, config)?;
    ensure!(cri.exited(&id)?.exit_code == 3);
    let log: Vec<String> = cri.log(&id)?.into_iter().map(|line| line.text).collect();
    ensure!(log.iter().any(|line| line.contains(&format!("127.0.0.1:{port}"))), "{log:?}");
    let name = std::fs::read_to_string("/proc/sys/kernel/hostname")?;
    ensure!(log.iter().any(|line| line == name.trim()), "{log:?}");

    // Exec and port-forward reach the host's listener; the PID namespace is not the host's.
    let id = cri.run(&pod, sleeper(&options, &image))?;
    let answer = std::thread::spawn(move || -> Result<()> {
        for _ in 0..2 {
            listener.accept()?.0.write_all(b"hello\n")?;
        }
        Ok(())
    });
    let reply = cri.shell(&id, &format!("nc 127.0.0.1 {port} </dev/null"))?;
    ensure!(reply == "hello", "{reply}");
    let url = cri.forward_url(&pod, &[port])?;
    let reply = cri.block_on(async {
        let mut client = Websocket::connect(&url, "v4.channel.k8s.io").await;
        let mut reply = Vec::new();
        while let Some(Message::Binary(bytes)) = client.next().await {
            // Channel 0 begins with the port's number.
            if bytes.first() == Some(&0) {
                reply.extend_from_slice(&bytes[1..]);
            }
            if reply.len() >= 8 {
                break;
            }
        }
        reply
    });
    ensure!(reply.get(2..) == Some(b"hello\n"), "{reply:?}");
    answer.join().expect("no panic")?;
    let processes = cri.shell(&id, "ls -d /proc/[0-9]* | wc -l")?;
    ensure!(processes.parse::<u32>()? < 10, "{processes} processes");
    cri.shell(&id, "echo x >/written && test -w /tmp && ! touch /sys/x 2>/dev/null")?;
    node.finish()
}

fn processes() -> Result<()> {
    let node = node()?;
    let image = node.image("busybox")?;
    let options = options(false, true, false);
    let cri = node.cri();
    let pod = cri.run_pod(host_pod("p", &node, &options))?;
    let address = cri.pod_address(&pod)?;
    ensure!(address.starts_with(&node.subnet()), "{address}");
    let id = cri.run(&pod, sleeper(&options, &image))?;
    let daemon = node.daemon_pid();
    let line = format!("tr '\\0' ' ' </proc/{daemon}/cmdline; echo; hostname; ip addr show eth0");
    let seen = cri.shell(&id, &line)?;
    ensure!(seen.contains("nacelled") && seen.contains(&format!("inet {address}/")), "{seen}");
    ensure!(seen.lines().any(|line| line == "p"), "its name is its own: {seen}");
    let gateway = format!("{}.1", node.subnet());
    cri.shell(&id, &format!("ping -c 1 -W 5 {gateway}"))?;
    node.finish()
}

fn shared_memory() -> Result<()> {
    let node = node()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let file = tempfile::NamedTempFile::new_in("/dev/shm")?;
    let at = file.path().display().to_string();
    for (name, ipc) in [("with", true), ("without", false)] {
        // Without hostIPC it is still a host pod, because of hostPID.
        let options = options(false, !ipc, ipc);
        let pod = cri.run_pod(host_pod(name, &node, &options))?;
        let id = cri.run(&pod, sleeper(&options, &image))?;
        let seen = cri.exec(&id, &["test", "-e", &at])?.code == 0;
        ensure!(seen == ipc, "{name}: /dev/shm of the host is seen: {seen}");
        let own = std::fs::read_link("/proc/self/ns/ipc")?.display().to_string();
        let theirs = cri.shell(&id, "readlink /proc/self/ns/ipc")?;
        ensure!((own == theirs) == ipc, "{name}: {own} {theirs}");
    }
    node.finish()
}

fn killed_daemon() -> Result<()> {
    let mut node = node()?;
    let image = node.image("busybox")?;
    let options = options(true, true, false);
    let pod = node.cri().run_pod(host_pod("p", &node, &options))?;
    let line = "i=0; while [ $i -lt 4000 ]; do i=$((i+1)); echo line $i; done; exit 9";
    let lines = with_options(&options, container("lines", &image, &["sh", "-c", line]));
    let lines = node.cri().run(&pod, lines)?;
    let sleeping = node.cri().run(&pod, sleeper(&options, &image))?;
    let agent = node.vmm_pid(&pod)?;
    for _ in 0..3 {
        node.kill_daemon()?;
        std::thread::sleep(Duration::from_millis(100));
        node.start_daemon()?;
    }
    ensure!(node.cri().exited(&lines)?.exit_code == 9);
    let log = node.cri().log(&lines)?;
    ensure!(log.len() == 4000, "{} lines", log.len());
    for (at, line) in log.iter().enumerate() {
        ensure!(line.text == format!("line {}", at + 1), "{line:?} at {at}");
    }
    ensure!(node.cri().shell(&sleeping, "echo here")? == "here");
    ensure!(node.vmm_pid(&pod)? == agent, "another agent");
    node.cri().remove(&sleeping)?;
    node.finish()
}

fn killed_agent() -> Result<()> {
    let mut node = node()?;
    let image = node.image("busybox")?;
    let options = options(true, true, false);
    for down in [false, true] {
        let pod = node.cri().run_pod(host_pod("p", &node, &options))?;
        let id = node.cri().run(&pod, sleeper(&options, &image))?;
        let process = node.cri().shell(&id, "pidof sleep | tr ' ' '\\n' | tail -n 1")?;
        let agent = node.vmm_pid(&pod)?;
        if down {
            node.kill_daemon()?;
        }
        nix::sys::signal::kill(Pid::from_raw(agent), Signal::SIGKILL)?;
        if down {
            node.start_daemon()?;
        }
        let cri = node.cri();
        wait::until("the pod is not ready", Duration::from_secs(30), || {
            Ok((!cri.pod_ready(&pod)?).then_some(()))
        })?;
        let gone = format!("process {process} has gone");
        wait::until(&gone, Duration::from_secs(10), || {
            Ok((!Path::new("/proc").join(&process).exists()).then_some(()))
        })?;
        cri.remove_pod(&pod)?;
        node.nothing_left()?;
    }
    node.finish()
}

fn mounts() -> Result<()> {
    let node = node()?;
    let image = node.image("busybox")?;
    let options = options(true, false, false);
    let cri = node.cri();
    let folder = host::folder()?;
    let data = folder.path().join("data");
    let shared = Tmpfs::shared(&data)?;
    let socket = folder.path().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&socket)?;
    let pod = cri.run_pod(host_pod("p", &node, &options))?;
    let mut config = sleeper(&options, &image);
    let context = config.linux.get_or_insert_default().security_context.get_or_insert_default();
    context.privileged = true;
    config.mounts = vec![
        v1::Mount {
            propagation: v1::MountPropagation::PropagationBidirectional.into(),
            ..mount(&data, "/data")
        },
        mount(&socket, "/run/socket"),
    ];
    let id = cri.run(&pod, config)?;
    cri.shell(&id, "mkdir /data/in && mount -t tmpfs x /data/in && echo y >/data/in/file")?;
    ensure!(std::fs::read_to_string(data.join("in/file"))? == "y\n", "not on the host");
    let late = Tmpfs::mount(&data.join("late"), "size=1m")?;
    std::fs::write(data.join("late/file"), "z\n")?;
    ensure!(cri.shell(&id, "cat /data/late/file")? == "z", "not in the container");
    cri.shell(&id, "test -S /run/socket")?;
    let disk = std::fs::read_dir("/sys/block")?.flatten().map(|entry| entry.file_name());
    let disk = disk.map(|name| Path::new("/dev").join(name)).find(|path| path.exists());
    let disk = disk.context("the host has a disk")?.display().to_string();
    cri.shell(&id, &format!("test -b {disk}"))?;
    cri.remove(&id)?;
    ensure!(data.join("in/file").exists() && data.join("late/file").exists(), "unmounted");
    late.unmount()?;
    host::unmount(&data.join("in"))?;
    shared.unmount()?;
    node.finish()
}

fn limits() -> Result<()> {
    let controllers = std::fs::read_to_string("/sys/fs/cgroup/cgroup.controllers");
    if !controllers.is_ok_and(|all| all.contains("cpu") && all.contains("memory")) {
        println!("SKIP: this host's cgroup v2 has no controllers for CPU and memory");
        return Ok(());
    }
    let node = node()?;
    let image = node.image("busybox")?;
    let options = options(true, false, false);
    let cri = node.cri();
    let pod = cri.run_pod(host_pod("p", &node, &options))?;
    let mut config = sleeper(&options, &image);
    let linux = config.linux.get_or_insert_default();
    linux.resources = Some(v1::LinuxContainerResources {
        memory_limit_in_bytes: 32 << 20,
        memory_swap_limit_in_bytes: 32 << 20,
        cpu_quota: 20_000,
        cpu_period: 100_000,
        ..Default::default()
    });
    let id = cri.run(&pod, config.clone())?;
    let limit = cri.shell(&id, "cat /sys/fs/cgroup/memory.max /sys/fs/cgroup/cpu.max")?;
    ensure!(limit == "33554432\n20000 100000", "{limit}");
    config.metadata = Some(v1::ContainerMetadata { name: "hungry".into(), attempt: 0 });
    config.command = ["tail", "/dev/zero"].map(str::to_owned).into();
    let hungry = cri.run(&pod, config)?;
    let status = cri.exited(&hungry)?;
    ensure!(status.exit_code == 137 && status.reason == "OOMKilled", "{status:?}");
    ensure!(cri.shell(&id, "echo here")? == "here", "the other container was killed");
    node.finish()
}
