//! Puts a VM together from its resources, runs it, and says how it ended.
//!
//! Order matters: the jail comes before anything that belongs to the guest is looked at, threads
//! come after the jail (so that they are all in it), each thread's filter before its first work, the
//! main thread's filter last, and only then the guest's first instruction.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use machine::acpi::AcpiError;
use machine::boot::{Boot, BootError};
use machine::cpuid::CpuidError;
use machine::interrupts::{Doorbells, Interrupts};
use machine::kernel::KernelError;
use machine::layout::{Layout, LayoutError};
use machine::memory::MemoryError;
use machine::vcpu::{Vcpu, VcpuError};
use machine::vm::{Host, Room, VmError};
use machine::{Ram, acpi, boot, cpuid, kernel, vm};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use virtio::Granted;
use vmm_api::{Counters, ExitReason, Phase, Reply, Request, VERSION, VmExit, VmStatus};

use crate::config::{self, ConfigError, Resources};
use crate::console::Console;
use crate::control::{ControlError, Server, Vm};
use crate::devices::Devices;
use crate::end::{CONSOLE_WANTED, End};
use crate::jail::{self, JailError};
use crate::memory::{Growth, Memory};
use crate::platform::Platform;
use crate::processors::{ProcessorError, Processors};
use crate::seccomp::{FilterError, Filters, Policy, Role};
use crate::{cmdline, log};

#[derive(Debug, thiserror::Error)]
pub enum AssembleError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Jail(#[from] JailError),
    #[error(transparent)]
    Filter(#[from] FilterError),
    #[error(transparent)]
    Layout(#[from] LayoutError),
    #[error(transparent)]
    Memory(#[from] MemoryError),
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Kernel(#[from] KernelError),
    #[error(transparent)]
    Acpi(#[from] AcpiError),
    #[error(transparent)]
    Boot(#[from] BootError),
    #[error(transparent)]
    Cpuid(#[from] CpuidError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error("device {id:?}")]
    Device { id: String, source: vmm_api::Error },
    #[error(transparent)]
    Processors(#[from] ProcessorError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("{what}")]
    Os { what: &'static str, source: std::io::Error },
}

fn os<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> AssembleError {
    move |source| AssembleError::Os { what, source: source.into() }
}

/// Runs a VM to its end. `started` is when the process began.
pub fn run(resources: Resources, policy: Policy, started: Instant) -> (VmExit, File) {
    let Resources {
        config,
        kernel,
        initramfs,
        kvm,
        control,
        status,
        console,
        log,
        vsock,
        disks,
        nets,
        jail,
    } = resources;
    log::init(&config.name, log);
    let parts = Parts { config, kernel, initramfs, kvm, control, vsock, disks, nets, jail };
    let outcome = End::new().map_err(os("eventfd")).and_then(|end| {
        let console = Console::new(console).map_err(os("console ring"))?;
        report_panics(&end);
        if let Err(error) = parts.run(&end, &console, policy, started) {
            end.set(ExitReason::Error, crate::chain(&error));
        }
        let tail = console.tail(CONSOLE_WANTED).unwrap_or_default();
        Ok(end.report(&tail))
    });
    let exit = outcome.unwrap_or_else(|error| failure(&error));
    tracing::info!(reason = ?exit.reason, message = exit.message, "VM has ended");
    (exit, status)
}

/// What to leave in the status file when it did not even come to assembling.
pub fn failure(error: &dyn std::error::Error) -> VmExit {
    let message = crate::chain(error);
    VmExit { reason: ExitReason::Error, message, console_tail: String::new() }
}

/// A thread of ours that panics would leave a VM that half works: end it, saying where.
fn report_panics(end: &End) {
    let end = end.clone();
    std::panic::set_hook(Box::new(move |info| {
        let message = format!("VMM is broken: {info}");
        tracing::error!(message);
        end.set(ExitReason::Error, message);
    }));
}

/// The VM, for as long as the process lives.
static KEPT: OnceLock<Arc<Running>> = OnceLock::new();

struct Parts {
    config: vmm_api::VmConfig,
    kernel: File,
    initramfs: Option<File>,
    kvm: OwnedFd,
    control: OwnedFd,
    vsock: Option<(u64, OwnedFd)>,
    disks: Vec<crate::devices::Disk>,
    nets: Vec<crate::devices::NetDevice>,
    jail: Option<vmm_api::JailConfig>,
}

impl Parts {
    fn run(
        mut self,
        end: &End,
        console: &Console,
        policy: Policy,
        started: Instant,
    ) -> Result<(), AssembleError> {
        let signals = ending_signals()?;
        let filters = Filters::new(policy)?;
        machine::vcpu::install_kick_handler().map_err(os("signal handler"))?;
        if let Some(config) = &self.jail {
            jail::enter(config)?;
        }
        jail::limits()?;

        let host = Host::new(self.kvm)?;
        let (memory_mib, max) = (self.config.memory_mib, self.config.max_memory_mib);
        let layout = Layout::with_room(memory_mib, max, host.address_bits())?;
        let fd = host.create_vm(self.config.max_vcpus)?;
        let mut ram = machine::memory::allocate(&layout)?;
        vm::map_ram(&fd, &ram)?;
        let entry = load(&self.config, &ram, &layout, &mut self.kernel, &mut self.initramfs)?;
        drop((self.kernel, self.initramfs));
        let count = self.config.max_vcpus;
        let mut vcpus = Vec::new();
        for id in 0..count {
            vcpus.push(Vcpu::new(&fd, id, &cpuid::table(host.cpuid(), id, count)?)?);
        }
        vcpus[0].boot(entry)?;

        let room = match &layout.room {
            Some(room) => {
                ram = machine::memory::add_room(&ram, room)?;
                Some(Room::new(fd.clone(), ram.clone(), room.clone()))
            }
            None => None,
        };
        let bus = Arc::new(pci::Bus::new(layout.pci_window_64.clone()));
        let (interrupts, doorbells) = (Interrupts::new(fd.clone()), Doorbells::new(fd));
        let worker = bound(&filters, end, Role::Worker);
        let granted = layout.room.clone().map_or_else(Granted::everything, Granted::without);
        let memory = (ram, granted.clone());
        let devices = Devices::new(bus.clone(), memory, interrupts, doorbells, count, worker)
            .map_err(|source| AssembleError::Device { id: "worker".to_owned(), source })?;
        let added = |id: &str, result: Result<String, vmm_api::Error>| {
            let id = id.to_owned();
            result.map(drop).map_err(|source| AssembleError::Device { id, source })
        };
        added("console", devices.add_console(console.clone()))?;
        added("rng", devices.add_rng())?;
        if let Some((cid, listener)) = self.vsock {
            added("vsock", devices.add_vsock(cid, listener))?;
        }
        let growth = match (room, &layout.room) {
            (Some(room), Some(range)) => {
                let device = devices.add_mem(range.clone());
                let device = device
                    .map_err(|source| AssembleError::Device { id: "mem".to_owned(), source })?;
                // The room is cut where addresses end, and rounded up to whole blocks.
                let size = u32::try_from((range.end - range.start) >> 20).unwrap_or(u32::MAX);
                let limit_mib = size.min(max - memory_mib);
                let (room, block) = (Mutex::new(room), layout.memory_block());
                Some(Growth { limit_mib, room, granted, device, block })
            }
            _ => None,
        };
        if self.config.free_page_reporting {
            let room = growth.as_ref().map(|growth| growth.device.clone());
            added("balloon", devices.add_balloon(room))?;
        }
        for disk in self.disks {
            added(&disk.serial.clone(), devices.add_disk(disk))?;
        }
        for net in self.nets {
            added(&net.id.clone(), devices.add_net(net))?;
        }

        let serial = self.config.serial_console.then(|| console.clone());
        let platform = Arc::new(Platform::new(bus, end.clone(), serial));
        let processors =
            Processors::start(vcpus, &platform, end, bound(&filters, end, Role::Vcpu))?;
        let running = Arc::new(Running {
            config: self.config,
            memory: Memory::new(memory_mib, growth),
            devices,
            processors,
            paused: AtomicBool::new(false),
            start_us: started.elapsed().as_micros() as u64,
        });
        let init = bound(&filters, end, Role::Orders);
        let mut server = Server::new(
            self.control,
            signals,
            end.clone(),
            console.clone(),
            running.clone(),
            init,
        )?;
        filters.apply(Role::Main)?;
        // Taking a VM apart piece by piece (a grace period for each doorbell) would only delay its
        // end: the kernel does it faster when the process goes.
        let _ = KEPT.set(running.clone());
        running.devices.guest_starts();
        running.processors.resume();
        Ok(server.run()?)
    }
}

/// What a thread of this role does first: bind itself to its filter, or end the VM.
fn bound(filters: &Filters, end: &End, role: Role) -> impl Fn() + Send + Clone + 'static {
    let (filters, end) = (filters.clone(), end.clone());
    move || {
        if let Err(error) = filters.apply(role) {
            end.set(ExitReason::Error, crate::chain(&error));
            // Nothing may run here without its filter; the process is about to end.
            loop {
                std::thread::park();
            }
        }
    }
}

/// Loads kernel and initramfs and writes all tables; returns the entry point.
fn load(
    config: &vmm_api::VmConfig,
    ram: &Ram,
    layout: &Layout,
    file: &mut File,
    initramfs: &mut Option<File>,
) -> Result<u64, AssembleError> {
    let kernel = kernel::load(ram, layout, file)?;
    let initramfs = match initramfs {
        Some(file) => Some(kernel::load_initramfs(ram, layout, &kernel, file)?),
        None => None,
    };
    let rsdp = acpi::write(ram, layout, config.max_vcpus, config.serial_console)?;
    let cmdline = cmdline::build(config);
    boot::write(ram, layout, &Boot { kernel: &kernel, cmdline: &cmdline, initramfs, rsdp })?;
    Ok(kernel.entry)
}

/// The signals that end a VM.
fn ending() -> SigSet {
    let mut set = SigSet::empty();
    for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGHUP] {
        set.add(signal);
    }
    set
}

/// Blocks the signals that end a VM, in this thread and those it starts from now on. [`run`] does
/// so itself; whoever starts threads before it must do it earlier.
pub fn block_signals() -> Result<(), AssembleError> {
    ending().thread_block().map_err(os("blocking signals"))
}

/// A descriptor for the signals that end a VM, which are blocked.
fn ending_signals() -> Result<OwnedFd, AssembleError> {
    block_signals()?;
    let set = ending();
    let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
    Ok(OwnedFd::from(SignalFd::with_flags(&set, flags).map_err(os("signalfd"))?))
}

/// A VM that runs.
struct Running {
    config: vmm_api::VmConfig,
    memory: Memory,
    devices: Devices,
    processors: Processors,
    paused: AtomicBool,
    start_us: u64,
}

impl Running {
    fn add(&self, request: Request, fd: OwnedFd) -> Result<String, vmm_api::Error> {
        let refused =
            |error: ConfigError| vmm_api::Error::Malformed { message: crate::chain(&error) };
        match request {
            Request::AddDisk { disk } => {
                self.devices.add_disk(config::hot_disk(&disk, fd).map_err(refused)?)
            }
            Request::AddNet { net } => {
                self.devices.add_net(config::hot_net(&net, fd).map_err(refused)?)
            }
            Request::AddFs { id, tag } => {
                self.devices.add_fs(config::hot_fs(&id, &tag, fd).map_err(refused)?)
            }
            other => {
                Err(vmm_api::Error::Failed { message: format!("{other:?} takes no descriptor") })
            }
        }
    }

    fn pause(&self) -> Result<(), vmm_api::Error> {
        let failed =
            |error: ProcessorError| vmm_api::Error::Failed { message: crate::chain(&error) };
        if self.paused.load(Ordering::Acquire) {
            return Ok(());
        }
        self.processors.pause().map_err(failed)?;
        if let Err(error) = self.devices.pause() {
            self.processors.resume();
            return Err(error);
        }
        self.paused.store(true, Ordering::Release);
        Ok(())
    }

    fn resume(&self) -> Result<(), vmm_api::Error> {
        if self.paused.load(Ordering::Acquire) {
            self.devices.resume()?;
            self.processors.resume();
            self.paused.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl Vm for Running {
    fn status(&self) -> VmStatus {
        let paused = self.paused.load(Ordering::Acquire);
        VmStatus {
            version: VERSION,
            phase: if paused { Phase::Paused } else { Phase::Running },
            pid: std::process::id(),
            vcpus: self.config.vcpus,
            memory_mib: self.memory.wanted_mib(),
            plugged_mib: self.memory.plugged_mib(),
            max_memory_mib: self.memory.max_mib(),
            devices: self.devices.list(),
        }
    }

    fn counters(&self) -> Counters {
        let (exits, start_us) = (self.processors.exits(), self.start_us);
        Counters { exits, start_us, devices: self.devices.counters() }
    }

    fn perform(&self, request: Request, mut fds: Vec<OwnedFd>) -> Reply {
        let done = |result: Result<(), vmm_api::Error>| match result {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Error(error),
        };
        match (request, fds.pop()) {
            (Request::Pause, _) => done(self.pause()),
            (Request::Resume, _) => done(self.resume()),
            (Request::ResizeMemory { memory_mib }, _) => done(self.memory.resize(memory_mib)),
            (Request::RemoveDevice { id }, _) => done(self.devices.remove(&id)),
            (request, Some(fd)) => match self.add(request, fd) {
                Ok(pci) => Reply::Added { pci },
                Err(error) => Reply::Error(error),
            },
            (request, None) => {
                let message = format!("{request:?} was not expected here");
                Reply::Error(vmm_api::Error::Failed { message })
            }
        }
    }
}
