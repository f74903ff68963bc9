//! A fake node that survives restarts and crashes of the daemon: fake VMs, a fake network,
//! directories.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::future::Future;
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;
use vmm_api::shares::Access as ShareAccess;
use vmm_api::transport::{receive, send};
use vmm_api::{DeviceStatus, Phase, Reply, VmConfig, VmStatus};

use super::agent::Guest;
use crate::host::process::pidfd_open;
use crate::launcher::{Launch, Launched, Program};
use crate::model::{ContainerSpec, Meta, PidMode, PodId, PodSpec, RootfsSpec};
use crate::ports::{Attachment, Interface, Network, PortError};
use crate::{Config, Error, Sandboxes};

/// Runtime of the fake guests, which survive the daemon.
pub(super) fn guests() -> &'static tokio::runtime::Runtime {
    static RUNTIME: OnceLock<tokio::runtime::Runtime> = OnceLock::new();
    RUNTIME.get_or_init(|| {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        builder.worker_threads(2).enable_all().build().unwrap()
    })
}

pub(super) struct TestNode {
    pub(super) inner: Arc<Inner>,
    /// Networks attached by the daemon with this clone.
    attached_by_this_daemon: Mutex<BTreeSet<PodId>>,
}

impl Clone for TestNode {
    fn clone(&self) -> Self {
        Self { inner: self.inner.clone(), attached_by_this_daemon: Mutex::default() }
    }
}

pub(super) struct Inner {
    pub(super) dir: tempfile::TempDir,
    pub(super) attached: Mutex<BTreeSet<PodId>>,
    pub(super) guests: Mutex<HashMap<PodId, (u32, Arc<Guest>)>>,
    pub(super) devices: Arc<Mutex<Vec<String>>>,
    /// Names of shares, and pids of file servers.
    pub(super) shares: Arc<Mutex<BTreeMap<String, ShareAccess>>>,
    pub(super) file_servers: Mutex<Vec<u32>>,
    /// The next guest's agent never answers.
    pub(super) guest_never_answers: Mutex<bool>,
    pub(super) fail_network: Mutex<bool>,
    /// `attach` waits until a VM was launched.
    pub(super) attach_after_launch: Mutex<bool>,
    /// `attach` waits until it is cancelled; it fails by itself then with `fail_network`.
    pub(super) attach_queued: Mutex<bool>,
    /// Network interfaces plugged into VMs, by id.
    pub(super) nics: Arc<Mutex<Vec<String>>>,
    /// Time that a VMM needs to plug a disk.
    pub(super) slow_disks: Arc<Mutex<Duration>>,
    /// `collect_garbage` never returns.
    pub(super) hang_garbage_collection: Mutex<bool>,
    /// Lower and upper bound of the guests' plugged memory, MiB.
    pub(super) memory_bounds: Arc<Mutex<(u32, u32)>>,
    /// Last requested memory of a VM, MiB.
    pub(super) vm_memory: Arc<Mutex<u32>>,
    /// For each launched VM, whether it continues a saved one.
    pub(super) restored: Mutex<Vec<bool>>,
    /// A VMM that is to continue a saved VM exits.
    pub(super) fail_restores: Mutex<bool>,
    /// VMMs refuse to save their VM.
    pub(super) refuse_snapshots: Arc<Mutex<bool>>,
    cgroup: String,
}

impl TestNode {
    pub(super) fn new() -> Option<Self> {
        if !nix::unistd::geteuid().is_root() || crate::host::cgroup::find_root("".as_ref()).is_err()
        {
            eprintln!("SKIP: needs root and cgroup v2");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("n").tempdir().unwrap();
        std::fs::write(dir.path().join("image"), "erofs").unwrap();
        let inner = Inner {
            cgroup: format!("nacelle-test-{}", uuid::Uuid::new_v4().simple()),
            dir,
            attached: Mutex::default(),
            guests: Mutex::default(),
            devices: Arc::default(),
            shares: Arc::default(),
            file_servers: Mutex::default(),
            guest_never_answers: Mutex::new(false),
            fail_network: Mutex::new(false),
            attach_after_launch: Mutex::new(false),
            attach_queued: Mutex::new(false),
            nics: Arc::default(),
            slow_disks: Arc::default(),
            hang_garbage_collection: Mutex::new(false),
            memory_bounds: Arc::new(Mutex::new((0, u32::MAX))),
            vm_memory: Arc::default(),
            restored: Mutex::default(),
            fail_restores: Mutex::new(false),
            refuse_snapshots: Arc::default(),
        };
        Some(Self { inner: Arc::new(inner), attached_by_this_daemon: Mutex::default() })
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        self.inner.dir.path().join(name)
    }

    pub(super) fn config(&self) -> Config {
        let asset = self.path("image");
        Config {
            root: self.path("r"),
            state: self.path("s"),
            kernel: asset.clone(),
            initramfs: asset.clone(),
            kvm: asset.clone(),
            vmm: asset,
            scratch_size: 16 << 20,
            scratch_disk_size: 32 << 20,
            boot_deadline_ms: 5_000,
            guest_call_deadline_ms: 3_000,
            max_memory_mib: 512,
            templates: 0,
            shutdown_deadline_ms: 50,
            ping_interval_ms: 100,
            ping_misses: 3,
            stats_interval_ms: 100,
            ..Config::default()
        }
    }

    pub(super) async fn daemon(&self) -> Sandboxes {
        self.daemon_with(self.config()).await
    }

    pub(super) async fn daemon_with(&self, config: Config) -> Sandboxes {
        let this = Arc::new(self.clone());
        Sandboxes::open_with(config, this.clone(), this).await.unwrap()
    }

    pub(super) fn pod_spec(&self, name: &str) -> PodSpec {
        PodSpec {
            meta: Meta { name: name.into(), namespace: "test".into(), ..Meta::default() },
            hostname: name.into(),
            handler: String::new(),
            cgroup_parent: self.inner.cgroup.clone(),
            log_directory: self.path("logs").display().to_string(),
            sysctls: Default::default(),
            dns: Default::default(),
            ports: Vec::new(),
            vcpus: None,
            memory_mib: None,
            cpu: Default::default(),
            host: None,
            origin: serde_json::Value::Null,
        }
    }

    pub(super) fn container_spec(&self, name: &str, args: &[&str]) -> ContainerSpec {
        let process = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": { "args": args, "cwd": "/", "user": { "uid": 0, "gid": 0 } },
        });
        ContainerSpec {
            meta: Meta { name: name.into(), ..Meta::default() },
            rootfs: RootfsSpec { image: self.path("image"), read_only: false, volumes: vec![] },
            oci: serde_json::from_value(process).unwrap(),
            user: String::new(),
            pid: PidMode::Container,
            stdin: false,
            stdin_once: false,
            tty: false,
            log_path: format!("{name}.log"),
            volumes: Vec::new(),
            devices: Vec::new(),
            strict_groups: false,
            image_name: "image".into(),
            image_id: "sha256:0".into(),
            stop_signal: 15,
            strict_volumes: Vec::new(),
            origin: serde_json::Value::Null,
        }
    }

    pub(super) fn guest(&self, pod: &str) -> Arc<Guest> {
        self.inner.guests.lock().unwrap()[pod].1.clone()
    }

    /// File of a pod's cgroup on the host.
    pub(super) fn cgroup_file(&self, pod: &str, file: &str) -> PathBuf {
        let root = crate::host::cgroup::find_root("".as_ref()).unwrap();
        root.join(&self.inner.cgroup).join(format!("nacelle-{pod}")).join(file)
    }

    pub(super) fn vmm_pid(&self, pod: &str) -> u32 {
        self.inner.guests.lock().unwrap()[pod].0
    }

    /// Pids of all launched processes.
    pub(super) fn pids(&self) -> Vec<u32> {
        let servers = self.inner.file_servers.lock().unwrap().clone();
        let guests = self.inner.guests.lock().unwrap();
        guests.values().map(|(pid, _)| *pid).chain(servers).collect()
    }

    /// Text of the log's entries.
    pub(super) fn log(&self, name: &str) -> Vec<String> {
        let text = std::fs::read_to_string(self.path("logs").join(name)).unwrap_or_default();
        text.lines().map(|l| l.splitn(4, ' ').nth(3).unwrap().to_owned()).collect()
    }

    /// Everything that pods left on this node.
    pub(super) fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        for directory in ["r/pods", "s/pods"] {
            for entry in std::fs::read_dir(self.path(directory)).into_iter().flatten().flatten() {
                left.push(entry.path().display().to_string());
            }
        }
        left.extend(self.inner.attached.lock().unwrap().iter().map(|id| format!("network {id}")));
        for pid in self.pids() {
            let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
            if stat.contains("(sleep) S") {
                left.push(format!("process {pid}"));
            }
        }
        let root = crate::host::cgroup::find_root("".as_ref()).unwrap();
        let cgroup = root.join(&self.inner.cgroup);
        if cgroup.exists() {
            left.push(cgroup.display().to_string());
        }
        left
    }
}

#[async_trait]
impl Network for TestNode {
    fn netns_path(&self, pod: &PodId) -> PathBuf {
        PathBuf::from("/run/netns").join(pod)
    }

    async fn attach(
        &self,
        pod: &PodId,
        _: &PodSpec,
        cancel: &CancellationToken,
    ) -> Result<Attachment, PortError> {
        if *self.inner.attach_queued.lock().unwrap() {
            cancel.cancelled().await;
            if !*self.inner.fail_network.lock().unwrap() {
                return Err(PortError::cancelled());
            }
        }
        self.attached_by_this_daemon.lock().unwrap().insert(pod.clone());
        self.inner.attached.lock().unwrap().insert(pod.clone());
        if *self.inner.attach_after_launch.lock().unwrap() {
            eventually("launch", || self.inner.guests.lock().unwrap().contains_key(pod)).await;
        }
        if *self.inner.fail_network.lock().unwrap() {
            return Err(PortError(anyhow::anyhow!("no more addresses")));
        }
        let addresses = vec!["10.1.2.3".parse().unwrap()];
        let interfaces = vec![Interface {
            name: "eth0".into(),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: 1500,
            addresses: vec!["10.1.2.3/24".into()],
        }];
        Ok(Attachment { addresses, interfaces, ..Attachment::default() })
    }

    async fn open_taps(
        &self,
        _: &PodId,
        attachment: &Attachment,
    ) -> Result<Vec<OwnedFd>, PortError> {
        let tap = || File::open("/dev/null").map(OwnedFd::from).unwrap();
        Ok(attachment.interfaces.iter().map(|_| tap()).collect())
    }

    async fn detach(&self, pod: &PodId, _: &PodSpec) -> Result<(), PortError> {
        self.inner.attached.lock().unwrap().remove(pod);
        Ok(())
    }

    async fn not_ready_reason(&self) -> Option<String> {
        None
    }

    async fn collect_garbage(&self, known: &[PodId]) -> Result<(), PortError> {
        if *self.inner.hang_garbage_collection.lock().unwrap() {
            std::future::pending::<()>().await;
        }
        let attached_by_this_daemon = self.attached_by_this_daemon.lock().unwrap();
        let mut attached = self.inner.attached.lock().unwrap();
        attached.retain(|id| known.contains(id) || attached_by_this_daemon.contains(id));
        Ok(())
    }
}

#[async_trait]
impl Launch for TestNode {
    async fn launch(&self, program: Program) -> Result<Launched, Error> {
        let mut fds: Vec<_> = program.fds.into_iter().map(Some).collect();
        let mut take = |number: i32| fds[number as usize - 3].take().unwrap();
        let mut child = Command::new("sleep")
            .arg("600")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let procs = format!("/proc/self/fd/{}/cgroup.procs", program.cgroup.as_raw_fd());
        std::fs::write(procs, child.id().to_string()).unwrap();
        let pidfd = pidfd_open(child.id()).unwrap();
        let pid = child.id();
        if program.exe.ends_with("nacelle-fs") {
            self.inner.file_servers.lock().unwrap().push(pid);
            let (control, shares) = (take(3), self.inner.shares.clone());
            shares.lock().unwrap().clear();
            std::thread::spawn(move || serve_shares(&control, &shares));
            std::thread::spawn(move || child.wait());
            return Ok(Launched { pid, pidfd });
        }
        if program.exe.ends_with("nacelle-agent") {
            let sockets = [4, 5, 6].map(&mut take);
            self.serve_host_pod(&program.args, sockets, child);
            return Ok(Launched { pid, pidfd });
        }
        let mut text = Vec::new();
        File::from(take(3)).read_to_end(&mut text).unwrap();
        let config: VmConfig = serde_json::from_slice(&text).unwrap();
        self.inner.restored.lock().unwrap().push(config.restore.is_some());
        if config.restore.is_some() && *self.inner.fail_restores.lock().unwrap() {
            child.kill().unwrap();
            child.wait().unwrap();
            return Ok(Launched { pid, pidfd });
        }
        let guest = Arc::new(Guest::default());
        {
            let mut state = guest.lock();
            (state.cpus, state.max_cpus) = (config.vcpus.into(), config.max_vcpus.into());
        }
        self.inner.guests.lock().unwrap().insert(config.name.clone(), (pid, guest.clone()));
        let listener =
            std::os::unix::net::UnixListener::from(take(config.vsock.unwrap().listener.0));
        listener.set_nonblocking(true).unwrap();
        let guest_never_answers = *self.inner.guest_never_answers.lock().unwrap();
        let served = guests().spawn(async move {
            let listener = tokio::net::UnixListener::from_std(listener).unwrap();
            if guest_never_answers {
                std::future::pending::<()>().await;
            }
            guest.serve(listener).await;
        });
        let control = take(config.control.0);
        let devices = self.inner.devices.clone();
        let nics = self.inner.nics.clone();
        assert!(config.nets.is_empty(), "{:?}", config.nets);
        let memory = FakeVmm {
            slow_disks: self.inner.slow_disks.clone(),
            boot: config.memory_mib,
            wanted: self.inner.vm_memory.clone(),
            most: config.max_memory_mib,
            memory_bounds: self.inner.memory_bounds.clone(),
            refuse_snapshots: self.inner.refuse_snapshots.clone(),
        };
        *memory.wanted.lock().unwrap() = memory.boot;
        std::thread::spawn(move || serve_control(&control, &devices, &nics, memory));
        std::thread::spawn(move || {
            let _ = child.wait();
            served.abort();
        });
        Ok(Launched { pid, pidfd })
    }
}

/// A file server that only stores names and access.
fn serve_shares(control: &OwnedFd, shares: &Mutex<BTreeMap<String, ShareAccess>>) {
    use vmm_api::shares::{Error, Reply, Request};
    while let Ok(fd) = nix::sys::socket::accept(control.as_raw_fd()) {
        let connection = own(fd);
        while let Ok((request, fds)) = receive::<Request>(connection.as_fd()) {
            let mut shares = shares.lock().unwrap();
            let reply = match request {
                Request::List => Reply::Shares {
                    names: shares.keys().cloned().collect(),
                    version: vmm_api::shares::VERSION_ACCESS,
                },
                Request::Add { name, .. } if fds.len() != 1 || !vmm_api::shares::is_name(&name) => {
                    Reply::Error(Error::Name { name })
                }
                Request::Add { name, .. } if shares.contains_key(&name) => {
                    Reply::Error(Error::Exists { name })
                }
                Request::Access { name, access } if shares.contains_key(&name) => {
                    shares.insert(name, access);
                    Reply::Done
                }
                Request::Access { name, .. } => Reply::Error(Error::NoSuchShare { name }),
                Request::Add { name, access } => {
                    shares.insert(name, access);
                    Reply::Done
                }
                Request::Remove { name } if shares.remove(&name).is_some() => Reply::Done,
                Request::Remove { name } => Reply::Error(Error::NoSuchShare { name }),
            };
            let _ = send(connection.as_fd(), &reply, &[]);
        }
    }
}

struct FakeVmm {
    slow_disks: Arc<Mutex<Duration>>,
    boot: u32,
    wanted: Arc<Mutex<u32>>,
    most: u32,
    memory_bounds: Arc<Mutex<(u32, u32)>>,
    refuse_snapshots: Arc<Mutex<bool>>,
}

/// Serves the VMM's control socket until it is closed.
fn serve_control(
    control: &OwnedFd,
    devices: &Mutex<Vec<String>>,
    nics: &Mutex<Vec<String>>,
    memory: FakeVmm,
) {
    while let Ok(fd) = nix::sys::socket::accept(control.as_raw_fd()) {
        let connection = own(fd);
        while let Ok((request, fds)) = receive::<vmm_api::Request>(connection.as_fd()) {
            if matches!(request, vmm_api::Request::AddDisk { .. }) {
                let slow = *memory.slow_disks.lock().unwrap();
                std::thread::sleep(slow);
            }
            let mut devices = devices.lock().unwrap();
            let mut sent = Vec::new();
            let reply = match request {
                vmm_api::Request::Snapshot if *memory.refuse_snapshots.lock().unwrap() => {
                    Reply::Error(vmm_api::Error::Failed { message: "not saveable".into() })
                }
                vmm_api::Request::Snapshot => {
                    let mut state = File::from(fds.into_iter().next().unwrap());
                    std::io::Write::write_all(&mut state, b"state").unwrap();
                    let ram = tempfile::tempfile().unwrap();
                    ram.set_len(u64::from(memory.boot) << 20).unwrap();
                    sent.push(ram);
                    Reply::Saved
                }
                vmm_api::Request::AddDisk { disk } if devices.contains(&disk.serial) => {
                    Reply::Error(vmm_api::Error::Exists { id: disk.serial })
                }
                vmm_api::Request::AddDisk { disk } => {
                    devices.push(disk.serial);
                    Reply::Added { pci: "0000:00:04.0".into() }
                }
                vmm_api::Request::AddFs { id, tag } => {
                    assert_eq!((tag.as_str(), fds.len()), (agent_api::SHARE_TAG, 1));
                    devices.push(id);
                    Reply::Added { pci: "0000:00:05.0".into() }
                }
                vmm_api::Request::AddNet { net } => {
                    assert_eq!(fds.len(), 1);
                    nics.lock().unwrap().push(net.id);
                    Reply::Added { pci: "0000:00:06.0".into() }
                }
                vmm_api::Request::RemoveDevice { id } => {
                    devices.retain(|d| *d != id);
                    Reply::Done
                }
                vmm_api::Request::Status => {
                    let (least, most) = *memory.memory_bounds.lock().unwrap();
                    let memory_mib = *memory.wanted.lock().unwrap();
                    Reply::Status(VmStatus {
                        version: 1,
                        phase: Phase::Running,
                        pid: 1,
                        vcpus: 1,
                        memory_mib,
                        plugged_mib: memory_mib.clamp(least, most),
                        max_memory_mib: memory.most,
                        devices: devices.iter().map(|id| device(id)).collect(),
                    })
                }
                vmm_api::Request::ResizeMemory { memory_mib } if memory_mib > memory.most => {
                    let limit_mib = memory.most;
                    Reply::Error(vmm_api::Error::Memory { memory_mib, limit_mib })
                }
                vmm_api::Request::ResizeMemory { memory_mib } => {
                    *memory.wanted.lock().unwrap() = memory_mib.max(memory.boot);
                    Reply::Done
                }
                _ => Reply::Done,
            };
            let sent: Vec<_> = sent.iter().map(AsFd::as_fd).collect();
            let _ = send(connection.as_fd(), &reply, &sent);
        }
    }
}

fn device(id: &str) -> DeviceStatus {
    DeviceStatus { id: id.to_owned(), kind: "blk".into(), pci: String::new(), active: true }
}

#[allow(unsafe_code)] // nix' accept gives a plain number
fn own(fd: i32) -> OwnedFd {
    use std::os::fd::FromRawFd;
    // SAFETY: accept has just made this descriptor, and only this place knows its number.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

impl TestNode {
    /// Kills processes of a failed test, and removes the directory.
    pub(super) fn clean(&self) {
        for pid in self.pids() {
            let pid = nix::unistd::Pid::from_raw(pid as i32);
            let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL);
        }
        let _ = std::fs::remove_dir_all(self.inner.dir.path());
    }
}

/// Polls until `done` returns true.
pub(super) async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let began = Instant::now();
    while !done() {
        assert!(began.elapsed() < Duration::from_secs(15), "timed out: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Runs a test on its own runtime.
pub(super) fn run_test<F: Future<Output = ()> + Send + 'static>(test: impl FnOnce(TestNode) -> F) {
    run_test_with_threads(512, test);
}

/// The same with this many blocking threads.
pub(super) fn run_test_with_threads<F: Future<Output = ()> + Send + 'static>(
    blocking: usize,
    test: impl FnOnce(TestNode) -> F,
) {
    let Some(node) = TestNode::new() else { return };
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).max_blocking_threads(blocking).enable_all();
    let runtime = builder.build().unwrap();
    let result = runtime.block_on(async {
        let test = tokio::spawn(test(node.clone()));
        tokio::time::timeout(Duration::from_secs(60), test).await
    });
    runtime.shutdown_background();
    node.clean();
    match result.expect("the test hangs") {
        Ok(()) => {}
        Err(e) => std::panic::resume_unwind(e.into_panic()),
    }
}
