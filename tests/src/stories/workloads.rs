//! Typical pods: a web server as a proxy, a database that is killed, a VPN sidecar, debug
//! containers, process limits.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use cri::v1;

use super::Story;
use crate::client::{Cri, container, mount, pod};
use crate::node::Node;
use crate::{host, wait};

pub const STORIES: &[Story] = &[
    (
        "nginx proxies to a socket in an emptyDir, and debug containers trace both programs",
        sidecars,
    ),
    ("redis keeps its append-only file on a volume after kill -9", redis),
    ("WireGuard sidecars connect two pods", wireguard),
    ("a process has resource limits, core dumps and the requested time zone", process),
];

const LIMIT: Duration = Duration::from_secs(60);

/// An HTTP server on a unix socket.
const PROGRAM: &str = "
import http.server, os, socket, socketserver
class Handler(http.server.BaseHTTPRequestHandler):
    def address_string(self): return 'nginx'
    def do_GET(self):
        body = b'from the program'
        self.send_response(200)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        self.wfile.write(body)
class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer): pass
os.umask(0)
Server('/run/shared/program.sock', Handler).serve_forever()
";

const NGINX: &str = "
events {}
http {
    server {
        listen 8080;
        location / { proxy_pass http://unix:/run/shared/program.sock; }
    }
}
";

fn with_capabilities(mut config: v1::ContainerConfig, add: &[&str]) -> v1::ContainerConfig {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().capabilities = Some(v1::Capability {
        add_capabilities: add.iter().map(ToString::to_string).collect(),
        ..Default::default()
    });
    config
}

/// Shares the PID namespace of another container, as with `kubectl debug --target`.
fn with_target(mut config: v1::ContainerConfig, target: &str) -> v1::ContainerConfig {
    let linux = config.linux.get_or_insert_default();
    linux.security_context.get_or_insert_default().namespace_options = Some(v1::NamespaceOption {
        pid: v1::NamespaceMode::Target as i32,
        target_id: target.into(),
        ..Default::default()
    });
    config
}

fn sidecars() -> Result<()> {
    let node = Node::start()?;
    let (nginx, python) = (node.image("nginx")?, node.image("python")?);
    let tools = node.image("kernel-tools")?;
    let kubelet = host::folder()?;
    let config = pod("web", &node.logs);
    let uid = config.metadata.clone().unwrap_or_default().uid;
    let shared = kubelet.path().join("pods").join(uid).join("volumes/kubernetes.io~empty-dir/run");
    fs::create_dir_all(&shared)?;
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777))?;
    fs::write(kubelet.path().join("nginx.conf"), NGINX)?;
    let pod = node.cri().run_pod(config)?;
    let cri = node.cri();
    let mounts = vec![
        mount(&shared, "/run/shared"),
        mount(&kubelet.path().join("nginx.conf"), "/etc/nginx/nginx.conf"),
    ];
    let config = container("program", &python, &["python3", "-c", PROGRAM]);
    let program = cri.run(&pod, v1::ContainerConfig { mounts: mounts.clone(), ..config })?;
    let config = container("nginx", &nginx, &[]);
    let server = cri.run(&pod, v1::ContainerConfig { mounts, ..config })?;
    let url = format!("http://{}:8080/", cri.pod_address(&pod)?);
    let mut last = String::new();
    let get = || -> Result<Option<String>> {
        let request = ["-sS", "--fail", "--max-time", "10", &url];
        let output = std::process::Command::new("curl").args(request).output()?;
        last = String::from_utf8_lossy(&output.stderr).into_owned();
        Ok(output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned()))
    };
    // Two interpreters start on one emulated CPU.
    let page = wait::until("nginx serves the program's page", Duration::from_secs(240), get);
    let page = page.with_context(|| {
        let logs = [&program, &server].map(|id| (cri.status(id), cri.log(id)));
        format!("the last answer: {last} status and log of the program and of nginx: {logs:#?}")
    })?;
    ensure!(page == "from the program", "{page}");

    // strace of the program and tcpdump of the pod's interface, each in a debug container.
    let config = container("strace", &tools, &["sleep", "1000"]);
    let strace =
        cri.run(&pod, with_capabilities(with_target(config, &program), &["SYS_PTRACE"]))?;
    let trace = "timeout 20 strace -f -e trace=accept4 -o /trace -p 1 2> /dev/null & \
        until grep -q TracerPid:.*[1-9] /proc/1/status; do sleep 0.2; done; echo attached; wait; \
        grep -c accept4 /trace";
    let capture = "timeout 60 tcpdump -i eth0 -c 3 -w /capture tcp port 8080 2> /log & \
        until grep -q listening /log; do sleep 0.2; done; wait; tcpdump -nr /capture 2> /dev/null | wc -l";
    let tcpdump = container("tcpdump", &tools, &["bash", "-c", capture]);
    let tcpdump = cri.run(&pod, with_capabilities(tcpdump, &["NET_ADMIN", "NET_RAW"]))?;
    let requests = std::thread::spawn({
        let url = url.clone();
        move || {
            for _ in 0..40 {
                let _ = std::process::Command::new("curl").args(["-sf", &url]).output();
                std::thread::sleep(Duration::from_millis(500));
            }
        }
    });
    let traced = cri.exec_within(&strace, &["bash", "-c", trace], 170)?;
    requests.join().map_err(|_| anyhow::anyhow!("the requests"))?;
    let calls: u32 = traced.stdout.lines().last().unwrap_or_default().parse().unwrap_or(0);
    ensure!(traced.stdout.starts_with("attached") && calls > 0, "strace: {traced:?}");
    let status = cri.exited(&tcpdump)?;
    let log = cri.log(&tcpdump)?;
    let last = log.last().map(|line| line.text.clone()).unwrap_or_default();
    ensure!(status.exit_code == 0 && last == "3", "tcpdump: {status:?} {log:?}");
    node.finish()
}

fn redis() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("redis")?;
    let folder = host::folder()?;
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777))?;
    let pod = node.pod("redis")?;
    let cri = node.cri();
    let command =
        ["redis-server", "--dir", "/data", "--appendonly", "yes", "--appendfsync", "always"];
    let run = |attempt: u32| -> Result<String> {
        let config = v1::ContainerConfig {
            metadata: Some(v1::ContainerMetadata { name: "redis".into(), attempt }),
            mounts: vec![mount(folder.path(), "/data")],
            log_path: format!("redis/{attempt}.log"),
            ..container("redis", &image, &command)
        };
        let id = cri.run(&pod, config)?;
        wait::until("redis answers", LIMIT, || {
            let output = cri.exec(&id, &["redis-cli", "ping"])?;
            Ok((output.stdout.trim() == "PONG").then_some(()))
        })?;
        Ok(id)
    };
    let first = run(0)?;
    let count = "for n in $(seq 50); do redis-cli incr counter; done | tail -n 1";
    ensure!(cri.shell(&first, count)? == "50", "fifty increments");
    // SIGKILL to PID 1 of a PID namespace has to come from outside of it.
    cri.stop(&first, 0)?;
    ensure!(cri.exited(&first)?.exit_code == 137, "redis was not killed");
    let second = run(1)?;
    let found = cri.shell(&second, "redis-cli get counter; redis-cli dbsize")?;
    ensure!(found == "50\n1", "after the kill: {found}");
    node.finish()
}

/// A pod with a sidecar that may configure its network, and a program beside it.
struct Peer {
    address: String,
    sidecar: String,
    program: String,
}

impl Peer {
    fn start(node: &Node, name: &str, tools: &str, busybox: &str) -> Result<Self> {
        let pod = node.pod(name)?;
        let cri = node.cri();
        let sidecar = container("sidecar", tools, &["sleep", "1000"]);
        let serve = format!(
            "mkdir -p /www; echo page of {name} > /www/index.html; \
            exec httpd -f -p 80 -h /www"
        );
        Ok(Self {
            address: cri.pod_address(&pod)?,
            sidecar: cri.run(&pod, with_capabilities(sidecar, &["NET_ADMIN"]))?,
            program: cri.run(&pod, container("program", busybox, &["sh", "-c", &serve]))?,
        })
    }

    /// Creates the interface; returns its public key.
    fn key(&self, cri: &Cri, number: u8) -> Result<String> {
        let make = format!(
            "set -e; umask 77; wg genkey > /key; ip link add wg0 type wireguard
            wg set wg0 listen-port 51820 private-key /key
            ip address add 10.99.0.{number}/24 dev wg0; ip link set wg0 up; wg pubkey < /key"
        );
        cri.shell(&self.sidecar, &make)
    }
}

fn wireguard() -> Result<()> {
    let node = Node::start()?;
    let (tools, busybox) = (node.image("kernel-tools")?, node.image("busybox")?);
    let one = Peer::start(&node, "one", &tools, &busybox)?;
    let two = Peer::start(&node, "two", &tools, &busybox)?;
    let cri = node.cri();
    let (key_one, key_two) = (one.key(cri, 1)?, two.key(cri, 2)?);
    for (peer, other, key, number) in [(&one, &two, &key_two, 2), (&two, &one, &key_one, 1)] {
        let set = format!(
            "wg set wg0 peer {key} endpoint {}:51820 allowed-ips 10.99.0.{number}/32",
            other.address
        );
        cri.shell(&peer.sidecar, &set)?;
    }
    let page = cri.shell(&one.program, "timeout 30 wget -q -O - http://10.99.0.2/")?;
    ensure!(page == "page of two", "{page}");
    let moved = cri.shell(&two.sidecar, "wg show wg0 transfer | cut -f 2")?;
    ensure!(moved.parse::<u64>().context("bytes received")? > 0, "{moved} bytes went the tunnel");
    node.finish()
}

fn process() -> Result<()> {
    let node = Node::start()?;
    let image = node.image("busybox")?;
    let zones = host::folder()?;
    // "Etc/GMT-5" as zic compiles it: version 1, one local time type, 5 h east of UTC.
    let mut zone = b"TZif".to_vec();
    zone.extend([0; 16]);
    for count in [0u32, 0, 0, 0, 1, 4] {
        zone.extend(count.to_be_bytes());
    }
    zone.extend(18000i32.to_be_bytes());
    zone.extend(b"\0\0+05\0");
    fs::write(zones.path().join("localtime"), zone)?;
    let pod = node.pod("process")?;
    let cri = node.cri();
    let mut config = container("c", &image, &["sleep", "1000"]);
    config.mounts = vec![mount(&zones.path().join("localtime"), "/etc/localtime")];
    let id = cri.run(&pod, config)?;
    ensure!(cri.shell(&id, "date +%z")? == "+0500", "the zone of /etc/localtime");
    ensure!(cri.shell(&id, "TZ=UTC-2 date +%z")? == "+0200", "the zone of TZ");
    // RLIMIT_NOFILE is not lower than with runc, and can be lowered.
    let files: u64 = cri.shell(&id, "ulimit -n")?.parse().context("ulimit -n")?;
    ensure!(files >= 1024, "{files} descriptors");
    let refused = cri.exec(&id, &["sh", "-c", "ulimit -n 5; exec 3<&0 4<&0 5<&0"])?;
    ensure!(refused.code != 0, "a sixth descriptor: {refused:?}");
    let core = "mkdir -p /cores; cd /cores; ulimit -c unlimited; sh -c 'kill -SEGV $$'; \
        echo $?; cat /proc/sys/kernel/core_pattern; ls /cores | wc -l; \
        head -c 4 /cores/core* | tail -c 3";
    let dumped = cri.shell(&id, core)?;
    let lines: Vec<&str> = dumped.lines().filter(|line| !line.contains("fault")).collect();
    ensure!(lines.first() == Some(&"139") && lines.last() == Some(&"ELF"), "{dumped}");
    let none = cri.shell(&id, "cd /; ulimit -c 0; sh -c 'kill -SEGV $$'; ls /core* -d")?;
    ensure!(none.lines().last() == Some("/cores"), "a core dump with a limit of 0: {none}");
    node.finish()
}
