//! RunPod: from a reserved name to a guest that is ready.
//!
//! Every effect is in the ledger before its step. A failed or cancelled start is undone by the
//! owner from the ledger, as after a crash of the daemon.

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
use super::volume_ids::ETC_VOLUME;
use super::{exit_cause, host_pod, oom_score};
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

/// Entropy for the guest, bytes; more than twice the state of its RNG.
const ENTROPY: usize = 128;
/// Bytes read from the end of a log, more than is shown.
const LOG_TAIL: usize = 4 << 10;
/// Number of the program's first descriptor (see [`crate::launcher`]).
const FIRST_FD: i32 = 3;

/// Measures the phases of a start, which may overlap.
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

    /// Ordered by start time.
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

    // Cancelled by the caller, or if the concurrent half of the start fails.
    let start_cancelled = cancel.child_token();
    let attach = trace.phase("network", async {
        if !own_network {
            return Ok(Attachment::default());
        }
        let attached = async {
            let attached = node.network.attach(&pod.id, &pod.spec, &start_cancelled).await;
            attached.map_err(|e| network_failed("attach", e))
        };
        let attached = node.failpoints.wrap("host: attach to the network", attached).await;
        if attached.is_err() {
            start_cancelled.cancel();
        }
        attached
    });
    let (attachment, process) = match handle.machine {
        // The VM boots meanwhile; its network interfaces are plugged after both.
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
                    tracing::warn!(pod = pod.id, error = %network, "network attachment failed too");
                    return Err(error);
                }
            }
        }
        // The agent is started in the network namespace.
        Machine::Host(_) => {
            let attached = attach.await;
            let attachment = attached
                .map_err(|error| if cancel.is_cancelled() { cancelled() } else { error })?;
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
            () = process.ended() => Err(exited_during_start(handle).await),
            result = configured => result,
        }
    };
    let kernel_release = configured.await?;
    if pod.spec.host.is_none() {
        // After the boot, which takes seconds under a tight limit.
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

/// Starts the VMM (or a host pod's agent) when a start permit is free, and waits for its agent.
/// Returns `Cancelled` if the token is cancelled.
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
            () = process.ended() => Err(exited_during_start(handle).await.into()),
            () = start_cancelled.cancelled() => Err(cancelled().into()),
            () = tokio::time::sleep(limit) => {
                Err(BootError { error: boot_timeout(&handle.paths, limit), timed_out: true })
            }
        }
    });
    up.await?;
    Ok(process)
}

/// Plugs the pod's network interfaces; the agent finds them by MAC address when it configures the
/// pod.
async fn hotplug_nics(handle: &Handle, pod: &Pod, attachment: &Attachment) -> Result<(), Error> {
    let node = &handle.node;
    let opened = async {
        let taps = node.network.open_taps(&pod.id, attachment).await;
        taps.map_err(|e| network_failed("open the taps", e))
    };
    let taps = node.failpoints.wrap("host: open the taps", opened).await?;
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

/// Sets the VM's CPU limits on the host. On an error the limits inside the guest still apply.
pub(super) async fn limit_cpu(leaf: &Path, root: &Path, limits: CpuLimits) {
    let (directory, root) = (leaf.to_owned(), root.to_owned());
    let limited = blocking(move || cgroup::limit_cpu(&root, &directory, limits)).await;
    if let Err(error) = limited {
        tracing::warn!(cgroup = %leaf.display(), %error, "CPU limits of a pod are not set");
    }
}

pub(super) fn network_failed(what: &str, error: crate::ports::PortError) -> Error {
    let error: anyhow::Error = error.into();
    Error::Internal(error.context(format!("network: {what}")))
}

async fn exited_during_start(handle: &Handle) -> Error {
    let reason = exit_cause::find(handle).await.reason;
    Error::unavailable(format!(
        "the pod ended while it started: {reason}{}",
        log_tail(&handle.paths)
    ))
}

fn boot_timeout(paths: &Paths, limit: Duration) -> Error {
    let console = File::open(&paths.console)
        .and_then(|file| vmm_api::console_ring::read(&file, 0))
        .map(|(bytes, _)| vmm::clean(&String::from_utf8_lossy(&bytes), 1024))
        .unwrap_or_default();
    Error::unavailable(format!(
        "the guest's agent did not answer within {limit:?}; its console ends with: {console:?}{}",
        log_tail(paths)
    ))
}

/// The end of the log of a VMM that wrote no status, or of a host pod's agent.
fn log_tail(paths: &Paths) -> String {
    let text = read_tail(&paths.log, LOG_TAIL).unwrap_or_default();
    let text = vmm::clean(&String::from_utf8_lossy(&text), 1024);
    if text.is_empty() { String::new() } else { format!("; log: {text}") }
}

/// The last bytes of a file of any size.
fn read_tail(path: &Path, limit: usize) -> std::io::Result<Vec<u8>> {
    let file = File::open(path)?;
    let start = file.metadata()?.len().saturating_sub(limit as u64);
    let mut bytes = vec![0; limit];
    let len = file.read_at(&mut bytes, start)?;
    bytes.truncate(len);
    Ok(bytes)
}

/// Creates the files and sockets, and starts the VMM.
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
    let launched = node.failpoints.wrap("host: launch", launched).await?;
    let failed = |e| Error::io("watch the VMM", e);
    let process = Process::new(launched.pid, launched.pidfd).map_err(failed)?;
    match start_time(launched.pid) {
        Ok(started) => {
            oom_score::apply_to_new(handle, process.pid, started).await;
            Ok((Arc::new(process), started))
        }
        // It has exited and was reaped.
        Err(_) => Err(exited_during_start(handle).await),
    }
}

/// Descriptors to pass to the VMM, in order.
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
    for directory in [&paths.state_dir, &paths.directory] {
        node.failpoints.wrap_blocking("host: make a pod's directory", || {
            let mut directories = fs::DirBuilder::new();
            let made = directories.recursive(true).mode(0o700).create(directory);
            made.map_err(|e| failed("create", directory, e))
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
        .map_err(|e| Error::io("create the memfd of the configuration", e.into()))?;
    let config_fd = fds.add(config_file.try_clone().map_err(|e| Error::io("dup", e))?);
    let config = vm_config(handle, pod, |what| {
        Ok(match what {
            VmFile::Kernel => fds.add(existing(&node.config.kernel)?),
            VmFile::Initramfs => fds.add(existing(&node.config.initramfs)?),
            VmFile::Kvm => fds.add(kvm.try_clone().map_err(|e| Error::io("dup", e))?),
            VmFile::Control => fds.add(socket(&paths.control, SockType::SeqPacket)?),
            VmFile::Vsock => fds.add(socket(&paths.vsock, SockType::Stream)?),
            VmFile::Status => fds.add(new_file(&paths.status)?),
            VmFile::Console => fds.add(new_file(&paths.console)?),
            VmFile::Log => fds.add(log.try_clone().map_err(|e| Error::io("dup", e))?),
        })
    })?;
    let scratch = node.failpoints.wrap_blocking("host: make the scratch disk", || {
        node.scratch.clone_to(&paths.scratch_disk, node.config.scratch_disk_size())
    })?;
    let serial = agent_api::SCRATCH_SERIAL.to_owned();
    let disks = vec![DiskConfig { serial, file: fds.add(scratch), read_only: false }];
    let config = VmConfig { disks, ..config };

    let text = serde_json::to_vec(&config).map_err(|e| Error::Internal(e.into()))?;
    let mut file = File::from(config_file);
    std::io::Write::write_all(&mut file, &text)
        .map_err(|e| Error::io("write the VM's configuration", e))?;
    std::io::Seek::rewind(&mut file).map_err(|e| Error::io("rewind the VM's configuration", e))?;
    let cgroup = node.failpoints.wrap_blocking("host: make the cgroup", || {
        cgroup::make(leaf).map_err(|e| failed("create cgroup", leaf, e))
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

enum VmFile {
    Kernel,
    Initramfs,
    Kvm,
    Control,
    Vsock,
    Status,
    Console,
    Log,
}

/// Replaces the guest kernel's default list, which has landlock and yama.
const WITH_APPARMOR: &str = "lsm=landlock,yama,apparmor";

/// Suffix of the guest kernel's command line; the last value of an option wins: the operator's.
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
    mut fd: impl FnMut(VmFile) -> Result<Fd, Error>,
) -> Result<VmConfig, Error> {
    let config = &handle.node.config;
    let vcpus = pod.spec.vcpus.unwrap_or(config.default_vcpus).max(1);
    let memory_mib = pod.spec.memory_mib.unwrap_or(config.default_memory_mib);
    Ok(VmConfig {
        version: vmm_api::VERSION,
        name: pod.id.clone(),
        vcpus,
        max_vcpus: config.max_vcpus_of(vcpus),
        memory_mib,
        max_memory_mib: config.max_memory_of(memory_mib),
        free_page_reporting: config.reclaim_memory,
        kernel: fd(VmFile::Kernel)?,
        initramfs: Some(fd(VmFile::Initramfs)?),
        cmdline: cmdline(config, AppArmor::of_host().runs()),
        kvm: fd(VmFile::Kvm)?,
        control: fd(VmFile::Control)?,
        status: fd(VmFile::Status)?,
        console: fd(VmFile::Console)?,
        log: Some(fd(VmFile::Log)?),
        vsock: Some(VsockConfig { guest_cid: agent_api::GUEST_CID, listener: fd(VmFile::Vsock)? }),
        disks: Vec::new(),
        nets: Vec::new(),
        serial_console: false,
        jail: Some(JailConfig { uid: pod.uid, gid: pod.uid }),
        restore: None,
    })
}

/// Configures the guest; returns its kernel's release.
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
        // The host's /etc/hosts, as it shares the host's network.
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
    fn only_the_end_of_a_long_log_is_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vmm.log");
        assert!(read_tail(&path, 8).is_err());
        for (text, end) in [("", ""), ("short", "short"), ("a line\nlast one", "last one")] {
            fs::write(&path, text).unwrap();
            assert_eq!(read_tail(&path, 8).unwrap(), end.as_bytes());
        }
    }

    #[test]
    fn a_guest_enables_apparmor_if_the_host_does_unless_configured_otherwise() {
        let mut config = Config::default();
        assert_eq!(cmdline(&config, true), "lsm=landlock,yama,apparmor");
        assert_eq!(cmdline(&config, false), "");
        config.cmdline_extra = "quiet lsm=".to_owned();
        assert_eq!(cmdline(&config, true), "lsm=landlock,yama,apparmor quiet lsm=");
        config.apparmor = false;
        assert_eq!(cmdline(&config, true), "quiet lsm=");
    }
}
