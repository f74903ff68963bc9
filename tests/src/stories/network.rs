//! The pod network, through real CNI plugins.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{container, pod};
use crate::node::Node;
use crate::registry::free_port;
use crate::wait;

pub const STORIES: &[Story] = &[
    ("pods reach each other over IPv4 and IPv6", pod_to_pod),
    ("a pod reaches its host and the host reaches the pod", pod_and_host),
    ("a host port is forwarded to its pod and removed with it", host_port),
    ("a pod's traffic is masqueraded with the host's address", leaves_masqueraded),
    ("DNS, hosts and host name follow the request", name_files),
    (
        "an error of a CNI plugin fails the pod with its message and leaves nothing behind",
        broken_plugin,
    ),
    ("a missing CNI configuration is reported as a condition with advice", no_configuration),
];

/// A busybox web server that answers every request with `text`.
fn server(image: &str, text: &str, port: u16) -> v1::ContainerConfig {
    let line =
        format!("mkdir /www; echo {text} > /www/index.html; exec httpd -f -p {port} -h /www");
    container("web", image, &["sh", "-c", &line])
}

fn get(address: &str, port: u16) -> Result<String> {
    let mut stream = TcpStream::connect((address, port))?;
    stream.set_read_timeout(Some(Duration::from_secs(10)))?;
    stream.write_all(b"GET / HTTP/1.0\r\n\r\n")?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    Ok(text.rsplit("\r\n\r\n").next().unwrap_or_default().trim().to_owned())
}

fn served(address: &str, port: u16) -> Result<String> {
    wait::until(&format!("{address}:{port} serves"), Duration::from_secs(20), || {
        Ok(get(address, port).ok().filter(|text| !text.is_empty()))
    })
}

fn pod_to_pod() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let (a, b) = (node.pod("a")?, node.pod("b")?);
    cri.run(&a, server(&image, "from-a", 80))?;
    let client = cri.run(&b, container("client", &image, &["sleep", "1000"]))?;
    let status = cri.pod_status(&a)?.status.context("status")?.network.context("network")?;
    ensure!(status.ip.starts_with(&node.subnet()), "address {}", status.ip);
    served(&status.ip, 80)?;
    let text = cri.shell(&client, &format!("wget -q -O - http://{}/", status.ip))?;
    ensure!(text == "from-a", "IPv4: {text}");
    let six = status.additional_ips.first().context("no IPv6 address")?.ip.clone();
    let text = cri.shell(&client, &format!("wget -q -O - http://[{six}]/"))?;
    ensure!(text == "from-a", "IPv6: {text}");
    node.finish()
}

fn pod_and_host() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let pod = node.pod("host")?;
    let id = cri.run(&pod, server(&image, "hello", 8080))?;
    ensure!(served(&cri.pod_address(&pod)?, 8080)? == "hello", "host to pod");
    let listener = std::net::TcpListener::bind("0.0.0.0:0")?;
    let port = listener.local_addr()?.port();
    let answer = std::thread::spawn(move || -> std::io::Result<()> {
        let (mut stream, _) = listener.accept()?;
        stream.write_all(b"HTTP/1.0 200 OK\r\n\r\nfrom the host\n")
    });
    let gateway = format!("{}.1", node.subnet());
    let text = cri.shell(&id, &format!("wget -q -O - http://{gateway}:{port}/"))?;
    ensure!(text == "from the host", "pod to host: {text}");
    answer.join().map_err(|_| anyhow::anyhow!("server"))??;
    ensure!(cri.shell(&id, "wget -q -O - http://127.0.0.1:8080/")? == "hello", "loopback");
    node.finish()
}

fn host_port() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let port = free_port()?;
    let mut config = pod("hostport", &node.logs);
    config.port_mappings = vec![v1::PortMapping {
        protocol: v1::Protocol::Tcp as i32,
        container_port: 80,
        host_port: port.into(),
        host_ip: String::new(),
    }];
    let pod = cri.run_pod(config)?;
    cri.run(&pod, server(&image, "through-the-port", 80))?;
    let gateway = format!("{}.1", node.subnet());
    ensure!(served(&gateway, port)? == "through-the-port", "by the host's address");
    ensure!(served("127.0.0.1", port)? == "through-the-port", "by loopback");
    cri.stop_pod(&pod)?;
    ensure!(get(&gateway, port).is_err(), "the port outlives its pod");
    node.finish()
}

fn leaves_masqueraded() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    // A network namespace represents the network outside of the node.
    let outside = Outside::make()?;
    let pod = node.pod("out")?;
    let id = cri.run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let seen = outside.peer_of(|| {
        cri.shell(&id, &format!("echo hi | nc -w 3 {} 7777", Outside::ADDRESS)).map(drop)
    })?;
    ensure!(seen == Outside::GATEWAY, "the outside sees {seen}");
    drop(outside);
    node.finish()
}

/// A network namespace behind a veth pair: the external network.
struct Outside;

impl Outside {
    const ADDRESS: &str = "192.0.2.2";
    const GATEWAY: &str = "192.0.2.1";

    fn make() -> Result<Self> {
        let this = Self;
        for line in [
            "netns add outside",
            "link add nclt-out type veth peer name eth0 netns outside",
            "addr add 192.0.2.1/24 dev nclt-out",
            "link set nclt-out up",
            "-n outside addr add 192.0.2.2/24 dev eth0",
            "-n outside link set eth0 up",
        ] {
            let output = std::process::Command::new("ip").args(line.split(' ')).output()?;
            ensure!(
                output.status.success(),
                "ip {line}: {:?}",
                String::from_utf8_lossy(&output.stderr)
            );
        }
        Ok(this)
    }

    /// The address from which the connection made by `dial` arrives outside.
    fn peer_of(&self, dial: impl FnOnce() -> Result<()>) -> Result<String> {
        let listener = std::thread::spawn(|| -> Result<String> {
            let netns = std::fs::File::open("/run/netns/outside")?;
            // On its own thread: setns changes the thread's namespace.
            nix::sched::setns(&netns, nix::sched::CloneFlags::CLONE_NEWNET)?;
            let listener = std::net::TcpListener::bind((Outside::ADDRESS, 7777))?;
            listener.set_nonblocking(true)?;
            wait::until("a connection arrives outside", Duration::from_secs(15), || {
                Ok(listener.accept().ok().map(|(_, peer)| peer.ip().to_string()))
            })
        });
        std::thread::sleep(Duration::from_millis(300));
        let dialed = dial();
        let seen = listener.join().map_err(|_| anyhow::anyhow!("listener"))?;
        dialed?;
        seen
    }
}

impl Drop for Outside {
    fn drop(&mut self) {
        let _ = std::process::Command::new("ip").args(["netns", "del", "outside"]).output();
        let _ = std::process::Command::new("ip").args(["link", "del", "nclt-out"]).output();
    }
}

fn name_files() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let cri = node.cri();
    let mut config = pod("names", &node.logs);
    config.dns_config = Some(v1::DnsConfig {
        servers: vec!["10.96.0.10".into()],
        searches: vec!["a.example".into(), "b.example".into()],
        options: vec!["ndots:5".into()],
    });
    let pod = cri.run_pod(config)?;
    let id = cri.run(&pod, container("c", &image, &["sleep", "1000"]))?;
    let text = cri.shell(&id, "cat /etc/resolv.conf")?;
    for line in ["nameserver 10.96.0.10", "search a.example b.example", "options ndots:5"] {
        ensure!(text.lines().any(|l| l == line), "resolv.conf lacks {line:?}: {text}");
    }
    ensure!(cri.shell(&id, "cat /etc/hostname")? == "names", "/etc/hostname");
    let hosts = cri.shell(&id, "cat /etc/hosts")?;
    ensure!(hosts.contains("localhost"), "/etc/hosts: {hosts}");
    node.finish()
}

fn broken_plugin() -> Result<()> {
    let node =
        Node::start_with(|config| config + "bin_dirs = [\"/var/lib/nacelle-stories/broken\"]\n")?;
    let folder = std::path::Path::new("/var/lib/nacelle-stories/broken");
    std::fs::create_dir_all(folder)?;
    for (script, words) in [
        (
            "#!/bin/sh\nif [ $CNI_COMMAND = DEL ]; then exit 0; fi\necho '{\"cniVersion\":\"1.0.0\",\"code\":11,\"msg\":\"no more wires\"}'; exit 1\n",
            "no more wires",
        ),
        ("#!/bin/sh\nif [ $CNI_COMMAND = DEL ]; then exit 0; fi\necho rubbish\n", "rubbish"),
    ] {
        for plugin in ["bridge", "portmap", "loopback", "host-local"] {
            let path = folder.join(plugin);
            std::fs::write(&path, script)?;
            std::os::unix::fs::chown(&path, Some(0), Some(0))?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
            std::fs::set_permissions(&path, mode)?;
        }
        let status = node.cri().run_pod(pod("broken", &node.logs)).unwrap_err();
        ensure!(status.message().contains(words), "{words:?} is not in: {status}");
        ensure!(node.cri().pods()?.is_empty(), "a failed pod is listed");
        node.nothing_left()?;
    }
    std::fs::remove_dir_all(folder)?;
    node.finish()
}

fn no_configuration() -> Result<()> {
    let node = Node::start()?;
    let conditions = |node: &Node| -> Result<v1::RuntimeCondition> {
        let mut client = node.cri().runtime.clone();
        let request = v1::StatusRequest { verbose: false };
        let reply = node.cri().block_on(async move { client.status(request).await })?;
        let status = reply.into_inner().status.context("no status")?;
        status.conditions.into_iter().find(|c| c.r#type == "NetworkReady").context("no condition")
    };
    ensure!(conditions(&node)?.status, "{:?}", conditions(&node)?);
    std::fs::remove_file(node.path("cni/10-nacelle.conflist"))?;
    let condition = conditions(&node)?;
    ensure!(!condition.status && condition.message.contains("cni"), "{condition:?}");
    let status = node.cri().run_pod(pod("none", &node.logs)).unwrap_err();
    ensure!(status.message().to_lowercase().contains("cni"), "{status}");
    node.finish()
}
