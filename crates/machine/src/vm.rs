//! Required KVM capabilities, VM creation, memory slots.
//!
//! The only interrupt controllers are in-kernel local APICs (`KVM_CAP_SPLIT_IRQCHIP`); there is no
//! PIC, PIT or I/O APIC. All devices use MSI-X and the guest's timer is the APIC's TSC deadline
//! timer, so a full in-kernel irqchip would only add attack surface and exits: Linux programs each
//! pin of an I/O APIC in the MADT separately (several hundred exits per boot). Hardware-reduced
//! ACPI makes Linux skip PIC and PIT.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes a raw host address

use std::ops::Range;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
    KVM_PMU_CAP_DISABLE, kvm_clock_data, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::{self, MemoryError};
use crate::vcpu::MSR_MTRR_DEF_TYPE;
use crate::{KvmError, Ram};

/// Required capabilities.
const REQUIRED_CAPS: &[(Cap, &str)] = &[
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::SplitIrqchip, "KVM_CAP_SPLIT_IRQCHIP"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IoeventfdNoLength, "KVM_CAP_IOEVENTFD_NO_LENGTH"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::TscDeadlineTimer, "KVM_CAP_TSC_DEADLINE_TIMER"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
];

#[derive(Debug, thiserror::Error)]
pub enum VmError {
    #[error(transparent)]
    Kvm(#[from] KvmError),
    #[error("/dev/kvm has API version {got}, not {KVM_API_VERSION}; it is not Linux KVM")]
    ApiVersion { got: i32 },
    #[error("/dev/kvm lacks {name}; a host kernel of 5.10 or later is required")]
    Missing { name: &'static str },
    #[error("{got} vCPUs are more than the {limit} that KVM on this host supports")]
    TooManyVcpus { got: u8, limit: usize },
    #[error("{part:#x?} is not memory of the VM")]
    NotRam { part: Range<u64> },
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// `/dev/kvm` with all required capabilities.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Host {
    /// Takes an open `/dev/kvm`. Fails if its API version is wrong or a capability is missing.
    pub fn new(device: OwnedFd) -> Result<Self, VmError> {
        // SAFETY: `device` gives up its descriptor here, so `Kvm` is its only owner; that it is
        // /dev/kvm is verified by the ioctl that follows.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let got = kvm.get_api_version();
        if got != KVM_API_VERSION as i32 {
            return Err(VmError::ApiVersion { got });
        }
        for (cap, name) in REQUIRED_CAPS {
            if !kvm.check_extension(*cap) {
                return Err(VmError::Missing { name });
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID", "reload kvm_intel or kvm_amd"))?;
        Ok(Self { kvm, cpuid })
    }

    /// CPUID entries that KVM supports (KVM_GET_SUPPORTED_CPUID).
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Guest-physical address bits (CPUID 0x8000_0008 EAX).
    pub fn address_bits(&self) -> u8 {
        let leaf = self.cpuid.as_slice().iter().find(|e| e.function == 0x8000_0008);
        leaf.map_or(36, |e| {
            // Bits 23:16, if not 0: guest address bits of a host with memory encryption.
            let guest = (e.eax >> 16) as u8;
            if guest != 0 { guest } else { e.eax as u8 }
        })
    }

    /// The MSRs that KVM saves and restores (KVM_GET_MSR_INDEX_LIST).
    pub fn msrs(&self) -> Result<Vec<u32>, VmError> {
        let list = self
            .kvm
            .get_msr_index_list()
            .map_err(KvmError::of("KVM_GET_MSR_INDEX_LIST", "reload kvm_intel or kvm_amd"))?;
        let mut msrs = list.as_slice().to_vec();
        // KVM has it, but does not list it.
        if !msrs.contains(&MSR_MTRR_DEF_TYPE) {
            msrs.push(MSR_MTRR_DEF_TYPE);
        }
        Ok(msrs)
    }

    /// Creates a VM with in-kernel local APICs for up to `vcpus` vCPUs.
    pub fn create_vm(&self, vcpus: u8) -> Result<Arc<VmFd>, VmError> {
        let limit = self.kvm.get_max_vcpus();
        if usize::from(vcpus) > limit {
            return Err(VmError::TooManyVcpus { got: vcpus, limit });
        }
        let vm = self.kvm.create_vm().map_err(KvmError::of(
            "KVM_CREATE_VM",
            "check that no other hypervisor holds the processor and that memory is left",
        ))?;
        let report = "please report the host kernel's version";
        vm.set_identity_map_address(KVM_IDENTITY_MAP)
            .map_err(KvmError::of("KVM_SET_IDENTITY_MAP_ADDR", report))?;
        vm.set_tss_address(KVM_TSS as usize).map_err(KvmError::of("KVM_SET_TSS_ADDR", report))?;
        // args[0]: routes reserved for an I/O APIC in user space, of which there is none.
        let split = kvm_enable_cap { cap: KVM_CAP_SPLIT_IRQCHIP, ..Default::default() };
        vm.enable_cap(&split).map_err(KvmError::of("KVM_ENABLE_CAP(SPLIT_IRQCHIP)", report))?;
        if self.can_disable_pmu() {
            let mut pmu = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
            pmu.args[0] = KVM_PMU_CAP_DISABLE.into();
            vm.enable_cap(&pmu).map_err(KvmError::of("KVM_ENABLE_CAP(PMU_CAPABILITY)", report))?;
        }
        Ok(Arc::new(vm))
    }

    /// Whether KVM can disable the guest's performance counters (Linux 5.18). Hiding them in CPUID
    /// (see [`crate::cpuid`]) is not enough: AMD's four legacy counters are not in CPUID, and Linux
    /// uses them if their MSRs work.
    pub(crate) fn can_disable_pmu(&self) -> bool {
        let can = self.kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
        can > 0 && can as u32 & KVM_PMU_CAP_DISABLE != 0
    }
}

/// The VM's paravirtual clock, ns (KVM_GET_CLOCK).
pub fn clock(vm: &VmFd) -> Result<u64, VmError> {
    let report = "please report the host kernel's version";
    Ok(vm.get_clock().map_err(KvmError::of("KVM_GET_CLOCK", report))?.clock)
}

/// Sets the VM's paravirtual clock, ns (KVM_SET_CLOCK), after the TSCs of all vCPUs.
pub fn set_clock(vm: &VmFd, clock: u64) -> Result<(), VmError> {
    let report = "please report the host kernel's version";
    let data = kvm_clock_data { clock, ..Default::default() };
    Ok(vm.set_clock(&data).map_err(KvmError::of("KVM_SET_CLOCK", report))?)
}

/// Maps all of `ram` into the guest, one memory slot per region.
///
/// `ram` must be kept mapped until `vm` and all its vCPUs are dropped; the caller holds both.
pub fn map_ram(vm: &VmFd, ram: &Ram) -> Result<(), VmError> {
    for (slot, region) in ram.iter().enumerate() {
        let start = region.start_addr();
        set_memory_region(
            vm,
            ram,
            slot as u32,
            start.raw_value()..start.raw_value() + region.len(),
        )?;
    }
    Ok(())
}

/// Maps a part of a region of `ram` into the guest.
fn set_memory_region(vm: &VmFd, ram: &Ram, slot: u32, part: Range<u64>) -> Result<(), VmError> {
    let size = part.end - part.start;
    let host = ram
        .get_slice(GuestAddress(part.start), size as usize)
        .map_err(|_| VmError::NotRam { part: part.clone() })?
        .ptr_guard_mut()
        .as_ptr() as u64;
    let slot = kvm_userspace_memory_region {
        slot,
        flags: 0,
        guest_phys_addr: part.start,
        memory_size: size,
        userspace_addr: host,
    };
    // SAFETY: address and size are those of a slice of a live mapping of `ram`, which the caller
    // keeps as long as the VM; guest and VMM share it, and the VMM accesses it only through
    // vm-memory's volatile accesses.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION", "give the VM less memory"))?;
    Ok(())
}

/// Memory slots of the hotplug region; the last one takes all of the rest. Linux before 5.11 has
/// 509 slots per VM.
const HOTPLUG_SLOTS: u32 = 64;

/// The hotplug region. Only the granted part is mapped into the guest and accessible to devices:
/// the rest uses no KVM memory (before Linux 5.15 about 2.5 MiB of tables per GiB of slot), and the
/// guest cannot allocate it by touching it or by using it for device buffers.
#[derive(Debug)]
pub struct HotplugRegion {
    vm: Arc<VmFd>,
    ram: Ram,
    region: Range<u64>,
    granted: u64,
    slots: Range<u32>,
}

impl HotplugRegion {
    /// `region` is the last region of `ram`; the others are mapped into the guest already.
    pub fn new(vm: Arc<VmFd>, ram: Ram, region: Range<u64>) -> Self {
        let first = ram.num_regions() as u32 - 1;
        Self { vm, ram, region, granted: 0, slots: first..first + HOTPLUG_SLOTS }
    }

    /// Bytes mapped into the guest.
    pub fn granted(&self) -> u64 {
        self.granted
    }

    /// Maps at least the first `bytes` of the region into the guest. A grant is never reduced: the
    /// guest may still use the memory. Fails if `bytes` exceeds the region, or mprotect or KVM
    /// fails.
    pub fn grant(&mut self, bytes: u64) -> Result<(), VmError> {
        let size = self.region.end - self.region.start;
        if bytes <= self.granted {
            return Ok(());
        }
        if bytes > size {
            return Err(VmError::NotRam { part: self.region.start..self.region.start + bytes });
        }
        let last = self.slots.len() == 1;
        let bytes = if last { size } else { bytes };
        let part = self.region.start + self.granted..self.region.start + bytes;
        memory::make_accessible(&self.ram, &part)?;
        set_memory_region(&self.vm, &self.ram, self.slots.start, part)?;
        self.slots.start += 1;
        self.granted = bytes;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The host's KVM; tests without it print SKIP.
    pub(crate) fn host() -> Option<Host> {
        let device = std::fs::File::options().read(true).write(true).open("/dev/kvm");
        match device.map(|device| Host::new(device.into())) {
            Ok(Ok(host)) => Some(host),
            Ok(Err(error)) => {
                println!("SKIP: {error}");
                None
            }
            Err(error) => {
                println!("SKIP: /dev/kvm: {error}");
                None
            }
        }
    }

    pub(crate) fn vm() -> Option<Arc<VmFd>> {
        Some(host()?.create_vm(1).unwrap())
    }

    #[test]
    fn more_vcpus_than_kvm_supports_are_refused_and_address_bits_are_in_range() {
        let Some(host) = host() else { return };
        assert!((32..=52).contains(&host.address_bits()));
        if host.kvm.get_max_vcpus() < 255 {
            assert!(matches!(host.create_vm(255), Err(VmError::TooManyVcpus { got: 255, .. })));
        }
    }

    #[test]
    fn the_hotplug_region_is_granted_in_steps_up_to_its_size() {
        let Some(vm) = vm() else { return };
        let layout = crate::layout::Layout::with_hotplug(64, 64 + 10_240, 40).unwrap();
        let (ram, range) = (memory::allocate(&layout).unwrap(), layout.hotplug.unwrap());
        map_ram(&vm, &ram).unwrap();
        let ram = memory::add_hotplug_region(&ram, &range).unwrap();
        let mut region = HotplugRegion::new(vm, ram, range);
        region.grant(0).unwrap();
        for mib in 1..=HOTPLUG_SLOTS as u64 {
            region.grant(mib << 20).unwrap();
            region.grant(1 << 20).unwrap();
        }
        assert_eq!(region.granted(), 10_240 << 20, "the last slot takes the rest");
        region.grant(10_240 << 20).unwrap();
        assert!(matches!(region.grant((10_240 << 20) + 1), Err(VmError::NotRam { .. })));
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Host::new(null.into()), Err(VmError::ApiVersion { got: -1 })));
    }
}
