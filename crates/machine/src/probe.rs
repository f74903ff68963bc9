//! Measures the speed of KVM on this host: the time of a counting loop and of some hundred port
//! exits in a guest with one page of code.
//!
//! `/dev/kvm` alone does not say whether VMs are usable: it may be emulated, or nested so deeply
//! that a kernel takes minutes to boot. The measurement is bounded in time: it begins with few
//! instructions, repeats with more only while there is time, and a vCPU that does not return is
//! kicked.

use std::fs::{File, OpenOptions};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use vm_memory::{Bytes, GuestAddress};

use crate::Ram;
use crate::vcpu::{Bus, Kicker, Step, Vcpu, install_kick_handler};
use crate::vm::{Host, VmError};

/// Below this a Linux kernel takes minutes to boot, longer than the timeouts of the daemon.
/// Measured: nested virtualization on a busy machine some tens; instruction emulation less than
/// three.
pub const MIN_MIPS: f64 = 10.0;
/// The vCPU is kicked after this time.
const LIMIT: Duration = Duration::from_millis(1500);
/// A measurement at least this long is not repeated with more instructions.
const LONG_ENOUGH: Duration = Duration::from_millis(40);
/// No further measurement is started after this time.
const BUDGET: Duration = Duration::from_millis(600);
const EXITS: u32 = 200;

/// `dec ecx; jnz -3; out 0x10, al; jmp -2`; ECX is set through KVM_SET_REGS.
const COUNT_LOOP: &[u8] = &[0x66, 0x49, 0x75, 0xfc, 0xe6, 0x10, 0xeb, 0xfe];
/// `out 0x11, al; dec ecx; jnz -6; out 0x10, al; jmp -2`.
const EXIT_LOOP: &[u8] = &[0xe6, 0x11, 0x66, 0x49, 0x75, 0xfa, 0xe6, 0x10, 0xeb, 0xfe];
const DONE_PORT: u16 = 0x10;
const CODE: u64 = 0x1000;

/// The result, as `nacelle-vmm probe` prints it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Report {
    /// Whether KVM is fast enough for VMs.
    pub usable: bool,
    /// Million guest instructions per second.
    pub mips: f64,
    /// Microseconds of a KVM exit to user space and back.
    pub exit_us: f64,
    /// The reason and advice if not usable, otherwise the measurements.
    pub why: String,
}

impl Report {
    fn unusable(why: impl ToString) -> Self {
        Self { usable: false, mips: 0.0, exit_us: 0.0, why: why.to_string() }
    }
}

#[derive(Debug, thiserror::Error)]
enum ProbeError {
    #[error("{}", chain(.0))]
    Vm(#[from] VmError),
    #[error("{}", chain(.0))]
    Vcpu(#[from] crate::vcpu::VcpuError),
    #[error("cannot prepare a page of guest memory: {0}")]
    Memory(String),
    #[error("guest code ended in {0:?} instead of its last port write")]
    Guest(Step),
    #[error("cannot install the handler of the kick signal: {0}")]
    Signal(std::io::Error),
}

fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(source) = next {
        text = format!("{text}: {source}");
        next = source.source();
    }
    text
}

/// Probes `/dev/kvm`; takes at most two seconds.
pub fn run() -> Report {
    run_on(Path::new("/dev/kvm"))
}

/// Probes a KVM device at another path.
pub fn run_on(path: &Path) -> Report {
    let device = match OpenOptions::new().read(true).write(true).open(path) {
        Ok(device) => device,
        Err(e) => {
            let advice = match e.kind() {
                std::io::ErrorKind::NotFound => {
                    "enable virtualization in the firmware, or nested virtualization for this VM, \
                     and load kvm_intel or kvm_amd"
                }
                std::io::ErrorKind::PermissionDenied => "run as root or join the group kvm",
                _ => "load kvm_intel or kvm_amd",
            };
            return Report::unusable(format!("cannot open {}: {e}; {advice}", path.display()));
        }
    };
    let (sender, receiver) = channel();
    let (kickers, kicker) = channel();
    let thread = std::thread::Builder::new().name("probe".to_owned()).stack_size(256 << 10).spawn(
        move || {
            sender.send(measure(device, |kicker| {
                let _ = kickers.send(kicker);
            }))
        },
    );
    if let Err(e) = thread {
        return Report::unusable(format!("cannot start a thread: {e}"));
    }
    let mut outcome = receiver.recv_timeout(LIMIT);
    if matches!(outcome, Err(RecvTimeoutError::Timeout)) {
        if let Ok(kicker) = kicker.try_recv() {
            kicker.kick();
        }
        outcome = receiver.recv_timeout(Duration::from_millis(300));
    }
    match outcome {
        Ok(Ok((mips, exit_us))) => evaluate(mips, exit_us),
        Ok(Err(ProbeError::Guest(Step::Interrupted))) => Report::unusable(
            "a few thousand guest instructions took over a second; KVM is emulated",
        ),
        Ok(Err(error)) => Report::unusable(error),
        Err(_) => Report::unusable("KVM_RUN does not return"),
    }
}

fn evaluate(mips: f64, exit_us: f64) -> Report {
    let usable = mips >= MIN_MIPS;
    let why = if usable {
        format!("guest code runs at {mips:.0} MIPS, an exit takes {exit_us:.1} us")
    } else {
        format!(
            "guest code runs at {mips:.1} MIPS, at least {MIN_MIPS} are required: KVM on this host \
             is emulated; use a host with hardware virtualization, or the lab (make lab)"
        )
    };
    Report { usable, mips, exit_us, why }
}

/// Million instructions per second, and microseconds per exit.
fn measure(device: File, started: impl FnOnce(Kicker)) -> Result<(f64, f64), ProbeError> {
    let start = Instant::now();
    install_kick_handler().map_err(ProbeError::Signal)?;
    let mut guest = Guest::new(device)?;
    started(guest.vcpu.bind_to_thread());
    // Warm-up: page faults and other first-time costs are not measured.
    guest.time(COUNT_LOOP, 10)?;
    let mut loops = 2_000u32;
    let mips = loop {
        let took = guest.time(COUNT_LOOP, loops)?;
        let mips = 2.0 * f64::from(loops) / took.as_secs_f64() / 1e6;
        if took >= LONG_ENOUGH || start.elapsed() >= BUDGET || loops >= 1 << 28 {
            break mips;
        }
        // Takes about four times as long as the last one.
        loops *= 4;
    };
    let took = guest.time(EXIT_LOOP, EXITS)?;
    Ok((mips, took.as_secs_f64() * 1e6 / f64::from(EXITS)))
}

struct Guest {
    vcpu: Vcpu,
    ram: Ram,
    _vm: std::sync::Arc<kvm_ioctls::VmFd>,
}

/// The last port written by the guest.
#[derive(Default)]
struct LastPort(std::cell::Cell<u16>);

impl Bus for LastPort {
    fn port_read(&self, _: u16, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn port_write(&self, port: u16, _: &[u8]) {
        self.0.set(port);
    }
    fn mmio_read(&self, _: u64, data: &mut [u8]) {
        data.fill(0xff);
    }
    fn mmio_write(&self, _: u64, _: &[u8]) {}
}

impl Guest {
    fn new(device: File) -> Result<Self, ProbeError> {
        let host = Host::new(OwnedFd::from(device))?;
        let vm = host.create_vm(1)?;
        let ram = Ram::from_ranges(&[(GuestAddress(0), 2 * CODE as usize)])
            .map_err(|e| ProbeError::Memory(e.to_string()))?;
        crate::vm::map_ram(&vm, &ram)?;
        let cpuid = crate::cpuid::table(host.cpuid(), 0, 1)
            .map_err(|e| ProbeError::Memory(e.to_string()))?;
        let vcpu = Vcpu::new(&vm, 0, &cpuid)?;
        Ok(Self { vcpu, ram, _vm: vm })
    }

    /// Runs `code` with `count` in ECX until it writes to [`DONE_PORT`].
    fn time(&mut self, code: &[u8], count: u32) -> Result<Duration, ProbeError> {
        self.ram
            .write_slice(code, GuestAddress(CODE))
            .map_err(|e| ProbeError::Memory(e.to_string()))?;
        self.vcpu.real_mode(CODE, count)?;
        let port = LastPort::default();
        let start = Instant::now();
        loop {
            match self.vcpu.step(&port)? {
                Step::Handled if port.0.get() == DONE_PORT => return Ok(start.elapsed()),
                Step::Handled => {}
                other => return Err(ProbeError::Guest(other)),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_report_of_a_host_without_kvm_has_advice() {
        let report = run_on(Path::new("/nonexistent/kvm"));
        assert!(!report.usable);
        assert!(report.why.contains("enable virtualization"), "{}", report.why);
    }

    #[test]
    fn a_device_that_is_not_kvm_is_recognized() {
        let report = run_on(Path::new("/dev/null"));
        assert!(!report.usable);
        assert!(report.why.contains("not Linux KVM"), "{}", report.why);
    }

    #[test]
    fn a_host_is_usable_if_it_is_fast_enough() {
        assert!(evaluate(900.0, 28.0).usable);
        let slow = evaluate(1.5, 3.0);
        assert!(!slow.usable && slow.why.contains("1.5 MIPS"));
    }

    #[test]
    fn the_probe_ends_within_two_seconds() {
        let start = Instant::now();
        let report = run();
        assert!(start.elapsed() < Duration::from_secs(2), "took {:?}", start.elapsed());
        assert!(!report.why.is_empty());
        if report.usable {
            assert!(report.mips >= MIN_MIPS && report.exit_us > 0.0);
        }
    }
}
