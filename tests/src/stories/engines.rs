//! Container engines in a privileged container: Docker and Podman with overlayfs, cgroups, networks
//! and builds of their own.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;

use anyhow::{Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{container, mount, pod};
use crate::host;
use crate::node::{Node, registry};

pub const STORIES: &[Story] = &[
    (
        "docker in a pod uses overlay2 in any data directory, pulls, builds, limits, publishes",
        docker,
    ),
    ("podman in a pod builds an image and runs containers of it", podman),
];

const SCRIPT: &str = include_str!("engines.sh");
/// Seconds for one run of the script.
const LIMIT: i64 = 400;
const MEMORY: i64 = 1 << 30;

/// Forwards a port of the pods' gateway to one of the host's loopback interface.
fn relay(gateway: &str, port: u16) -> Result<SocketAddr> {
    let listener = TcpListener::bind((gateway, 0))?;
    let address = listener.local_addr()?;
    // Both threads of a connection end with it, the accepting one with the program.
    std::thread::spawn(move || {
        for client in listener.incoming() {
            let Ok((client, server)) =
                client.and_then(|client| Ok((client, TcpStream::connect(("127.0.0.1", port))?)))
            else {
                continue;
            };
            let Ok((from, to)) = client.try_clone().and_then(|c| Ok((c, server.try_clone()?)))
            else {
                continue;
            };
            std::thread::spawn(move || pass(from, to));
            std::thread::spawn(move || pass(server, client));
        }
    });
    Ok(address)
}

fn pass(mut from: TcpStream, mut to: TcpStream) {
    // An error on one side closes the other side, too.
    let _ = io::copy(&mut from, &mut to);
    let _ = to.shutdown(std::net::Shutdown::Write);
}

struct Engine {
    node: Node,
    id: String,
    registry: SocketAddr,
}

impl Engine {
    /// A privileged container with the engines, and an emptyDir at /empty.
    fn start(kubelet: &Path) -> Result<Self> {
        let node = Node::start()?;
        node.image("busybox")?;
        let image = node.image("engines")?;
        let mut config = pod("engines", &node.logs);
        let uid = config.metadata.clone().unwrap_or_default().uid;
        let empty = kubelet.join("pods").join(uid).join("volumes/kubernetes.io~empty-dir/empty");
        std::fs::create_dir_all(&empty)?;
        let linux = config.linux.get_or_insert_default();
        linux.security_context =
            Some(v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() });
        linux.resources = Some(v1::LinuxContainerResources {
            memory_limit_in_bytes: MEMORY,
            ..Default::default()
        });
        let pod = node.cri().run_pod(config)?;
        std::fs::write(kubelet.join("engines.sh"), SCRIPT)?;
        let mut config = container("engines", &image, &["sleep", "3000"]);
        config.mounts =
            vec![mount(&empty, "/empty"), mount(&kubelet.join("engines.sh"), "/engines.sh")];
        config.linux.get_or_insert_default().security_context =
            Some(v1::LinuxContainerSecurityContext { privileged: true, ..Default::default() });
        let id = node.cri().run(&pod, config)?;
        let registry = relay(&format!("{}.1", node.subnet()), registry().port)?;
        Ok(Self { node, id, registry })
    }

    fn run(&self, data: &str, mode: &str, wanted: &[&str]) -> Result<()> {
        let registry = self.registry.to_string();
        let command = ["sh", "/engines.sh", data, mode, &registry];
        let output = self.node.cri().exec_within(&self.id, &command, LIMIT)?;
        let lines: Vec<&str> = output.stdout.lines().collect();
        if lines != wanted || output.code != 0 {
            let log =
                self.node.cri().exec(&self.id, &["tail", "-n", "5", "/var/log/dockerd.log"])?;
            anyhow::bail!("{mode} with {data}: {output:?}; {}", log.stdout);
        }
        Ok(())
    }
}

fn docker() -> Result<()> {
    let kubelet = host::folder()?;
    let engine = Engine::start(kubelet.path())?;
    let (driver, limit) = ("driver overlay2, cgroup 2", "33554432");
    let full = [
        driver,
        "pulled",
        limit,
        "built",
        "built by BuildKit",
        "built",
        "built",
        "by-exec",
        "left 0",
    ];
    engine.run("/empty/docker", "full", &full)?;
    for data in ["/var/lib/docker", "/volume/docker"] {
        engine.run(data, "brief", &[driver, "pulled", limit, "left 0"])?;
    }
    // An exec joins the container, whose processes have moved to a cgroup of their own.
    let output = engine.node.cri().exec(&engine.id, &["cat", "/proc/self/cgroup"])?;
    ensure!(output.code == 0, "{output:?}");
    engine.node.finish()
}

fn podman() -> Result<()> {
    let kubelet = host::folder()?;
    let engine = Engine::start(kubelet.path())?;
    let wanted = ["driver overlay", "built", "33554432", "built", "built", "left 0"];
    engine.run("", "podman", &wanted)?;
    engine.node.finish()
}
