//! Saving a vCPU and loading it into a new one (Linux `Documentation/virt/kvm/api.rst`).
//!
//! Order of saving: KVM_GET_MP_STATE first, because it may deliver a pending INIT or SIPI, which
//! changes registers and local APIC; KVM_GET_VCPU_EVENTS last. Order of loading: registers before
//! the local APIC, whose base address is among them; TSC before the APIC's TSC deadline.

use kvm_bindings::{
    Msrs, kvm_debugregs, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs,
    kvm_vcpu_events, kvm_xcrs, kvm_xsave,
};
use serde::{Deserialize, Serialize};

use super::{Bus, Step, Vcpu, VcpuError};
use crate::KvmError;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// Ticks: more than a second on every processor.
const TSC_DISTANCE: u64 = 1 << 40;
const ADVICE: &str = "please report the host's processor and kernel";

/// The state of a vCPU.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debug_regs: kvm_debugregs,
    lapic: kvm_lapic_state,
    msrs: Vec<Msr>,
    events: kvm_vcpu_events,
    /// Frequency of the TSC, kHz.
    tsc_khz: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Msr {
    index: u32,
    value: u64,
}

impl VcpuState {
    /// The time stamp counter at the time of saving.
    pub fn tsc(&self) -> Option<u64> {
        self.msrs.iter().find(|msr| msr.index == MSR_TSC).map(|msr| msr.value)
    }
}

impl Vcpu {
    /// Completes the access for which the last KVM_RUN returned, without running guest code. The
    /// state of the vCPU is incomplete before that.
    pub fn complete_access(&mut self, bus: &impl Bus) -> Result<(), VcpuError> {
        loop {
            self.fd.set_kvm_immediate_exit(1);
            match self.step(bus)? {
                // The next part of an access that has several.
                Step::Handled => {}
                Step::Interrupted | Step::Halted | Step::Shutdown => return Ok(()),
            }
        }
    }

    /// The state of the vCPU, which must have been paused by [`Self::complete_access`]. `msrs` are
    /// the registers that KVM lists ([`crate::vm::Host::msrs`]); those that this guest does not
    /// have are left out.
    pub fn save(&self, msrs: &[u32]) -> Result<VcpuState, VcpuError> {
        let id = self.id;
        let failed = |call| move |e| VcpuError::Kvm { id, source: KvmError::of(call, ADVICE)(e) };
        let mp_state = self.fd.get_mp_state().map_err(failed("KVM_GET_MP_STATE"))?;
        let regs = self.fd.get_regs().map_err(failed("KVM_GET_REGS"))?;
        let sregs = self.fd.get_sregs().map_err(failed("KVM_GET_SREGS"))?;
        let xsave = self.fd.get_xsave().map_err(failed("KVM_GET_XSAVE"))?;
        let xcrs = self.fd.get_xcrs().map_err(failed("KVM_GET_XCRS"))?;
        let debug_regs = self.fd.get_debug_regs().map_err(failed("KVM_GET_DEBUGREGS"))?;
        let lapic = self.fd.get_lapic().map_err(failed("KVM_GET_LAPIC"))?;
        let tsc_khz = self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        let msrs = self.read_msrs(msrs).map_err(failed("KVM_GET_MSRS"))?;
        let events = self.fd.get_vcpu_events().map_err(failed("KVM_GET_VCPU_EVENTS"))?;
        let state = VcpuState {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs,
            events,
            tsc_khz,
        };
        Ok(state)
    }

    /// Sets the counter of a new vCPU far from `tsc`; to be called for all vCPUs before
    /// [`Self::load`]. KVM ignores a write that is within a second of the counter's value, as it takes
    /// it for an attempt to synchronize vCPUs (before Linux 6.7 also the first one, so a VM that was
    /// saved within a second of its start would start near 0 again).
    pub fn move_tsc_away(&self, tsc: u64) -> Result<(), VcpuError> {
        self.set_msr(MSR_TSC, tsc.wrapping_add(TSC_DISTANCE))
    }

    /// Loads a saved state into a new vCPU with the same CPUID. The counter `tsc` must be the same
    /// for all vCPUs, so that KVM keeps them synchronized.
    ///
    /// # Errors
    /// If the TSC of this host has another frequency or is not set, or KVM refuses a part of the state.
    pub fn load(&self, state: &VcpuState, tsc: u64) -> Result<(), VcpuError> {
        let id = self.id;
        let failed = |call| move |e| VcpuError::Kvm { id, source: KvmError::of(call, ADVICE)(e) };
        let VcpuState {
            mp_state,
            regs,
            sregs,
            xsave,
            xcrs,
            debug_regs,
            lapic,
            msrs,
            events,
            tsc_khz,
        } = state;
        let host_khz = self.fd.get_tsc_khz().map_err(failed("KVM_GET_TSC_KHZ"))?;
        if !same_frequency(*tsc_khz, host_khz) {
            return Err(VcpuError::TscFrequency { id, saved: *tsc_khz, host: host_khz });
        }
        self.fd.set_mp_state(*mp_state).map_err(failed("KVM_SET_MP_STATE"))?;
        self.fd.set_regs(regs).map_err(failed("KVM_SET_REGS"))?;
        self.fd.set_sregs(sregs).map_err(failed("KVM_SET_SREGS"))?;
        // SAFETY: KVM reads as many bytes as KVM_CAP_XSAVE2 says, which are more than the 4096 of
        // `kvm_xsave` only if the process has asked for dynamic features (arch_prctl), which this
        // one does not.
        unsafe { self.fd.set_xsave(xsave) }.map_err(failed("KVM_SET_XSAVE"))?;
        self.fd.set_xcrs(xcrs).map_err(failed("KVM_SET_XCRS"))?;
        self.fd.set_debug_regs(debug_regs).map_err(failed("KVM_SET_DEBUGREGS"))?;
        self.fd.set_lapic(lapic).map_err(failed("KVM_SET_LAPIC"))?;
        self.set_msr(MSR_TSC, tsc)?;
        let reached = self.msr(MSR_TSC)?;
        if !(tsc..tsc.saturating_add(TSC_DISTANCE / 2)).contains(&reached) {
            return Err(VcpuError::Tsc { id, wanted: tsc, reached });
        }
        for msr in msrs.iter().filter(|m| !matches!(m.index, MSR_TSC | MSR_TSC_DEADLINE)) {
            self.load_msr(*msr)?;
        }
        for msr in msrs.iter().filter(|msr| msr.index == MSR_TSC_DEADLINE) {
            self.set_msr(msr.index, msr.value)?;
        }
        self.fd.set_vcpu_events(events).map_err(failed("KVM_SET_VCPU_EVENTS"))
    }

    /// Many of the registers that KVM lists are read-only or belong to features that the guest does
    /// not have: a register that has the value already is not written.
    fn load_msr(&self, Msr { index, value }: Msr) -> Result<(), VcpuError> {
        match self.msr(index) {
            Ok(current) if current == value => Ok(()),
            _ => self.set_msr(index, value),
        }
    }

    /// KVM_GET_MSRS stops at the first register that it cannot read; it is left out.
    fn read_msrs(&self, indices: &[u32]) -> Result<Vec<Msr>, kvm_ioctls::Error> {
        let mut found = Vec::new();
        let mut rest = indices;
        while !rest.is_empty() {
            let entries: Vec<_> =
                rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut msrs =
                Msrs::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::EINVAL))?;
            let read = self.fd.get_msrs(&mut msrs)?.min(rest.len());
            let values = msrs.as_slice()[..read].iter();
            found.extend(values.map(|entry| Msr { index: entry.index, value: entry.data }));
            rest = rest.get(read + 1..).unwrap_or_default();
        }
        Ok(found)
    }
}

/// Whether two measured frequencies differ by at most 250 ppm, which is what NTP corrects.
fn same_frequency(a: u32, b: u32) -> bool {
    u64::from(a.abs_diff(b)) * 1_000_000 <= u64::from(a) * 250
}

#[cfg(test)]
mod tests {
    use vm_memory::{Bytes, GuestAddress};

    use super::*;
    use crate::Ram;
    use crate::vm::tests::host;

    /// Remembers the last byte written to a port; every read answers 0x5a.
    #[derive(Default)]
    struct TestBus(std::cell::Cell<u8>);

    impl Bus for TestBus {
        fn port_read(&self, _: u16, data: &mut [u8]) {
            data.fill(0x5a);
        }
        fn port_write(&self, _: u16, data: &[u8]) {
            self.0.set(data[0]);
        }
        fn mmio_read(&self, _: u64, _: &mut [u8]) {}
        fn mmio_write(&self, _: u64, _: &[u8]) {}
    }

    #[test]
    fn a_loaded_vcpu_continues_where_the_saved_one_stopped() {
        let Some(host) = host() else { return };
        crate::vcpu::install_kick_handler().unwrap();
        let machine = || {
            let vm = host.create_vm(1).unwrap();
            let ram = Ram::from_ranges(&[(GuestAddress(0), 0x2000)]).unwrap();
            // mov bx, 0x1234; in al, 0x10; add al, bl; out 0x10, al; hlt
            let code = [0xbb, 0x34, 0x12, 0xe4, 0x10, 0x00, 0xd8, 0xe6, 0x10, 0xf4];
            ram.write_slice(&code, GuestAddress(0x1000)).unwrap();
            crate::vm::map_ram(&vm, &ram).unwrap();
            let table = crate::cpuid::table(host.cpuid(), 0, 1).unwrap();
            (Vcpu::new(&vm, 0, &table).unwrap(), ram, vm)
        };
        let bus = TestBus::default();
        let (mut first, _ram, _vm) = machine();
        first.real_mode(0x1000, 0).unwrap();
        assert_eq!(first.step(&bus).unwrap(), Step::Handled);
        // AL has the value that was read only after the access is complete.
        first.complete_access(&bus).unwrap();
        let state = first.save(&host.msrs().unwrap()).unwrap();
        assert_eq!(state.regs.rax & 0xff, 0x5a);
        assert_eq!(bus.0.get(), 0, "guest code ran while the access was completed");

        let text = serde_json::to_string(&state).unwrap();
        let state: VcpuState = serde_json::from_str(&text).unwrap();
        let tsc = state.tsc().unwrap();
        let (mut second, _ram, _vm) = machine();
        second.move_tsc_away(tsc).unwrap();
        second.load(&state, tsc).unwrap();
        assert!(second.msr(MSR_TSC).unwrap() >= tsc);
        assert_eq!(second.step(&bus).unwrap(), Step::Handled);
        assert_eq!(bus.0.get(), 0x5a_u8.wrapping_add(0x34));

        let other = VcpuState { tsc_khz: state.tsc_khz * 2, ..state };
        let (third, _ram, _vm) = machine();
        assert!(matches!(third.load(&other, tsc), Err(VcpuError::TscFrequency { id: 0, .. })));
    }

    #[test]
    fn a_tsc_that_is_near_the_value_after_the_start_of_the_vm_is_set() {
        let Some(host) = host() else { return };
        let vm = host.create_vm(1).unwrap();
        let table = crate::cpuid::table(host.cpuid(), 0, 1).unwrap();
        let vcpu = Vcpu::new(&vm, 0, &table).unwrap();
        let state = vcpu.save(&host.msrs().unwrap()).unwrap();
        let early = u64::from(state.tsc_khz) * 500;
        vcpu.move_tsc_away(early).unwrap();
        if vcpu.msr(MSR_TSC).unwrap().abs_diff(early.wrapping_add(TSC_DISTANCE)) > TSC_DISTANCE / 2
        {
            println!("SKIP: this KVM does not set the TSC");
            // Such a state is refused rather than continued with another time.
            assert!(matches!(vcpu.load(&state, early), Err(VcpuError::Tsc { id: 0, .. })));
            return;
        }
        vcpu.load(&state, early).unwrap();
        assert!(vcpu.msr(MSR_TSC).unwrap() < early + TSC_DISTANCE / 2);
    }

    #[test]
    fn frequencies_within_250_ppm_are_the_same() {
        assert!(same_frequency(2_000_000, 2_000_500));
        assert!(!same_frequency(2_000_000, 2_000_501));
        assert!(!same_frequency(0, 2_000_000));
    }
}
