//! What work on a shared folder costs: the same program (`nacelle-share-load`) on the same folder of
//! the host as a process of the host, in a container of each runtime, and in a guest that QEMU runs
//! with upstream's virtiofsd, on the kernel of nacelle's guests. The sides take turns.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use cri::v1;
use cri::v1::runtime_service_client::RuntimeServiceClient;
use tonic::transport::Channel;

use crate::create::{self, Peer};
use crate::{boot, measure, table};

/// How long a guest may take for its boot, and for one phase.
const LIMIT: Duration = Duration::from_secs(300);
const LOAD: &str = "nacelle-share-load";

/// What is done, in this order: its name in the load, in the table, and of what it is counted.
const PHASES: [(&str, &str, Unit); 8] = [
    ("create", "create", Unit::Files),
    ("stat", "stat", Unit::Files),
    ("list", "list with attributes", Unit::Files),
    ("unlink", "unlink", Unit::Files),
    ("fsync", "write 4 KiB and fsync", Unit::Writes),
    ("read-uncached", "read, nowhere cached", Unit::Mib),
    ("read-new", "read, cached by the host only", Unit::Mib),
    ("read-cached", "read, cached", Unit::Mib),
];

#[derive(Clone, Copy)]
enum Unit {
    Files,
    Writes,
    Mib,
}

/// How much is done in one round.
#[derive(Debug, Clone, Copy, clap::Args)]
pub struct Amount {
    #[arg(long, default_value_t = 2000)]
    files: usize,
    #[arg(long, default_value_t = 200)]
    writes: usize,
    /// Size of the file that is read, MiB.
    #[arg(long, default_value_t = 128)]
    mib: u64,
}

impl Amount {
    fn of(self, unit: Unit) -> u64 {
        match unit {
            Unit::Files => self.files as u64,
            Unit::Writes => self.writes as u64,
            Unit::Mib => self.mib,
        }
    }
}

/// What is measured.
pub struct Plan<'a> {
    pub bin: &'a Path,
    pub guest: &'a Path,
    /// On a file system of the host.
    pub folder: &'a Path,
    pub runtimes: &'a [Peer],
    pub image: &'a str,
    pub virtiofsd: Option<&'a Path>,
    pub rounds: usize,
    pub amount: Amount,
}

/// What one side measured of one phase.
#[derive(Default)]
struct Sample {
    us: Vec<u64>,
    exits: Vec<u64>,
    requests: BTreeMap<String, u64>,
    /// Of the file server.
    system_calls: BTreeMap<String, u64>,
}

pub fn run(plan: &Plan<'_>) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    fs::create_dir_all(plan.folder)?;
    fs::copy(plan.bin.join(LOAD), plan.folder.join(LOAD)).context("copying the load")?;
    fill(&plan.folder.join("big"), plan.amount.mib)?;
    let mut sides = vec![Side::host()];
    for peer in plan.runtimes {
        let side = runtime.block_on(Side::container(peer, plan));
        sides.push(side.with_context(|| peer.name.clone())?);
    }
    if let Some(virtiofsd) = plan.virtiofsd {
        // The same shape as the first guest's.
        let shape = match sides.iter_mut().find(|side| side.vm) {
            Some(side) => side.shape(&runtime, plan)?,
            None => boot::Shape { vcpus: 1, memory: 512 },
        };
        sides.push(Side::qemu(plan, virtiofsd, shape)?);
    }
    let qemu = sides.iter().find_map(|side| match &side.way {
        Target::Qemu(qemu) => Some(qemu.vmm.0.id()),
        Target::Host | Target::Container(_) => None,
    });
    let mut samples: Vec<BTreeMap<&str, Sample>> = sides.iter().map(|_| BTreeMap::new()).collect();
    for round in 0..plan.rounds {
        for (side, samples) in sides.iter_mut().zip(&mut samples) {
            side.round(&runtime, plan, qemu, samples)
                .with_context(|| format!("{}, round {round}", side.name))?;
        }
    }
    for (side, samples) in sides.iter_mut().zip(&mut samples) {
        if side.vm {
            side.count(&runtime, plan, samples)
                .with_context(|| format!("{}, counting", side.name))?;
        }
    }
    print(plan, &sides, &mut samples);
    for side in sides {
        side.end(&runtime)?;
    }
    Ok(())
}

/// Makes the file that is read, of what no file system takes for holes.
fn fill(big: &Path, mib: u64) -> Result<()> {
    let mut file = File::create(big)?;
    let block: Vec<u8> = (0..1 << 20).map(|n: u32| (n % 251) as u8 + 1).collect();
    for _ in 0..mib {
        file.write_all(&block)?;
    }
    Ok(file.sync_all()?)
}

fn print(plan: &Plan<'_>, sides: &[Side], samples: &mut [BTreeMap<&str, Sample>]) {
    let Amount { files, writes, .. } = plan.amount;
    let mut header = vec![""];
    for side in sides {
        header.extend([side.name.as_str(), "spread", "ratio"]);
    }
    let (mut times, mut counts, mut calls) = (Vec::new(), Vec::new(), Vec::new());
    for (phase, text, unit) in PHASES {
        let amount = plan.amount.of(unit);
        let mut row = vec![format!("{text}, {amount}{}", unit_name(unit))];
        let mut base = None;
        for (side, samples) in sides.iter().zip(samples.iter_mut()) {
            let Some(sample) = samples.get_mut(phase).filter(|s| !s.us.is_empty()) else {
                row.extend(["-".to_owned(), String::new(), String::new()]);
                continue;
            };
            let median = table::median(&mut sample.us);
            let base = *base.get_or_insert(median.max(1));
            let (best, worst) = (sample.us[0], sample.us[sample.us.len() - 1]);
            row.push(format!("{:.1} ms", median as f64 / 1e3));
            row.push(format!("{:.1}-{:.1}", best as f64 / 1e3, worst as f64 / 1e3));
            row.push(format!("{:.1}", median as f64 / base as f64));
            if side.vm {
                let each = |count: u64| format!("{:.2}", count as f64 / amount as f64);
                // Most frequent first, without those that belong to the run as a whole.
                let by_name = |counts: &BTreeMap<String, u64>| {
                    let mut counts: Vec<(&String, u64)> =
                        counts.iter().map(|(name, count)| (name, *count)).collect();
                    counts.retain(|(_, count)| count * 50 > amount);
                    counts.sort_by_key(|(_, count)| std::cmp::Reverse(*count));
                    let named =
                        counts.iter().map(|(name, count)| format!("{name} {}", each(*count)));
                    named.collect::<Vec<_>>().join(", ")
                };
                let requests: u64 = sample.requests.values().sum();
                let system_calls: u64 = sample.system_calls.values().sum();
                counts.push(vec![
                    text.to_owned(),
                    side.name.clone(),
                    each(table::median(&mut sample.exits)),
                    each(requests),
                    by_name(&sample.requests),
                ]);
                calls.push(vec![
                    text.to_owned(),
                    side.name.clone(),
                    each(system_calls),
                    format!("{:.1}", system_calls as f64 / requests.max(1) as f64),
                    by_name(&sample.system_calls),
                ]);
            }
        }
        times.push(row);
    }
    table::print(
        &format!(
            "The same folder of the host ({files} files, {writes} writes, median of {} rounds in \
             turns, ratios to the first column that has a time)",
            plan.rounds
        ),
        &header,
        &times,
    );
    let each =
        "For each file, write or MiB of it: KVM exits, and FUSE requests (from a round of its own)";
    table::print(each, &["", "side", "exits", "requests", "of them"], &counts);
    let each = "For each file, write or MiB of it: system calls of the file server, in the same round as the \
         requests; `read` takes kicks of the guest, `write` is an interrupt to it";
    table::print(each, &["", "side", "calls", "a request", "of them"], &calls);
}

fn unit_name(unit: Unit) -> &'static str {
    match unit {
        Unit::Files | Unit::Writes => "",
        Unit::Mib => " MiB",
    }
}

enum Target {
    Host,
    Container(Box<Container>),
    Qemu(Box<Qemu>),
}

struct Container {
    client: RuntimeServiceClient<Channel>,
    pod: String,
    plain: String,
    privileged: String,
}

struct Side {
    name: String,
    /// It runs in a VM, so that KVM's exits are its own.
    vm: bool,
    way: Target,
}

impl Side {
    fn host() -> Self {
        Self { name: "host".into(), vm: false, way: Target::Host }
    }

    async fn container(peer: &Peer, plan: &Plan<'_>) -> Result<Self> {
        let before = measure::vms(None)?.0;
        let channel = create::connect(peer).await?;
        create::pull(&channel, plan.image).await?;
        let mut client = RuntimeServiceClient::new(channel);
        let security = v1::LinuxSandboxSecurityContext { privileged: true, ..Default::default() };
        let linux =
            v1::LinuxPodSandboxConfig { security_context: Some(security), ..Default::default() };
        let config = v1::PodSandboxConfig {
            metadata: Some(v1::PodSandboxMetadata {
                name: "share".into(),
                uid: "share-uid".into(),
                namespace: "bench".into(),
                attempt: 0,
            }),
            log_directory: "/tmp/nacelle-bench-logs".into(),
            linux: Some(linux),
            ..Default::default()
        };
        fs::create_dir_all(&config.log_directory)?;
        let request =
            v1::RunPodSandboxRequest { config: Some(config.clone()), ..Default::default() };
        let reply = client.run_pod_sandbox(request).await.context("RunPodSandbox")?;
        let pod = reply.into_inner().pod_sandbox_id;
        let vm = measure::vms(None)?.0 > before;
        let mut ids = Vec::new();
        for privileged in [false, true] {
            let name = if privileged { "privileged" } else { "plain" };
            let security = v1::LinuxContainerSecurityContext { privileged, ..Default::default() };
            let container = v1::ContainerConfig {
                log_path: format!("{}-{name}.log", peer.name),
                metadata: Some(v1::ContainerMetadata { name: name.into(), attempt: 0 }),
                image: Some(v1::ImageSpec { image: plan.image.into(), ..Default::default() }),
                command: ["sleep", "100000"].map(str::to_owned).to_vec(),
                mounts: vec![v1::Mount {
                    host_path: plan.folder.display().to_string(),
                    container_path: "/data".into(),
                    ..Default::default()
                }],
                linux: Some(v1::LinuxContainerConfig {
                    security_context: Some(security),
                    ..Default::default()
                }),
                ..Default::default()
            };
            let create = v1::CreateContainerRequest {
                pod_sandbox_id: pod.clone(),
                config: Some(container),
                sandbox_config: Some(config.clone()),
            };
            let id = client.create_container(create).await.context("CreateContainer")?;
            let container_id = id.into_inner().container_id;
            let start = v1::StartContainerRequest { container_id: container_id.clone() };
            client.start_container(start).await.context("StartContainer")?;
            ids.push(container_id);
        }
        let [plain, privileged] =
            <[String; 2]>::try_from(ids).map_err(|_| anyhow::anyhow!("two"))?;
        let way = Target::Container(Box::new(Container { client, pod, plain, privileged }));
        Ok(Self { name: peer.name.clone(), vm, way })
    }

    fn qemu(plan: &Plan<'_>, virtiofsd: &Path, shape: boot::Shape) -> Result<Self> {
        let qemu = Box::new(Qemu::start(plan, virtiofsd, shape)?);
        Ok(Self { name: "virtiofsd".into(), vm: true, way: Target::Qemu(qemu) })
    }

    /// Runs the load; what it printed.
    fn load(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        plan: &Plan<'_>,
        words: &[&str],
    ) -> Result<String> {
        let Amount { files, writes, .. } = plan.amount;
        let folder = match &self.way {
            Target::Host => plan.folder.display().to_string(),
            Target::Container(_) | Target::Qemu(_) => "/data".to_owned(),
        };
        let mut all = vec![folder, self.name.clone(), files.to_string(), writes.to_string()];
        all.extend(words.iter().map(|&word| word.to_owned()));
        match &mut self.way {
            Target::Host => {
                let output = Command::new(plan.folder.join(LOAD)).args(&all).output()?;
                ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
                Ok(String::from_utf8(output.stdout)?)
            }
            Target::Container(own) => {
                let Container { client, plain, privileged, .. } = own.as_mut();
                let container = if words.contains(&"trace") { privileged } else { plain };
                let mut cmd = vec![format!("/data/{LOAD}")];
                cmd.extend(all);
                let exec = v1::ExecSyncRequest {
                    container_id: container.clone(),
                    cmd,
                    timeout: LIMIT.as_secs() as i64,
                };
                let reply = runtime.block_on(client.exec_sync(exec)).context("ExecSync")?;
                let reply = reply.into_inner();
                let errors = String::from_utf8_lossy(&reply.stderr);
                ensure!(reply.exit_code == 0, "exit code {}: {errors}", reply.exit_code);
                Ok(String::from_utf8(reply.stdout)?)
            }
            Target::Qemu(qemu) => qemu.send_command(&all.join(" ")),
        }
    }

    /// KVM's exits of this side's VM so far; those of all VMs but the ones that QEMU runs.
    fn exits(&self, qemu: Option<u32>) -> Result<u64> {
        match &self.way {
            Target::Host => Ok(0),
            Target::Container(_) => Ok(measure::vms(qemu)?.1),
            Target::Qemu(qemu) => measure::exits(qemu.vmm.0.id()),
        }
    }

    fn shape(&mut self, runtime: &tokio::runtime::Runtime, plan: &Plan<'_>) -> Result<boot::Shape> {
        let said = self.load(runtime, plan, &["nothing"])?;
        let field = |name: &str| -> Result<u64> {
            let line = said.lines().find_map(|line| line.strip_prefix(name));
            Ok(line.context("the load says what it runs on")?.trim().parse()?)
        };
        // MemTotal does not include the kernel's own memory.
        let memory = (field("memory")? >> 10).next_multiple_of(64) as u32;
        println!("{}: {} vCPUs, {memory} MiB", self.name, field("cpus")?);
        Ok(boot::Shape { vcpus: field("cpus")? as u8, memory })
    }

    fn round(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        plan: &Plan<'_>,
        qemu: Option<u32>,
        samples: &mut BTreeMap<&str, Sample>,
    ) -> Result<()> {
        let before = self.exits(qemu)?;
        self.load(runtime, plan, &["nothing"])?;
        let idle = self.exits(qemu)?.saturating_sub(before);
        for (phase, _, _) in PHASES {
            match phase {
                "read-uncached" => {
                    nix::unistd::sync();
                    fs::write("/proc/sys/vm/drop_caches", "3").context("drop_caches")?;
                }
                // It is the host's cache, without a guest's on top.
                "read-new" if !self.vm => continue,
                "read-new" => warm(&plan.folder.join("big"))?,
                _ => {}
            }
            let before = self.exits(qemu)?;
            let said = self.load(runtime, plan, &[phase])?;
            let exits = self.exits(qemu)?.saturating_sub(before).saturating_sub(idle);
            let sample = samples.entry(phase).or_default();
            let us = number(&said, &format!("time {phase} ")).with_context(|| said.clone())?;
            // What there is of a run that does not come to its end.
            eprintln!("{}: {phase}: {us} us, {exits} exits", self.name);
            sample.us.push(us);
            sample.exits.push(exits);
        }
        Ok(())
    }

    fn count(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        plan: &Plan<'_>,
        samples: &mut BTreeMap<&str, Sample>,
    ) -> Result<()> {
        let server = match &self.way {
            Target::Qemu(_) => "virtiofsd",
            Target::Host | Target::Container(_) => "nacelle-fs",
        };
        // The tracing itself, and the start of the load from the share.
        let (_, idle) = self.server_calls(runtime, plan, server, &["trace", "nothing"])?;
        for (phase, _, _) in PHASES {
            let (said, mut calls) = self.server_calls(runtime, plan, server, &["trace", phase])?;
            for (name, count) in &mut calls {
                *count = count.saturating_sub(idle.get(name).copied().unwrap_or_default());
            }
            samples.entry(phase).or_default().system_calls = calls;
            let prefix = format!("count {phase} ");
            for line in said.lines().filter_map(|line| line.strip_prefix(&prefix)) {
                let (name, count) = line.split_once(' ').context("NAME COUNT")?;
                let sample = samples.entry(phase).or_default();
                sample.requests.insert(name.to_owned(), count.parse()?);
            }
        }
        Ok(())
    }

    /// Runs the load; what it printed, and the system calls of the file server meanwhile.
    fn server_calls(
        &mut self,
        runtime: &tokio::runtime::Runtime,
        plan: &Plan<'_>,
        server: &str,
        words: &[&str],
    ) -> Result<(String, BTreeMap<String, u64>)> {
        let counter = measure::SystemCalls::count()?;
        let said = self.load(runtime, plan, words)?;
        Ok((said, counter.of(&measure::threads(&[server])?)?))
    }

    fn end(self, runtime: &tokio::runtime::Runtime) -> Result<()> {
        let Target::Container(own) = self.way else { return Ok(()) };
        let Container { mut client, pod, .. } = *own;
        runtime.block_on(async {
            let stop = v1::StopPodSandboxRequest { pod_sandbox_id: pod.clone() };
            client.stop_pod_sandbox(stop).await.context("StopPodSandbox")?;
            let remove = v1::RemovePodSandboxRequest { pod_sandbox_id: pod };
            client.remove_pod_sandbox(remove).await.context("RemovePodSandbox")?;
            Ok(())
        })
    }
}

fn number(said: &str, prefix: &str) -> Option<u64> {
    said.lines().find_map(|line| line.strip_prefix(prefix))?.trim().parse().ok()
}

/// Brings a file into the host's page cache.
fn warm(file: &Path) -> Result<()> {
    std::io::copy(&mut File::open(file)?, &mut std::io::sink())?;
    Ok(())
}

/// A process that ends with its owner.
pub struct Ended(pub Child);

impl Drop for Ended {
    fn drop(&mut self) {
        // One that has ended already is what is wanted.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A guest of QEMU's with virtiofsd, whose first process is the load.
struct Qemu {
    vmm: Ended,
    _server: Ended,
    port: BufReader<UnixStream>,
    folder: tempfile::TempDir,
}

impl Qemu {
    fn start(plan: &Plan<'_>, virtiofsd: &Path, shape: boot::Shape) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        let at = |name: &str| -> PathBuf { folder.path().join(name) };
        let mut server = Command::new(virtiofsd);
        // One argument: the older of the two servers with this name accepts no other form.
        server.arg(format!("--socket-path={}", at("fs.sock").display()));
        server.args(["-f", "-o", "cache=auto", "-o"]);
        server.arg(format!("source={}", plan.folder.display()));
        let log = File::create(at("virtiofsd.log"))?;
        server.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let server = Ended(server.spawn().with_context(|| format!("starting {server:?}"))?);
        until(|| at("fs.sock").exists()).with_context(|| {
            let said = fs::read_to_string(at("virtiofsd.log")).unwrap_or_default();
            format!("virtiofsd's socket; it said: {said}")
        })?;
        pack(&plan.bin.join(LOAD), folder.path())?;
        let initramfs = boot::padded(&at("guest.cpio"), folder.path())?;
        let mut vmm = boot::microvm(plan.guest, &initramfs, shape, ",memory-backend=ram");
        vmm.args([
            "-object",
            &format!("memory-backend-memfd,id=ram,size={}M,share=on", shape.memory),
        ]);
        vmm.args(["-chardev", &format!("socket,id=fs,path={}", at("fs.sock").display())]);
        vmm.args(["-device", "vhost-user-fs-pci,chardev=fs,tag=bench"]);
        let port = at("port.sock");
        let socket = format!("socket,id=p,server=on,wait=off,path={}", port.display());
        vmm.args(["-chardev", &socket, "-device", "virtserialport,chardev=p,nr=1,name=bench"]);
        let log = File::create(at("qemu.log"))?;
        vmm.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        let vmm = Ended(vmm.spawn().with_context(|| format!("starting {vmm:?}"))?);
        until(|| port.exists()).context("QEMU's socket")?;
        let port = UnixStream::connect(&port)?;
        port.set_read_timeout(Some(LIMIT))?;
        let mut qemu = Self { vmm, _server: server, port: BufReader::new(port), folder };
        let said = qemu.answer()?;
        ensure!(said == "ready\n", "{said}");
        Ok(qemu)
    }

    fn send_command(&mut self, line: &str) -> Result<String> {
        self.port.get_mut().write_all(format!("{line}\n").as_bytes())?;
        let said = self.answer()?;
        ensure!(!said.contains("failed: "), "{said}");
        Ok(said)
    }

    /// Lines up to one of a single dot.
    fn answer(&mut self) -> Result<String> {
        let mut said = String::new();
        loop {
            let mut line = String::new();
            match self.port.read_line(&mut line) {
                Ok(0) => bail!("the guest hung up; it said: {}", self.logs()),
                Ok(_) if line == ".\n" => return Ok(said),
                Ok(_) => said += &line,
                Err(error) => bail!("no answer of the guest ({error}); it said: {}", self.logs()),
            }
        }
    }

    fn logs(&self) -> String {
        let read = |name: &str| fs::read(self.folder.path().join(name)).unwrap_or_default();
        let all = [read("virtiofsd.log"), read("qemu.log")].concat();
        String::from_utf8_lossy(&all[all.len().saturating_sub(4096)..]).into_owned()
    }
}

fn until(done: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !done() {
        ensure!(begin.elapsed() < Duration::from_secs(20), "not there after 20 s");
        std::thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

/// An initramfs of one program, guest.cpio in `folder`.
pub fn pack(program: &Path, folder: &Path) -> Result<()> {
    let tree = folder.join("tree");
    fs::create_dir(&tree)?;
    fs::copy(program, tree.join("init"))?;
    let mut cpio = Command::new("busybox")
        .args(["cpio", "-o", "-H", "newc"])
        .current_dir(&tree)
        .stdin(Stdio::piped())
        .stdout(File::create(folder.join("guest.cpio"))?)
        .stderr(Stdio::null())
        .spawn()
        .context("starting busybox")?;
    cpio.stdin.take().context("piped")?.write_all(b"init\n")?;
    ensure!(cpio.wait()?.success(), "busybox cpio failed");
    Ok(())
}
