//! RunPod: from a reserved name to a guest that is ready.
//!
//! Every step's undo stands in the ledger before the step; a start that fails or is given up is
//! unwound by the owner from there, exactly as a crash of the daemon in the middle of it would be.

use std::fs::{self, File, OpenOptions};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use agent_api::v1;
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::SockType;
use tokio_util::sync::CancellationToken;
use vmm_api::{DiskConfig, Fd, JailConfig, VmConfig, VsockConfig};

use super::disks::write_volume;
use super::handle::{Handle, Paths};
use super::{death, host_pod, oom_score};
use crate::apparmor::AppArmor;
use crate::config::Config;
use crate::error::Error;
use crate::host::process::{Process, start_time};
use crate::host::{blocking, cgroup, etc, sockets};
use crate::launcher::{Namespaces, Program};
use crate::machine::Machine;
use crate::model::{CpuLimits, TracePhase};
use crate::node::Node;
use crate::observe::{Measured, Observer, Outcome};
use crate::policy::{Change, Effect, Pod};
use crate::ports::Attachment;
use crate::vmm;

/// Volume with the pod's /etc files, in the guest.
pub(super) const ETC_VOLUME: &str = "etc";
/// Bytes of entropy for the guest, more than twice what its RNG holds.
const ENTROPY: usize = 128;
/// Bytes read of a log's end, more than is shown.
const LOG_TAIL: usize = 4 << 10;
/// Number of the program's first descriptor (see [`crate::launcher`]).
const FIRST_FD: i32 = 3;

/// Measures the phases of a start, of which some overlap.
struct Trace {
    began: Instant,
    observer: Arc<dyn Observer>,
    phases: Mutex<Vec<TracePhase>>,
}

impl Trace {
    async fn phase<T>(&self, name: &str, work: impl Future<Output = T>) -> T {
        let start = self.began.elapsed();
        let value = work.await;
        let duration = self.began.elapsed() - start;
        self.observer.measured(Measured::StartPhase { phase: name, took: duration });
        self.phases.lock().unwrap_or_else(PoisonError::into_inner).push(TracePhase {
            name: name.to_owned(),
            start_us: start.as_micros() as u64,
            duration_us: duration.as_micros() as u64,
        });
        tracing::debug!(phase = name, ?duration, "start phase");
        value
    }

    /// In the order of their starts.
    fn into_phases(self) -> Vec<TracePhase> {
        let mut phases = self.phases.into_inner().unwrap_or_else(PoisonError::into_inner);
        phases.sort_by_key(|phase| phase.start_us);
        phases
    }
}

pub(super) async fn run_pod(
    handle: &Arc<Handle>,
    cancel: &CancellationToken,
) -> Result<Arc<Process>, Error> {
    let node = &handle.node;
    let observer = node.observer.clone();
    let trace = Trace { began: Instant::now(), observer, phases: Mutex::default() };
    let pod = handle.pod();

    let leaf = cgroup::leaf(&node.cgroup_root, &pod.spec.cgroup_parent, &pod.id)?;
    let parents = cgroup::missing_parents(&node.cgroup_root, &leaf);
    let mut effects = vec![Effect::StateDir { path: handle.paths.state_dir.clone() }];
    let own_network = !pod.spec.host.is_some_and(|host| host.network);
    if own_network {
        effects.push(Effect::Network);
    }
    effects.push(Effect::Cgroup { leaf: leaf.clone(), parents });
    if pod.spec.host.is_none() {
        effects.push(Effect::ScratchDisk { path: handle.paths.scratch_disk.clone() });
    }
    trace.phase("journal", handle.commit(vec![Change::Planned(effects)])).await?;

    // Cancelled by the caller, or because the other half of the start has failed.
    let start_cancelled = cancel.child_token();
    let attach = trace.phase("network", async {
        if !own_network {
            return Ok(Attachment::default());
        }
        let attached = async {
            let attached = node.network.attach(&pod.id, &pod.spec, &start_cancelled).await;
            attached.map_err(|e| network_failed("attach", e))
        };
        let attached = node.failpoints.around("host: attach to the network", attached).await;
        if attached.is_err() {
            start_cancelled.cancel();
        }
        attached
    });
    let (attachment, process) = match handle.machine {
        // The VM boots meanwhile; its network interfaces are plugged when both are done.
        Machine::Vm(_) => {
            let unattached = Attachment::default();
            let boot = async {
                let boot = boot(handle, &pod, &unattached, &leaf, &trace, &start_cancelled);
                let booted = boot.await;
                if booted.is_err() {
                    start_cancelled.cancel();
                }
                booted
            };
            match tokio::join!(attach, boot) {
                (Ok(attachment), Ok(process)) => (attachment, process),
                _ if cancel.is_cancelled() => return Err(cancelled()),
                (Err(error), Ok(_) | Err(Error::Cancelled { .. })) | (Ok(_), Err(error)) => {
                    return Err(error);
                }
                (Err(network), Err(error)) => {
                    tracing::warn!(pod = pod.id, error = %network, "the network failed too");
                    return Err(error);
                }
            }
        }
        // The agent is started in the network namespace.
        Machine::Host(_) => {
            let attachment = attach.await?;
            let booted = boot(handle, &pod, &attachment, &leaf, &trace, &start_cancelled);
            let process = booted.await?;
            (attachment, process)
        }
    };
    let attachment = Arc::new(attachment);

    let configured = async {
        if pod.spec.host.is_none() {
            trace.phase("plug", hotplug_nics(handle, &pod, &attachment)).await?;
        }
        trace.phase("configure", configure(handle, &pod, &attachment)).await
    };
    let configured = async {
        tokio::select! {
            biased;
            () = cancel.cancelled() => Err(cancelled()),
            () = process.ended() => Err(died(handle).await),
            result = configured => result,
        }
    };
    let kernel_release = configured.await?;
    if pod.spec.host.is_none() {
        // Not before: a boot under a tight cap takes seconds.
        limit_cpu(&leaf, &node.cgroup_root, pod.spec.cpu).await;
    }
    let elapsed = trace.began.elapsed();
    let change = Change::Ready { attachment, kernel_release, trace: trace.into_phases() };
    handle.commit(vec![change]).await?;
    tracing::info!(pod = pod.id, ?elapsed, "pod is ready");
    Ok(process)
}

fn cancelled() -> Error {
    Error::Cancelled { what: "start of the pod" }
}

/// Starts the VMM (or a host pod's agent) when the node admits it, and waits for its agent. Returns
/// `Cancelled` when the token is cancelled.
async fn boot(
    handle: &Arc<Handle>,
    pod: &Pod,
    attachment: &Attachment,
    leaf: &Path,
    trace: &Trace,
    start_cancelled: &CancellationToken,
) -> Result<Arc<Process>, Error> {
    let node = &handle.node;
    let admitted = trace.phase("admission", async {
        tokio::select! {
            permit = node.starts.acquire() => permit.map_err(|_| cancelled()),
            () = start_cancelled.cancelled() => Err(cancelled()),
        }
    });
    let _permit = admitted.await?;
    if start_cancelled.is_cancelled() {
        return Err(cancelled());
    }
    let began = Instant::now();
    let booted = boot_admitted(handle, pod, attachment, leaf, trace, start_cancelled).await;
    let outcome = match &booted {
        Err(BootError { timed_out: true, .. }) => Outcome::TimedOut,
        Err(BootError { error: Error::Cancelled { .. }, .. }) => Outcome::Cancelled,
        Err(_) => Outcome::Failed,
        Ok(_) => Outcome::Ok,
    };
    if pod.spec.host.is_none() {
        node.observer.measured(Measured::Boot { outcome, took: began.elapsed() });
    }
    booted.map_err(|failed| failed.error)
}

struct BootError {
    error: Error,
    /// The agent did not answer in time.
    timed_out: bool,
}

impl From<Error> for BootError {
    fn from(error: Error) -> Self {
        Self { error, timed_out: false }
    }
}

async fn boot_admitted(
    handle: &Arc<Handle>,
    pod: &Pod,
    attachment: &Attachment,
    leaf: &Path,
    trace: &Trace,
    start_cancelled: &CancellationToken,
) -> Result<Arc<Process>, BootError> {
    let launched = trace.phase("launch", launch(handle, pod, attachment, leaf)).await?;
    let (process, started) = launched;
    let change = Change::VmmStarted { pid: process.pid, started };
    trace.phase("journal", handle.commit(vec![change])).await?;

    let limit = handle.node.config.boot_deadline();
    let up = trace.phase("boot", async {
        tokio::select! {
            () = handle.guest.wait_until_up() => Ok(()),
            () = process.ended() => Err(died(handle).await.into()),
            () = start_cancelled.cancelled() => Err(cancelled().into()),
            () = tokio::time::sleep(limit) => {
                Err(BootError { error: silent(&handle.paths, limit), timed_out: true })
            }
        }
    });
    up.await?;
    Ok(process)
}

/// Plugs a network interface into the VM for each of the pod's; the agent finds them by their MAC
/// addresses when it configures the pod.
async fn hotplug_nics(handle: &Handle, pod: &Pod, attachment: &Attachment) -> Result<(), Error> {
    let node = &handle.node;
    let opened = async {
        let taps = node.network.open_taps(&pod.id, attachment).await;
        taps.map_err(|e| network_failed("open the taps", e))
    };
    let taps = node.failpoints.around("host: open the taps", opened).await?;
    if taps.len() != attachment.interfaces.len() {
        let (got, want) = (taps.len(), attachment.interfaces.len());
        return Err(Error::Internal(anyhow::anyhow!("{got} taps for {want} interfaces")));
    }
    let vmm = handle.machine.vmm()?;
    for (tap, interface) in taps.into_iter().zip(&attachment.interfaces) {
        vmm.add_net(&interface.name, interface.mac, interface.mtu, tap).await?;
    }
    Ok(())
}

/// Caps the VM's CPU time on the host. Where that cannot be, the guest's own limits still hold.
pub(super) async fn limit_cpu(leaf: &Path, root: &Path, limits: CpuLimits) {
    let (folder, root) = (leaf.to_owned(), root.to_owned());
    let limited = blocking(move || cgroup::limit_cpu(&root, &folder, limits)).await;
    if let Err(error) = limited {
        tracing::warn!(cgroup = %leaf.display(), %error, "CPU limits of a pod are not set");
    }
}

pub(super) fn network_failed(what: &str, error: crate::ports::PortError) -> Error {
    let error: anyhow::Error = error.into();
    Error::Internal(error.context(format!("network: {what}")))
}

async fn died(handle: &Handle) -> Error {
    let reason = death::cause(handle).await.reason;
    Error::unavailable(format!(
        "the pod ended while it started: {reason}{}",
        log_tail(&handle.paths)
    ))
}

fn silent(paths: &Paths, limit: Duration) -> Error {
    let console = File::open(&paths.console)
        .and_then(|file| vmm_api::console_ring::read(&file, 0))
        .map(|(bytes, _)| vmm::clean(&String::from_utf8_lossy(&bytes), 1024))
        .unwrap_or_default();
    Error::unavailable(format!(
        "the guest's agent did not answer within {limit:?}; its console ends with: {console:?}{}",
        log_tail(paths)
    ))
}

/// The last words of a VMM that did not get as far as a status, or of an agent without a VM.
fn log_tail(paths: &Paths) -> String {
    let text = end_of(&paths.log, LOG_TAIL).unwrap_or_default();
    let text = vmm::clean(&String::from_utf8_lossy(&text), 1024);
    if text.is_empty() { String::new() } else { format!("; log: {text}") }
}

/// The last bytes of a file, which may be as long as it likes.
fn end_of(path: &Path, limit: usize) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(limit as u64);
    let mut bytes = vec![0; limit];
    let len = file.read_at(&mut bytes, start)?;
    bytes.truncate(len);
    Ok(bytes)
}

/// Makes the files and sockets, starts the VMM with them.
async fn launch(
    handle: &Arc<Handle>,
    pod: &Pod,
    attachment: &Attachment,
    leaf: &Path,
) -> Result<(Arc<Process>, u64), Error> {
    let node = &handle.node;
    let program = {
        let (handle, pod) = (handle.clone(), pod.clone());
        let (attachment, leaf) = (attachment.clone(), leaf.to_owned());
        blocking(move || {
            let program = match handle.machine.host() {
                Some(own) => host_pod::program(&handle, own, &attachment, &leaf),
                None => program(&handle, &pod, &leaf),
            };
            cgroup::count_memory(&handle.node.cgroup_root, &leaf);
            program
        })
        .await?
    };
    let launched = node.launcher.launch(program);
    let launched = node.failpoints.around("host: launch", launched).await?;
    let failed = |e| Error::io("watch the VMM", e);
    let process = Process::new(launched.pid, launched.pidfd).map_err(failed)?;
    match start_time(launched.pid) {
        Ok(started) => {
            oom_score::apply_to_new(handle, process.pid, started).await;
            Ok((Arc::new(process), started))
        }
        // It has ended and is reaped: there is nothing to be found again.
        Err(_) => Err(died(handle).await),
    }
}

/// Descriptors in the order in which the VMM finds them.
#[derive(Default)]
struct FdTable(Vec<OwnedFd>);

impl FdTable {
    fn add(&mut self, fd: impl Into<OwnedFd>) -> Fd {
        self.0.push(fd.into());
        Fd(FIRST_FD + self.0.len() as i32 - 1)
    }
}

fn program(handle: &Handle, pod: &Pod, leaf: &Path) -> Result<Program, Error> {
    let (paths, node) = (&handle.paths, &handle.node);
    let failed = |what: &str, path: &Path, e| Error::io(format!("{what} {}", path.display()), e);
    for folder in [&paths.state_dir, &paths.folder] {
        node.failpoints.around_blocking("host: make a pod's folder", || {
            let mut folders = fs::DirBuilder::new();
            let made = folders.recursive(true).mode(0o700).create(folder);
            made.map_err(|e| failed("make", folder, e))
        })?;
    }
    let new_file = |path: &Path| {
        let mut options = OpenOptions::new();
        options.read(true).write(true).create(true).truncate(true).mode(0o600);
        options.open(path).map_err(|e| failed("create", path, e))
    };
    let existing = |path: &Path| File::open(path).map_err(|e| failed("open", path, e));
    let socket = |path: &Path, kind| {
        sockets::listen_at(path, kind).map_err(|e| failed("listen at", path, e))
    };
    let log = OpenOptions::new().append(true).create(true).mode(0o600).open(&paths.log);
    let log = log.map_err(|e| failed("create", &paths.log, e))?;
    let kvm = OpenOptions::new().read(true).write(true).open(&node.config.kvm);
    let kvm = kvm.map_err(|e| failed("open", &node.config.kvm, e))?;
    let mut fds = FdTable::default();
    let config_file = memfd_create(c"vm-config", MFdFlags::MFD_CLOEXEC)
        .map_err(|e| Error::io("make a memory file", e.into()))?;
    let config_fd = fds.add(config_file.try_clone().map_err(|e| Error::io("dup", e))?);
    let config = vm_config(handle, pod, |what| {
        Ok(match what {
            Wanted::Kernel => fds.add(existing(&node.config.kernel)?),
            Wanted::Initramfs => fds.add(existing(&node.config.initramfs)?),
            Wanted::Kvm => fds.add(kvm.try_clone().map_err(|e| Error::io("dup", e))?),
            Wanted::Control => fds.add(socket(&paths.control, SockType::SeqPacket)?),
            Wanted::Vsock => fds.add(socket(&paths.vsock, SockType::Stream)?),
            Wanted::Status => fds.add(new_file(&paths.status)?),
            Wanted::Console => fds.add(new_file(&paths.console)?),
            Wanted::Log => fds.add(log.try_clone().map_err(|e| Error::io("dup", e))?),
        })
    })?;
    let scratch = node.failpoints.around_blocking("host: make the scratch disk", || {
        node.scratch.clone_to(&paths.scratch_disk, node.config.scratch_disk_size())
    })?;
    let serial = agent_api::SCRATCH_SERIAL.to_owned();
    let disks = vec![DiskConfig { serial, file: fds.add(scratch), read_only: false }];
    let config = VmConfig { disks, ..config };

    let text = serde_json::to_vec(&config).map_err(|e| Error::Internal(e.into()))?;
    let mut file = File::from(config_file);
    std::io::Write::write_all(&mut file, &text).map_err(|e| Error::io("write the VM's", e))?;
    std::io::Seek::rewind(&mut file).map_err(|e| Error::io("rewind the VM's", e))?;
    let cgroup = node.failpoints.around_blocking("host: make the cgroup", || {
        cgroup::make(leaf).map_err(|e| failed("make cgroup", leaf, e))
    })?;
    Ok(Program {
        exe: node.config.vmm.clone(),
        args: vec!["--config-fd".into(), config_fd.0.to_string()],
        cgroup: cgroup.into(),
        stderr: log.into(),
        fds: fds.0,
        own: Namespaces::ALL,
    })
}

enum Wanted {
    Kernel,
    Initramfs,
    Kvm,
    Control,
    Vsock,
    Status,
    Console,
    Log,
}

/// Landlock and Yama are in the guest kernel's own list, which this one takes the place of.
const WITH_APPARMOR: &str = "lsm=landlock,yama,apparmor";

/// What is appended to the guest kernel's command line; of an option the last word counts, the
/// operator's.
fn cmdline(config: &Config, host_runs_apparmor: bool) -> String {
    if config.apparmor && host_runs_apparmor {
        format!("{WITH_APPARMOR} {}", config.cmdline_extra).trim_end().to_owned()
    } else {
        config.cmdline_extra.clone()
    }
}

fn vm_config(
    handle: &Handle,
    pod: &Pod,
    mut fd: impl FnMut(Wanted) -> Result<Fd, Error>,
) -> Result<VmConfig, Error> {
    let config = &handle.node.config;
    let vcpus = pod.spec.vcpus.unwrap_or(config.default_vcpus).max(1);
    let memory_mib = pod.spec.memory_mib.unwrap_or(config.default_memory_mib);
    Ok(VmConfig {
        version: vmm_api::VERSION,
        name: pod.id.clone(),
        vcpus,
        max_vcpus: config.vcpus_at_most(vcpus),
        memory_mib,
        max_memory_mib: config.memory_at_most(memory_mib),
        free_page_reporting: config.reclaim_memory,
        kernel: fd(Wanted::Kernel)?,
        initramfs: Some(fd(Wanted::Initramfs)?),
        cmdline: cmdline(config, AppArmor::of_host().runs()),
        kvm: fd(Wanted::Kvm)?,
        control: fd(Wanted::Control)?,
        status: fd(Wanted::Status)?,
        console: fd(Wanted::Console)?,
        log: Some(fd(Wanted::Log)?),
        vsock: Some(VsockConfig { guest_cid: agent_api::GUEST_CID, listener: fd(Wanted::Vsock)? }),
        disks: Vec::new(),
        nets: Vec::new(),
        serial_console: false,
        jail: Some(JailConfig { uid: pod.uid, gid: pod.uid }),
    })
}

/// Gives the guest its identity; answers its kernel's release.
async fn configure(handle: &Handle, pod: &Pod, attachment: &Attachment) -> Result<String, Error> {
    let guest = &handle.guest;
    let hello = guest.hello(handle.node.config.guest_call_deadline()).await?;
    let mut entropy = vec![0; ENTROPY];
    getrandom(&mut entropy)?;
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    let request = v1::ConfigurePodRequest {
        pod_id: pod.id.clone(),
        hostname: pod.spec.hostname.clone(),
        unix_time_ns: now.as_nanos() as i64,
        entropy,
        sysctls: pod.spec.sysctls.clone().into_iter().collect(),
        interfaces: attachment.interfaces.iter().map(interface).collect(),
        routes: attachment.routes.iter().map(route).collect(),
        shm_size: 0,
        reclaim_idle: handle.node.config.reclaim_memory,
    };
    guest.call("configure the pod", |mut c| async move { c.configure_pod(request).await }).await?;
    write_volume(guest, ETC_VOLUME, etc_files(handle.node.as_ref(), pod, attachment)).await?;
    Ok(vmm::clean(&hello.kernel_release, 128))
}

fn etc_files(node: &Node, pod: &Pod, attachment: &Attachment) -> Vec<v1::VolumeFile> {
    let host = fs::read_to_string(&node.config.resolv_conf).unwrap_or_default();
    let spec = &pod.spec;
    let hosts = match spec.host {
        // Names that the node knows, as its network is the pod's.
        Some(host) if host.network => fs::read_to_string("/etc/hosts").ok(),
        _ => None,
    };
    let texts = [
        hosts.unwrap_or_else(|| etc::hosts(&spec.hostname, &attachment.addresses)),
        format!("{}\n", spec.hostname),
        etc::resolv_conf(&spec.dns, &attachment.dns, &host),
    ];
    let files = etc::FILES.iter().zip(texts).map(|((name, _), text)| v1::VolumeFile {
        path: (*name).to_owned(),
        mode: libc::S_IFREG | 0o644,
        uid: 0,
        gid: 0,
        content: text.into_bytes(),
        append: false,
    });
    files.collect()
}

fn interface(interface: &crate::ports::Interface) -> v1::Interface {
    v1::Interface {
        mac: interface.mac.map(|b| format!("{b:02x}")).join(":"),
        name: interface.name.clone(),
        mtu: interface.mtu.into(),
        addresses: interface.addresses.clone(),
    }
}

fn route(route: &crate::ports::Route) -> v1::Route {
    v1::Route {
        destination: route.destination.clone(),
        gateway: route.gateway.clone(),
        interface: route.interface.clone(),
    }
}

fn getrandom(bytes: &mut [u8]) -> Result<(), Error> {
    File::open("/dev/urandom")
        .and_then(|mut file| std::io::Read::read_exact(&mut file, bytes))
        .map_err(|e| Error::io("read /dev/urandom", e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_a_long_log_only_the_end_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.log");
        assert!(end_of(&path, 8).is_err());
        for (text, end) in [("", ""), ("short", "short"), ("a line\nlast one", "last one")] {
            fs::write(&path, text).unwrap();
            assert_eq!(end_of(&path, 8).unwrap(), end.as_bytes());
        }
    }

    #[test]
    fn a_guest_runs_apparmor_where_its_host_does_unless_the_operator_says_otherwise() {
        let mut config = Config::default();
        assert_eq!(cmdline(&config, true), "lsm=landlock,yama,apparmor");
        assert_eq!(cmdline(&config, false), "");
        config.cmdline_extra = "quiet lsm=".to_owned();
        assert_eq!(cmdline(&config, true), "lsm=landlock,yama,apparmor quiet lsm=");
        config.apparmor = false;
        assert_eq!(cmdline(&config, true), "quiet lsm=");
    }
}
