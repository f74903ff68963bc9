//! A test host: a client of the agent's gRPC service and streams. The agent is either an ordinary
//! process in namespaces of its own (`guest`; needs root and Debian's busybox-static), or PID 1 of
//! a microVM (`boot`; needs KVM, nacelle-vmm and a guest kernel). Prints SKIP if something is
//! missing.
#![allow(dead_code)] // each test binary uses a part of it

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use agent_api::stdio::{Kind, Open, Status};
use agent_api::v1::agent_client::AgentClient;
use agent_api::{forward, v1};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Timeout of all waits; guests in an emulated machine are slow.
pub const TIMEOUT: Duration = Duration::from_secs(40);

pub struct Guest {
    pub child: Child,
    pub dir: tempfile::TempDir,
    pub client: AgentClient<Channel>,
    /// Serial of the containers' image.
    lower: String,
    transport: Transport,
}

/// How to connect to the agent.
#[derive(Debug, Clone)]
enum Transport {
    /// A directory with a Unix socket for each port.
    Directory(PathBuf),
    /// The vsock socket of nacelle-vmm: `CONNECT <port>`, answered with `OK <port>`.
    Vsock(PathBuf),
}

impl Transport {
    async fn connect(&self, port: u32) -> std::io::Result<UnixStream> {
        match self {
            Self::Directory(dir) => {
                let name = match port {
                    agent_api::STDIO_PORT => "stdio.sock",
                    agent_api::FORWARD_PORT => "forward.sock",
                    _ => "control.sock",
                };
                UnixStream::connect(dir.join(name)).await
            }
            Self::Vsock(path) => {
                let mut conn = UnixStream::connect(path).await?;
                conn.write_all(format!("CONNECT {port}\n").as_bytes()).await?;
                let mut answer = Vec::new();
                while !answer.ends_with(b"\n") {
                    answer.push(conn.read_u8().await?);
                }
                assert!(answer.starts_with(b"OK "), "{}", String::from_utf8_lossy(&answer));
                Ok(conn)
            }
        }
    }

    async fn client(&self) -> Result<AgentClient<Channel>, tonic::transport::Error> {
        let transport = self.clone();
        let channel = Endpoint::from_static("http://agent")
            .connect_with_connector(tower::service_fn(move |_| {
                let transport = transport.clone();
                async move { transport.connect(agent_api::CONTROL_PORT).await.map(TokioIo::new) }
            }))
            .await?;
        Ok(AgentClient::new(channel).max_decoding_message_size(agent_api::MAX_MESSAGE))
    }
}

/// Starts an agent as an ordinary process; prints SKIP and returns None if that is not possible.
pub async fn guest() -> Option<Guest> {
    let dir = root_dir()?;
    let child = Command::new("unshare")
        .args(["-mpuiCn", "--fork", "--mount-proc", "--kill-child"])
        .arg(env!("CARGO_BIN_EXE_nacelle-agent"))
        .arg("--listen-unix")
        .arg(dir.path())
        .env("NACELLE_LOG", "debug")
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let lower = format!("dir:{}", dir.path().join("root").display());
    Some(Guest::in_dir(child, dir, lower).await)
}

/// Creates a directory with a root file system in `root`; prints SKIP and returns None if
/// containers cannot run as ordinary processes.
pub fn root_dir() -> Option<tempfile::TempDir> {
    let Some(busybox) = busybox() else {
        println!("SKIP: no static busybox (apt-get install busybox-static)");
        return None;
    };
    if !nix::unistd::getuid().is_root() {
        println!("SKIP: not root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    make_root(&dir.path().join("root"), &busybox);
    Some(dir)
}

/// Serializes the tests with VMs: two at once in an emulated machine only slow each other down.
pub async fn serialize() -> tokio::sync::MutexGuard<'static, ()> {
    static VM_LOCK: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
    VM_LOCK.lock().await
}

/// Boots nacelle's own kernel.
pub async fn boot() -> Guest {
    boot_with("vmlinux", "initramfs.cpio", &[]).await
}

/// Boots a microVM with an EROFS disk (`disk0`) and an empty ext4 disk (`disk1`).
///
/// # Panics
/// If a file or a program that it needs is missing.
pub async fn boot_with(kernel: &str, initramfs: &str, extra: &[&str]) -> Guest {
    let assets = PathBuf::from(std::env::var_os("NACELLE_GUEST").expect("NACELLE_GUEST"));
    for asset in [kernel, initramfs] {
        assert!(assets.join(asset).exists(), "no {asset} in {}", assets.display());
    }
    let busybox = busybox().expect("a static busybox (apt-get install busybox-static)");
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    make_root(&path("root"), &busybox);
    let image = Command::new("mkfs.erofs").arg(path("image")).arg(path("root")).output().unwrap();
    assert!(image.status.success(), "{image:?}");
    std::fs::File::create(path("scratch")).unwrap().set_len(256 << 20).unwrap();
    let scratch = Command::new("mke2fs").args(["-q", "-t", "ext4"]).arg(path("scratch")).output();
    assert!(scratch.unwrap().status.success());
    let child = Command::new("nacelle-vmm")
        .arg("boot")
        .arg("--kernel")
        .arg(assets.join(kernel))
        .arg("--initramfs")
        .arg(assets.join(initramfs))
        .arg("--disk")
        .arg(format!("{}:ro", path("image").display()))
        .arg("--disk")
        .arg(path("scratch"))
        .arg("--vsock-path")
        .arg(path("vsock"))
        .arg("--control")
        .arg(path("control"))
        .args(extra)
        .args(["--memory", "512", "--vcpus", "2", "--cmdline", "nacelle.log=debug"])
        .arg("--status")
        .arg(path("status.json"))
        .stdin(Stdio::null())
        .spawn()
        .unwrap();
    let transport = Transport::Vsock(path("vsock"));
    let start = Instant::now();
    let client = loop {
        match transport.client().await {
            Ok(client) => break client,
            Err(error) => {
                assert!(start.elapsed() < 3 * TIMEOUT, "the agent does not answer: {error:?}");
            }
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    };
    println!("first reply of the agent after {:?}", start.elapsed());
    Guest { child, dir, client, lower: "disk0".to_owned(), transport }
}

fn busybox() -> Option<PathBuf> {
    let path = PathBuf::from("/usr/bin/busybox");
    let text = Command::new("ldd").arg(&path).output().ok()?;
    // For a static binary ldd prints this to stderr and fails.
    let is_static = !text.status.success() || text.stdout.starts_with(b"\tstatically");
    (path.exists() && is_static).then_some(path)
}

fn make_root(root: &Path, busybox: &Path) {
    for dir in ["bin", "etc", "tmp", "dev", "proc", "sys", "home/web"] {
        std::fs::create_dir_all(root.join(dir)).unwrap();
    }
    let open = std::os::unix::fs::PermissionsExt::from_mode(0o1777);
    std::fs::set_permissions(root.join("tmp"), open).unwrap();
    std::fs::copy(busybox, root.join("bin/busybox")).unwrap();
    let output = Command::new(busybox).arg("--list").output().unwrap();
    for applet in String::from_utf8(output.stdout).unwrap().lines() {
        let _ = std::os::unix::fs::symlink("busybox", root.join("bin").join(applet));
    }
    let passwd = "root:x:0:0::/root:/bin/sh\nweb:x:101:102::/home/web:/bin/sh\n";
    std::fs::write(root.join("etc/passwd"), passwd).unwrap();
    let group = "root:x:0:\nweb:x:102:web\nlog:x:200:web\nwheel:x:10:root\n";
    std::fs::write(root.join("etc/group"), group).unwrap();
    std::fs::write(root.join("bin/text"), "not a program\n").unwrap();
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let name = self.dir.path().file_name().unwrap().to_str().unwrap();
        remove_cgroup(&format!("nacelle-agent-{}", name.trim_start_matches('.')));
    }
}

/// Removes the cgroups of an agent that was killed with its PID namespace.
fn remove_cgroup(name: &str) {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap();
    let Some(mount) = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2")) else {
        return;
    };
    let dir = Path::new(mount.split(' ').nth(1).unwrap()).join(name);
    let start = Instant::now();
    while dir.exists() && start.elapsed() < TIMEOUT {
        for entry in std::fs::read_dir(&dir).unwrap().flatten() {
            let _ = std::fs::remove_dir(entry.path());
        }
        let _ = std::fs::remove_dir(&dir);
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// An OCI spec that runs a shell script; `extra` is merged over it.
pub fn spec(script: &str, extra: serde_json::Value) -> serde_json::Value {
    let mut spec = serde_json::json!({
        "ociVersion": "1.1.0",
        "process": {
            "cwd": "/", "args": ["sh", "-c", script], "user": {"uid": 0, "gid": 0},
            "env": ["PATH=/bin"],
            "capabilities": {
                "bounding": ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"],
                "effective": ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"],
                "permitted": ["CAP_KILL", "CAP_SETUID", "CAP_SETGID"],
            },
        },
        "linux": {
            "maskedPaths": ["/proc/kcore", "/proc/keys"],
            "readonlyPaths": ["/proc/sys"],
        },
    });
    merge(&mut spec, extra);
    spec
}

pub fn merge(into: &mut serde_json::Value, from: serde_json::Value) {
    match (into, from) {
        (serde_json::Value::Object(into), serde_json::Value::Object(from)) => {
            for (name, value) in from {
                merge(into.entry(name).or_insert(serde_json::Value::Null), value);
            }
        }
        (into, from) => *into = from,
    }
}

impl Guest {
    /// Connects to the agent that listens in `dir`.
    pub async fn in_dir(mut child: Child, dir: tempfile::TempDir, lower: String) -> Self {
        let transport = Transport::Directory(dir.path().to_owned());
        let start = Instant::now();
        // The control socket is created last, a moment before listen(2).
        let client = loop {
            match transport.client().await {
                Ok(client) => break client,
                Err(error) if start.elapsed() > TIMEOUT => {
                    let _ = (child.kill(), child.wait());
                    panic!("the agent does not listen: {error}");
                }
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            }
        };
        Self { child, dir, client, lower, transport }
    }

    /// Uses a disk as the image of the following containers.
    pub fn use_lower(&mut self, serial: &str) {
        serial.clone_into(&mut self.lower);
    }

    pub fn request(&self, id: &str, spec: &serde_json::Value) -> v1::CreateContainerRequest {
        v1::CreateContainerRequest {
            container_id: id.into(),
            oci_spec: spec.to_string().into_bytes(),
            rootfs: Some(v1::RootFs {
                lower_serial: self.lower.clone(),
                upper_serial: String::new(),
                read_only: false,
                ..Default::default()
            }),
            ..Default::default()
        }
    }

    pub async fn configure(&mut self) {
        let request = v1::ConfigurePodRequest {
            pod_id: "pod".into(),
            hostname: "pod-host".into(),
            ..Default::default()
        };
        self.client.configure_pod(request).await.unwrap();
    }

    pub async fn create(&mut self, request: v1::CreateContainerRequest) -> u32 {
        self.client.create_container(request).await.unwrap().into_inner().pid
    }

    pub async fn start(&mut self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::StartContainerRequest { container_id: id.into() };
        self.client.start_container(request).await.map(|_| ())
    }

    pub async fn remove(&mut self, id: &str) -> Result<(), tonic::Status> {
        let request = v1::RemoveContainerRequest { container_id: id.into() };
        self.client.remove_container(request).await.map(|_| ())
    }

    /// Runs a container from creation to its exit; returns its output and the exit.
    pub async fn run(&mut self, request: v1::CreateContainerRequest) -> (String, v1::Exit) {
        let id = request.container_id.clone();
        self.create(request).await;
        let mut stdout = self.open(Kind::Stdout, &id, "", 0).await;
        self.start(&id).await.unwrap();
        let output = stdout.read_all().await;
        let exit = self.exit(&id, "").await;
        (String::from_utf8(output).unwrap(), exit)
    }

    pub async fn exec(
        &mut self,
        id: &str,
        exec_id: &str,
        process: serde_json::Value,
    ) -> Result<(), tonic::Status> {
        let request = v1::ExecRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            oci_process: process.to_string().into_bytes(),
            ..Default::default()
        };
        self.client.exec(request).await.map(|_| ())
    }

    /// Waits for an exit without acknowledging it.
    pub async fn exit(&mut self, id: &str, exec_id: &str) -> v1::Exit {
        let events = self.events_until(id, exec_id).await;
        match events.last().unwrap().event.clone().unwrap() {
            v1::event::Event::Exit(exit) => exit,
            v1::event::Event::Oom(_) => unreachable!("the last event is the exit"),
        }
    }

    /// All kept events up to the exit of a process.
    pub async fn events_until(&mut self, id: &str, exec_id: &str) -> Vec<v1::Event> {
        let mut stream = self.client.events(v1::EventsRequest {}).await.unwrap().into_inner();
        let mut all = Vec::new();
        loop {
            let next = tokio::time::timeout(TIMEOUT, stream.message());
            let event = next.await.expect("no exit came").unwrap().expect("events ended");
            all.push(event.clone());
            if let Some(v1::event::Event::Exit(exit)) = event.event
                && exit.container_id == id
                && exit.exec_id == exec_id
            {
                return all;
            }
        }
    }

    /// Pid of the agent in this PID namespace.
    pub fn agent_pid(&self) -> u32 {
        let unshare = self.child.id();
        let children = format!("/proc/{unshare}/task/{unshare}/children");
        std::fs::read_to_string(children).unwrap().trim().parse().unwrap()
    }

    /// Listens in the pod's network namespace.
    pub fn listen(&self, address: &str) -> tokio::net::TcpListener {
        let namespace = std::fs::File::open(format!("/proc/{}/ns/net", self.agent_pid())).unwrap();
        let address = address.to_owned();
        // A new thread, the only one in that namespace.
        let bind = std::thread::spawn(move || {
            nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            std::net::TcpListener::bind(address).unwrap()
        });
        let listener = bind.join().unwrap();
        listener.set_nonblocking(true).unwrap();
        tokio::net::TcpListener::from_std(listener).unwrap()
    }

    /// Opens a forwarded connection to a port of the pod's loopback interface.
    pub async fn forward(&self, header: &[u8]) -> (forward::Status, UnixStream) {
        let mut conn = self.transport.connect(agent_api::FORWARD_PORT).await.unwrap();
        match conn.write_all(header).await {
            // Above the maximum the agent replies without reading the header.
            Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => {}
            written => written.unwrap(),
        }
        let status = tokio::time::timeout(TIMEOUT, conn.read_u8()).await.expect("no reply");
        (forward::Status::try_from(status.unwrap()).unwrap(), conn)
    }

    pub async fn open(&self, kind: Kind, id: &str, exec_id: &str, offset: u64) -> Stream {
        self.try_open(kind, id, exec_id, offset).await.unwrap()
    }

    pub async fn try_open(
        &self,
        kind: Kind,
        id: &str,
        exec_id: &str,
        offset: u64,
    ) -> Result<Stream, Status> {
        let mut conn = self.transport.connect(agent_api::STDIO_PORT).await.unwrap();
        let (container_id, exec_id) = (id.into(), exec_id.into());
        let header = Open { kind, offset, container_id, exec_id, framed: false }.encode();
        conn.write_all(&header).await.unwrap();
        match Status::try_from(conn.read_u8().await.unwrap()).unwrap() {
            Status::Ok => Ok(Stream { conn, offset }),
            status => Err(status),
        }
    }
}

/// One stream of a process.
pub struct Stream {
    pub conn: UnixStream,
    pub offset: u64,
}

impl Stream {
    /// Reads some bytes without acknowledging them; empty at the end.
    pub async fn read(&mut self) -> Vec<u8> {
        let mut buffer = vec![0; 65536];
        let read = tokio::time::timeout(TIMEOUT, self.conn.read(&mut buffer));
        let n = read.await.expect("no output came").unwrap();
        self.offset += n as u64;
        buffer.truncate(n);
        buffer
    }

    pub async fn acknowledge(&mut self) {
        self.conn.write_all(&self.offset.to_le_bytes()).await.unwrap();
    }

    /// Reads to the end and acknowledges everything.
    pub async fn read_all(&mut self) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            let bytes = self.read().await;
            if bytes.is_empty() {
                return all;
            }
            all.extend(bytes);
            self.acknowledge().await;
        }
    }

    /// Reads and acknowledges nothing until `text` was received.
    pub async fn read_until(&mut self, text: &str) -> String {
        let mut all = Vec::new();
        loop {
            let bytes = self.read().await;
            assert!(!bytes.is_empty(), "ended after {:?}", String::from_utf8_lossy(&all));
            all.extend(bytes);
            let seen = String::from_utf8_lossy(&all).into_owned();
            if seen.contains(text) {
                return seen;
            }
        }
    }
}
