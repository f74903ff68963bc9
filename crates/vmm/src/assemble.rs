//! Assembles a VM from its resources and runs it until it ends.
//!
//! - [`error`]: errors of assembly; [`signals`]: signals that end the VM; [`running`]: control
//!   requests.
//!
//! Order: the jail is entered before anything of the guest is read; threads are started after that,
//! so that all of them are in the jail; each thread installs its seccomp filter before any other
//! work; the main thread's filter is installed last, before the vCPUs run.

mod error;
mod running;
mod signals;

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Instant;

use machine::boot::Boot;
use machine::interrupts::{Doorbells, Interrupts};
use machine::layout::Layout;
use machine::vcpu::Vcpu;
use machine::vm::{Host, HotplugRegion};
use machine::{Ram, acpi, boot, cpuid, kernel, vm};
use virtio::Granted;
use vmm_api::{ExitReason, VmExit};

pub use self::error::AssembleError;
use self::error::os;
use self::running::RunningVm;
pub use self::signals::block_signals;
use crate::config::{Resources, Saved};
use crate::console::Console;
use crate::control::Server;
use crate::devices::Devices;
use crate::exit::{CONSOLE_TAIL, ExitState};
use crate::memory::{Hotplug, Memory};
use crate::platform::Platform;
use crate::seccomp::{Filters, Policy, Role};
use crate::vcpus::VcpuThreads;
use crate::{cmdline, jail, log, snapshot};

/// Runs a VM until it ends. Returns the exit report and the file to write it to. `started` is the
/// start time of the process.
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
        restore,
    } = resources;
    log::init(&config.name, log);
    let parts =
        Parts { config, kernel, initramfs, kvm, control, vsock, disks, nets, jail, restore };
    let outcome = ExitState::new().map_err(os("cannot create an eventfd")).and_then(|exit| {
        let console = Console::new(console).map_err(os("cannot open the console ring"))?;
        end_on_panic(&exit);
        if let Err(error) = parts.run(&exit, &console, policy, started) {
            exit.set(ExitReason::Error, crate::chain(&error));
        }
        let tail = console.tail(CONSOLE_TAIL).unwrap_or_default();
        Ok(exit.report(&tail))
    });
    let exit = outcome.unwrap_or_else(|error| failure(&error));
    tracing::info!(reason = ?exit.reason, message = exit.message, "VM has ended");
    (exit, status)
}

/// The exit report of a VM that could not be assembled.
pub fn failure(error: &dyn std::error::Error) -> VmExit {
    let message = crate::chain(error);
    VmExit { reason: ExitReason::Error, message, console_tail: String::new() }
}

/// Ends the VM when a thread of the VMM panics, with the panic message as the reason.
fn end_on_panic(exit: &ExitState) {
    let exit = exit.clone();
    std::panic::set_hook(Box::new(move |info| {
        let message = format!("VMM panicked: {info}");
        tracing::error!(message);
        exit.set(ExitReason::Error, message);
    }));
}

/// Keeps the VM until the process exits.
static VM: OnceLock<Arc<RunningVm>> = OnceLock::new();

/// [`Resources`] without console, log and status.
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
    restore: Option<Saved>,
}

/// How the guest starts.
enum Start {
    /// At the kernel's entry point.
    Boot { entry: u64 },
    /// Where a saved VM was paused.
    Continue(Box<snapshot::VmState>),
}

impl Parts {
    fn run(
        mut self,
        exit: &ExitState,
        console: &Console,
        policy: Policy,
        started: Instant,
    ) -> Result<(), AssembleError> {
        let signals = signals::signalfd()?;
        let filters = Filters::new(policy)?;
        machine::vcpu::install_kick_handler().map_err(os("cannot install a signal handler"))?;
        if let Some(config) = &self.jail {
            jail::enter(config)?;
        }
        jail::limits()?;

        let host = Host::new(self.kvm)?;
        let (memory_mib, max) = (self.config.memory_mib, self.config.max_memory_mib);
        let layout = Layout::with_hotplug(memory_mib, max, host.address_bits())?;
        let fd = host.create_vm(self.config.max_vcpus)?;
        let mut ram = machine::memory::allocate(&layout)?;
        vm::map_ram(&fd, &ram)?;
        let start = match &self.restore {
            Some(saved) => {
                let state = snapshot::read(&saved.state)?;
                machine::memory::load(&ram, &layout, &saved.memory)?;
                Start::Continue(Box::new(state))
            }
            None => {
                let (kernel, initramfs) = (&mut self.kernel, &mut self.initramfs);
                Start::Boot { entry: load(&self.config, &ram, &layout, kernel, initramfs)? }
            }
        };
        drop((self.kernel, self.initramfs, self.restore));
        let count = self.config.max_vcpus;
        let mut vcpus = Vec::new();
        for id in 0..count {
            vcpus.push(Vcpu::new(&fd, id, &cpuid::table(host.cpuid(), id, count)?)?);
        }
        let processor = cpuid::processor(&cpuid::table(host.cpuid(), 0, count)?);

        let region = match &layout.hotplug {
            Some(range) => {
                ram = machine::memory::add_hotplug_region(&ram, range)?;
                Some(HotplugRegion::new(fd.clone(), ram.clone(), range.clone()))
            }
            None => None,
        };
        let bus = Arc::new(pci::Bus::new(layout.pci_window_64.clone()));
        let (interrupts, doorbells) = (Interrupts::new(fd.clone()), Doorbells::new(fd.clone()));
        let worker = thread_init(&filters, exit, Role::Worker);
        let granted = layout.hotplug.clone().map_or_else(Granted::all, Granted::with_hotplug);
        let memory = (ram.clone(), granted.clone());
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
        let hotplug = match (region, &layout.hotplug) {
            (Some(region), Some(range)) => {
                let device = devices.add_mem(range.clone());
                let device = device
                    .map_err(|source| AssembleError::Device { id: "mem".to_owned(), source })?;
                // The region is limited by the address space, and rounded up to whole blocks.
                let size = u32::try_from((range.end - range.start) >> 20).unwrap_or(u32::MAX);
                let limit_mib = size.min(max - memory_mib);
                let (region, block) = (Mutex::new(region), layout.memory_block());
                Some(Hotplug { limit_mib, region, granted, device, block })
            }
            _ => None,
        };
        if self.config.free_page_reporting {
            let device = hotplug.as_ref().map(|hotplug| hotplug.device.clone());
            added("balloon", devices.add_balloon(device))?;
        }
        for disk in self.disks {
            added(&disk.serial.clone(), devices.add_disk(disk))?;
        }
        for net in self.nets {
            added(&net.id.clone(), devices.add_net(net))?;
        }

        match start {
            Start::Boot { entry } => vcpus[0].boot(entry)?,
            Start::Continue(state) => {
                let parts = snapshot::Parts {
                    config: &self.config,
                    processor: &processor,
                    vm: &fd,
                    ram: &ram,
                    layout: &layout,
                    bus: &bus,
                    devices: &devices.list(),
                };
                parts.load(*state, &vcpus)?;
            }
        }

        let serial = self.config.serial_console.then(|| console.clone());
        let platform = Arc::new(Platform::new(bus.clone(), exit.clone(), serial));
        let init = thread_init(&filters, exit, Role::Vcpu);
        let vcpu_threads = VcpuThreads::start(vcpus, &platform, exit, host.msrs()?, init)?;
        let running = Arc::new(RunningVm {
            config: self.config,
            memory: Memory::new(memory_mib, hotplug),
            devices,
            vcpu_threads,
            paused: AtomicBool::new(false),
            vm: fd,
            bus,
            ram,
            layout,
            processor,
            start_us: started.elapsed().as_micros() as u64,
        });
        let init = thread_init(&filters, exit, Role::Control);
        let mut server = Server::new(
            self.control,
            signals,
            exit.clone(),
            console.clone(),
            running.clone(),
            init,
        )?;
        filters.apply(Role::Main)?;
        // The VM is never dropped: removing each ioeventfd waits for a grace period; the kernel
        // frees everything faster when the process exits.
        let _ = VM.set(running.clone());
        running.devices.set_guest_running();
        running.vcpu_threads.resume();
        Ok(server.run()?)
    }
}

/// What a thread of this role runs first: it installs its seccomp filter, or ends the VM.
fn thread_init(
    filters: &Filters,
    exit: &ExitState,
    role: Role,
) -> impl Fn() + Send + Clone + 'static {
    let (filters, exit) = (filters.clone(), exit.clone());
    move || {
        if let Err(error) = filters.apply(role) {
            exit.set(ExitReason::Error, crate::chain(&error));
            // The thread must not run without its filter; the process is about to exit.
            loop {
                std::thread::park();
            }
        }
    }
}

/// Loads kernel and initramfs and writes boot data and ACPI tables; returns the entry point.
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
