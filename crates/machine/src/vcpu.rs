//! One vCPU: its initial state, and one step of its run loop.
//!
//! Interrupting a vCPU that runs: [`Kicker::kick`] sends [`kick_signal`] to its thread. The handler
//! sets `immediate_exit` in the thread's own `kvm_run` page, so a kick that arrives just before
//! `KVM_RUN` is not lost (Linux `Documentation/virt/kvm/api.rst`, `immediate_exit`).
//!
//! [`state`]: saving and loading a vCPU.
#![allow(unsafe_code)] // signal handler and the shared kvm_run page

mod state;

use std::cell::Cell;
use std::io;
use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use kvm_bindings::{CpuId, Msrs, kvm_fpu, kvm_msr_entry, kvm_regs, kvm_segment};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};

use crate::KvmError;
use crate::boot::{CODE_SELECTOR, DATA_SELECTOR, GDT_ENTRIES};
use crate::layout::{GDT, PML4, ZERO_PAGE};

pub use self::state::VcpuState;

const CR0_PE: u64 = 1 << 0;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
const RFLAGS_RESERVED: u64 = 1 << 1;
/// FPU state after FINIT, SSE exceptions masked.
const FCW_INIT: u16 = 0x37f;
const MXCSR_INIT: u32 = 0x1f80;
/// Memory types: everything write-back (Intel SDM volume 3, 12.11.2.1).
pub(crate) const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE: u64 = 1 << 11;
const MTRR_WRITE_BACK: u64 = 6;
/// Intel SDM volume 4, table 2-2. Firmware enables fast string operations; without the bit Linux
/// does not use REP MOVSB and REP STOSB for copying (`early_init_intel`). AMD processors do not
/// have this register, but KVM emulates it for their guests as well.
const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1 << 0;

#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    #[error("vCPU {id}")]
    Kvm { id: u8, source: KvmError },
    #[error("vCPU {id}: KVM does not accept MSR {index:#x}")]
    Msr { id: u8, index: u32 },
    #[error(
        "vCPU {id}: the TSC had {saved} kHz when the VM was saved and has {host} kHz on this host; \
         the VM can only be restored on the host on which it was saved"
    )]
    TscFrequency { id: u8, saved: u32, host: u32 },
    #[error("vCPU {id}: the TSC was set to {wanted} and is {reached}")]
    Tsc { id: u8, wanted: u64, reached: u64 },
    #[error("vCPU {id} cannot enter the guest: hardware reason {reason:#x}")]
    Entry { id: u8, reason: u64 },
    #[error("vCPU {id}: KVM internal error at instruction {rip:#x} (suberror {suberror})")]
    Emulation { id: u8, rip: u64, suberror: u32 },
    #[error("vCPU {id}: unexpected exit {exit}")]
    Unexpected { id: u8, exit: String },
    #[error("vCPU {id}: KVM_RUN failed")]
    Run { id: u8, source: io::Error },
}

/// Handles the guest's port and memory-mapped accesses. Called concurrently on vCPU threads.
///
/// `data` of a port access may have several elements of a string instruction.
pub trait Bus {
    fn port_read(&self, port: u16, data: &mut [u8]);
    fn port_write(&self, port: u16, data: &[u8]);
    fn mmio_read(&self, address: u64, data: &mut [u8]);
    fn mmio_write(&self, address: u64, data: &[u8]);
}

/// Why [`Vcpu::step`] returned.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
    /// An access was handled by the bus.
    Handled,
    /// KVM_RUN was interrupted by a signal or a kick.
    Interrupted,
    /// The guest halted with no local APIC to wake it.
    Halted,
    /// Triple fault.
    Shutdown,
}

/// Counts of KVM exits to user space, by reason.
#[derive(Debug, Default)]
pub struct ExitCounts {
    port_in: AtomicU64,
    port_out: AtomicU64,
    mmio_read: AtomicU64,
    mmio_write: AtomicU64,
    interrupted: AtomicU64,
    other: AtomicU64,
}

impl ExitCounts {
    /// Names and counts.
    pub fn all(&self) -> [(&'static str, u64); 6] {
        let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
        [
            ("io_in", get(&self.port_in)),
            ("io_out", get(&self.port_out)),
            ("mmio_read", get(&self.mmio_read)),
            ("mmio_write", get(&self.mmio_write)),
            ("signal", get(&self.interrupted)),
            ("other", get(&self.other)),
        ]
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn one_msr(id: u8, index: u32, data: u64) -> Result<Msrs, VcpuError> {
    let entry = kvm_msr_entry { index, data, ..Default::default() };
    Msrs::from_entries(&[entry]).map_err(|_| VcpuError::Msr { id, index })
}

/// A vCPU.
#[derive(Debug)]
pub struct Vcpu {
    id: u8,
    fd: VcpuFd,
    exits: Arc<ExitCounts>,
}

impl Vcpu {
    /// Creates the vCPU with this id, which is also its APIC id. vCPUs other than 0 wait for INIT
    /// and SIPI.
    pub fn new(vm: &VmFd, id: u8, cpuid: &CpuId) -> Result<Self, VcpuError> {
        let failed = |e| VcpuError::Kvm { id, source: e };
        let fd = vm
            .create_vcpu(id.into())
            .map_err(KvmError::of("KVM_CREATE_VCPU", "check memory and the limit of open files"))
            .map_err(failed)?;
        fd.set_cpuid2(cpuid)
            .map_err(KvmError::of("KVM_SET_CPUID2", "please report the host's processor"))
            .map_err(failed)?;
        let vcpu = Self { id, fd, exits: Arc::default() };
        let enabled = vcpu.msr(MSR_MISC_ENABLE)? | MISC_ENABLE_FAST_STRINGS;
        vcpu.set_msr(MSR_MISC_ENABLE, enabled)?;
        Ok(vcpu)
    }

    /// The exit counters, readable by other threads.
    pub fn exits(&self) -> Arc<ExitCounts> {
        self.exits.clone()
    }

    /// Sets the registers of the boot processor for the 64-bit boot protocol, with RIP at `entry`.
    pub fn boot(&self, entry: u64) -> Result<(), VcpuError> {
        let id = self.id;
        self.set_msr(MSR_MTRR_DEF_TYPE, MTRR_ENABLE | MTRR_WRITE_BACK)?;
        self.set_registers(entry).map_err(|source| VcpuError::Kvm { id, source })
    }

    /// Sets the registers for real mode at `address` (below 64 KiB), with `count` in ECX.
    pub(crate) fn real_mode(&self, address: u64, count: u32) -> Result<(), VcpuError> {
        let id = self.id;
        let failed =
            |call| move |e| VcpuError::Kvm { id, source: KvmError::of(call, "report it")(e) };
        let mut special = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        special.cs.base = 0;
        special.cs.selector = 0;
        self.fd.set_sregs(&special).map_err(failed("KVM_SET_SREGS"))?;
        let general = kvm_regs {
            rip: address,
            rcx: count.into(),
            rflags: RFLAGS_RESERVED,
            ..Default::default()
        };
        self.fd.set_regs(&general).map_err(failed("KVM_SET_REGS"))
    }

    fn msr(&self, index: u32) -> Result<u64, VcpuError> {
        let id = self.id;
        let failed = KvmError::of("KVM_GET_MSRS", "please report the host's processor");
        let mut msrs = one_msr(id, index, 0)?;
        let done =
            self.fd.get_msrs(&mut msrs).map_err(|e| VcpuError::Kvm { id, source: failed(e) })?;
        match msrs.as_slice().first() {
            Some(entry) if done == 1 => Ok(entry.data),
            _ => Err(VcpuError::Msr { id, index }),
        }
    }

    fn set_msr(&self, index: u32, data: u64) -> Result<(), VcpuError> {
        let id = self.id;
        let failed = KvmError::of("KVM_SET_MSRS", "please report the host's processor");
        let msrs = one_msr(id, index, data)?;
        match self.fd.set_msrs(&msrs).map_err(|e| VcpuError::Kvm { id, source: failed(e) })? {
            1 => Ok(()),
            _ => Err(VcpuError::Msr { id, index }),
        }
    }

    fn set_registers(&self, entry: u64) -> Result<(), KvmError> {
        let advice = "please report the host's processor";
        let mut special = self.fd.get_sregs().map_err(KvmError::of("KVM_GET_SREGS", advice))?;
        let code = segment(GDT_ENTRIES[2], CODE_SELECTOR);
        let data = segment(GDT_ENTRIES[3], DATA_SELECTOR);
        special.cs = code;
        (special.ds, special.es, special.fs, special.gs, special.ss) =
            (data, data, data, data, data);
        special.gdt.base = GDT;
        special.gdt.limit = (GDT_ENTRIES.len() * 8 - 1) as u16;
        special.idt.base = 0;
        special.idt.limit = 0;
        special.cr0 = CR0_PE | CR0_ET | CR0_PG;
        special.cr3 = PML4;
        special.cr4 |= CR4_PAE;
        special.efer |= EFER_LME | EFER_LMA;
        self.fd.set_sregs(&special).map_err(KvmError::of("KVM_SET_SREGS", advice))?;
        let general =
            kvm_regs { rip: entry, rsi: ZERO_PAGE, rflags: RFLAGS_RESERVED, ..Default::default() };
        self.fd.set_regs(&general).map_err(KvmError::of("KVM_SET_REGS", advice))?;
        let fpu = kvm_fpu { fcw: FCW_INIT, mxcsr: MXCSR_INIT, ..Default::default() };
        self.fd.set_fpu(&fpu).map_err(KvmError::of("KVM_SET_FPU", advice))
    }

    /// Makes kicks of this vCPU go to the calling thread, which must be the one that runs it.
    pub fn bind_to_thread(&mut self) -> Kicker {
        let flag = ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit).cast();
        IMMEDIATE_EXIT.set(flag);
        // SAFETY: gettid has no preconditions.
        Kicker { thread: unsafe { libc::gettid() } }
    }

    /// Tells the guest that it was paused (KVM_KVMCLOCK_CTRL), so that its soft-lockup watchdog
    /// does not fire.
    pub fn notify_paused(&self) {
        // Fails with EINVAL in a guest that does not use the paravirtual clock.
        let _ = self.fd.kvmclock_ctrl();
    }

    /// Runs the guest until the next exit to user space, and handles it.
    pub fn step(&mut self, bus: &impl Bus) -> Result<Step, VcpuError> {
        let id = self.id;
        let exits = &self.exits;
        let exit = match self.fd.run() {
            Ok(exit) => exit,
            Err(e) if e.errno() == libc::EINTR || e.errno() == libc::EAGAIN => {
                count(&exits.interrupted);
                self.fd.set_kvm_immediate_exit(0);
                return Ok(Step::Interrupted);
            }
            Err(e) => return Err(VcpuError::Run { id, source: e.into() }),
        };
        match exit {
            VcpuExit::IoIn(port, data) => {
                count(&exits.port_in);
                bus.port_read(port, data);
            }
            VcpuExit::IoOut(port, data) => {
                count(&exits.port_out);
                bus.port_write(port, data);
            }
            VcpuExit::MmioRead(address, data) => {
                count(&exits.mmio_read);
                bus.mmio_read(address, data);
            }
            VcpuExit::MmioWrite(address, data) => {
                count(&exits.mmio_write);
                bus.mmio_write(address, data);
            }
            VcpuExit::Intr => return Ok(Step::Interrupted),
            VcpuExit::Hlt => return Ok(Step::Halted),
            VcpuExit::Shutdown => return Ok(Step::Shutdown),
            VcpuExit::FailEntry(reason, _) => return Err(VcpuError::Entry { id, reason }),
            VcpuExit::InternalError => return Err(self.emulation_failure()),
            // There is no I/O APIC.
            VcpuExit::IoapicEoi(_) => count(&exits.other),
            other => return Err(VcpuError::Unexpected { id, exit: format!("{other:?}") }),
        }
        Ok(Step::Handled)
    }

    fn emulation_failure(&mut self) -> VcpuError {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: the exit reason was KVM_EXIT_INTERNAL_ERROR, so the kernel has filled this
        // member of the union, whose fields are plain integers.
        let suberror = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        VcpuError::Emulation { id: self.id, rip, suberror }
    }
}

/// The flat segment register of a GDT entry.
fn segment(descriptor: u64, selector: u16) -> kvm_segment {
    let bit = |n: u32| (descriptor >> n & 1) as u8;
    kvm_segment {
        base: 0,
        limit: 0xffff_ffff,
        selector,
        type_: (descriptor >> 40 & 0xf) as u8,
        s: bit(44),
        dpl: 0,
        present: bit(47),
        avl: 0,
        l: bit(53),
        db: bit(54),
        g: bit(55),
        unusable: 0,
        padding: 0,
    }
}

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*const AtomicU8> = const { Cell::new(ptr::null()) };
}

/// Interrupts the thread that runs a vCPU, which sees [`Step::Interrupted`].
#[derive(Debug, Clone, Copy)]
pub struct Kicker {
    thread: libc::pid_t,
}

impl Kicker {
    pub fn kick(self) {
        // SAFETY: tgkill accesses no memory. The thread belongs to this process; if it has ended,
        // the call fails with ESRCH, or reaches a new thread of this process, for which the handler
        // does nothing.
        unsafe {
            libc::syscall(libc::SYS_tgkill, libc::getpid(), self.thread, kick_signal());
        }
    }
}

/// The kick signal: the first real-time signal that the C library does not use.
pub fn kick_signal() -> i32 {
    libc::SIGRTMIN()
}

/// Installs the handler of [`kick_signal`]; once per process, before any vCPU runs.
pub fn install_kick_handler() -> io::Result<()> {
    extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        let flag = IMMEDIATE_EXIT.get();
        if !flag.is_null() {
            // SAFETY: the pointer was set by `Vcpu::bind_to_thread` on this thread and points into
            // the mapping of that vCPU, which its run loop owns until the thread ends; dropping the
            // vCPU clears the pointer. An atomic byte store is async-signal-safe.
            unsafe { (*flag).store(1, Ordering::Relaxed) };
        }
    }
    vmm_sys_util::signal::register_signal_handler(kick_signal(), on_kick)
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))
}

impl Drop for Vcpu {
    fn drop(&mut self) {
        // `fd` unmaps the page; a later kick must not write to it.
        let own: *const AtomicU8 = ptr::from_mut(&mut self.fd.get_kvm_run().immediate_exit).cast();
        if IMMEDIATE_EXIT.get() == own {
            IMMEDIATE_EXIT.set(ptr::null());
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;
    use std::time::Duration;

    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::Ram;
    use crate::vm::tests::host;

    struct NullBus;

    impl Bus for NullBus {
        fn port_read(&self, _: u16, _: &mut [u8]) {}
        fn port_write(&self, _: u16, _: &[u8]) {}
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn every_vcpu_has_fast_strings_and_no_performance_counters() {
        /// AMD's first event select (APM volume 2, 13.2.1).
        const PERF_EVT_SEL_0: u32 = 0xc001_0000;
        let Some(host) = host() else { return };
        let vm = host.create_vm(2).unwrap();
        for id in 0..2 {
            let table = crate::cpuid::table(host.cpuid(), id, 2).unwrap();
            let vcpu = Vcpu::new(&vm, id, &table).unwrap();
            assert_eq!(vcpu.msr(MSR_MISC_ENABLE).unwrap() & MISC_ENABLE_FAST_STRINGS, 1);
            if host.can_disable_pmu() {
                // Enabled and counting cycles; KVM ignores such a write or refuses it.
                let _ = vcpu.set_msr(PERF_EVT_SEL_0, 1 << 22 | 0x76);
                assert_eq!(vcpu.msr(PERF_EVT_SEL_0).unwrap_or(0), 0);
            }
        }
    }

    #[test]
    fn a_kick_interrupts_a_running_vcpu_and_one_before_kvm_run_is_not_lost() {
        let Some(host) = host() else { return };
        install_kick_handler().unwrap();
        let vm = host.create_vm(1).unwrap();
        let ram = Ram::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
        // jmp to itself.
        ram.write_slice(&[0xeb, 0xfe], GuestAddress(0x1000)).unwrap();
        crate::vm::map_ram(&vm, &ram).unwrap();
        let table = crate::cpuid::table(host.cpuid(), 0, 1).unwrap();
        let mut vcpu = Vcpu::new(&vm, 0, &table).unwrap();
        vcpu.real_mode(0x1000, 0).unwrap();
        let own = vcpu.bind_to_thread();
        own.kick();
        assert_eq!(vcpu.step(&NullBus).unwrap(), Step::Interrupted);
        let (sender, receiver) = channel();
        let kicker = std::thread::spawn(move || {
            // Repeated, as the first kick may come before the second KVM_RUN.
            while receiver.recv_timeout(Duration::from_millis(20)).is_err() {
                own.kick();
            }
        });
        assert_eq!(vcpu.step(&NullBus).unwrap(), Step::Interrupted);
        sender.send(()).unwrap();
        kicker.join().unwrap();
        assert!(vcpu.exits().all().contains(&("signal", 2)));
    }
}
