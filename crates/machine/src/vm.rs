//! The VM and what KVM has to offer for it.
//!
//! Interrupt controllers: local APICs in the kernel (`KVM_CAP_SPLIT_IRQCHIP`), and nothing else: no
//! PIC, no PIT, no I/O APIC anywhere. Every device here interrupts with MSI-X and the guest's timer
//! is its APIC's TSC deadline, so a full in-kernel irqchip would only add attack surface and exits:
//! Linux programs each I/O APIC pin it finds in the MADT one by one (several hundred of the exits
//! of a boot), and finds none here. Reduced-hardware ACPI tells it not to look for PIC and PIT.
#![allow(unsafe_code)] // KVM_SET_USER_MEMORY_REGION takes a raw host address

use std::ops::Range;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_API_VERSION, KVM_CAP_PMU_CAPABILITY, KVM_CAP_SPLIT_IRQCHIP, KVM_MAX_CPUID_ENTRIES,
    KVM_PMU_CAP_DISABLE, kvm_enable_cap, kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use vm_memory::{Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{KVM_IDENTITY_MAP, KVM_TSS};
use crate::memory::{self, MemoryError};
use crate::{KvmError, Ram};

/// What must be there, and what its absence means in practice.
const NEEDED: &[(Cap, &str)] = &[
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
    #[error("/dev/kvm speaks API version {got}, not {KVM_API_VERSION}; it is not Linux' KVM")]
    ApiVersion { got: i32 },
    #[error("/dev/kvm lacks {name}; a host kernel of 5.10 or later is needed")]
    Missing { name: &'static str },
    #[error("{got} vCPUs are more than the {limit} this KVM can run")]
    TooManyVcpus { got: u8, limit: usize },
    #[error("{part:#x?} is no memory of the VM")]
    NotRam { part: Range<u64> },
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// `/dev/kvm`, checked.
#[derive(Debug)]
pub struct Host {
    kvm: Kvm,
    cpuid: CpuId,
}

impl Host {
    /// Takes over an open `/dev/kvm` and checks that it has what is needed.
    pub fn new(device: OwnedFd) -> Result<Self, VmError> {
        // SAFETY: `device` gives up its descriptor here, so `Kvm` is its only owner; that it is
        // /dev/kvm is verified by the ioctl that follows.
        let kvm = unsafe { Kvm::from_raw_fd(device.into_raw_fd()) };
        let got = kvm.get_api_version();
        if got != KVM_API_VERSION as i32 {
            return Err(VmError::ApiVersion { got });
        }
        for (cap, name) in NEEDED {
            if !kvm.check_extension(*cap) {
                return Err(VmError::Missing { name });
            }
        }
        let cpuid = kvm
            .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
            .map_err(KvmError::of("KVM_GET_SUPPORTED_CPUID", "load kvm_intel or kvm_amd anew"))?;
        Ok(Self { kvm, cpuid })
    }

    /// What KVM can show to a guest.
    pub fn cpuid(&self) -> &CpuId {
        &self.cpuid
    }

    /// Guest-physical address bits (CPUID 0x8000_0008 EAX).
    pub fn address_bits(&self) -> u8 {
        let leaf = self.cpuid.as_slice().iter().find(|e| e.function == 0x8000_0008);
        leaf.map_or(36, |e| {
            // Bits 23:16, where given, are the guest's share of an encrypting host's address space.
            let guest = (e.eax >> 16) as u8;
            if guest != 0 { guest } else { e.eax as u8 }
        })
    }

    /// Creates a VM with in-kernel local APICs.
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
        if self.can_do_without_pmu() {
            let mut pmu = kvm_enable_cap { cap: KVM_CAP_PMU_CAPABILITY, ..Default::default() };
            pmu.args[0] = KVM_PMU_CAP_DISABLE.into();
            vm.enable_cap(&pmu).map_err(KvmError::of("KVM_ENABLE_CAP(PMU_CAPABILITY)", report))?;
        }
        Ok(Arc::new(vm))
    }

    /// Whether KVM can leave performance counters out, since Linux 5.18. CPUID has none of them (see
    /// [`crate::cpuid`]), but AMD's four oldest counters are not in CPUID: Linux uses them wherever they
    /// answer.
    pub(crate) fn can_do_without_pmu(&self) -> bool {
        let can = self.kvm.check_extension_raw(KVM_CAP_PMU_CAPABILITY.into());
        can > 0 && can as u32 & KVM_PMU_CAP_DISABLE != 0
    }
}

/// Shows all of `ram` to the guest, each region in a slot of its own.
///
/// `ram` must be kept until `vm` and all its vCPUs are gone: whoever assembles the VM holds both.
pub fn map_ram(vm: &VmFd, ram: &Ram) -> Result<(), VmError> {
    for (slot, region) in ram.iter().enumerate() {
        let start = region.start_addr();
        show(vm, ram, slot as u32, start.raw_value()..start.raw_value() + region.len())?;
    }
    Ok(())
}

/// Shows a part of a region of `ram` to the guest.
fn show(vm: &VmFd, ram: &Ram, slot: u32, part: Range<u64>) -> Result<(), VmError> {
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
    // keeps as long as the VM; guest and VMM share it by design, and the VMM reaches it only through
    // vm-memory's volatile accesses.
    unsafe { vm.set_user_memory_region(slot) }
        .map_err(KvmError::of("KVM_SET_USER_MEMORY_REGION", "give the VM less memory"))?;
    Ok(())
}

/// Slots for what a VM grows by; the last one takes all that is left. Linux before 5.11 has 509.
const GROWTH_SLOTS: u32 = 64;

/// Room to grow, of which vCPUs and devices see what was granted and no more: what lies beyond costs
/// KVM nothing (before Linux 5.15 it keeps some 2.5 MiB of tables a GiB of slot), and a guest cannot
/// have it by merely touching it, nor by pointing a device at it.
#[derive(Debug)]
pub struct Room {
    vm: Arc<VmFd>,
    ram: Ram,
    room: Range<u64>,
    granted: u64,
    slots: Range<u32>,
}

impl Room {
    /// `ram` holds `room` as its last region; the others are shown to the guest already.
    pub fn new(vm: Arc<VmFd>, ram: Ram, room: Range<u64>) -> Self {
        let first = ram.num_regions() as u32 - 1;
        Self { vm, ram, room, granted: 0, slots: first..first + GROWTH_SLOTS }
    }

    /// Bytes that the guest sees.
    pub fn granted(&self) -> u64 {
        self.granted
    }

    /// Shows at least the first `bytes` of the room to the guest. It is not taken away again: the
    /// guest would have to have left it for certain.
    pub fn grant(&mut self, bytes: u64) -> Result<(), VmError> {
        let size = self.room.end - self.room.start;
        if bytes <= self.granted {
            return Ok(());
        }
        if bytes > size {
            return Err(VmError::NotRam { part: self.room.start..self.room.start + bytes });
        }
        let last = self.slots.len() == 1;
        let bytes = if last { size } else { bytes };
        let part = self.room.start + self.granted..self.room.start + bytes;
        memory::open(&self.ram, &part)?;
        show(&self.vm, &self.ram, self.slots.start, part)?;
        self.slots.start += 1;
        self.granted = bytes;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// The host's KVM; tests that need it are skipped, loudly, where it is missing.
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
    fn more_vcpus_than_kvm_has_are_refused_and_address_bits_are_sane() {
        let Some(host) = host() else { return };
        assert!((32..=52).contains(&host.address_bits()));
        if host.kvm.get_max_vcpus() < 255 {
            assert!(matches!(host.create_vm(255), Err(VmError::TooManyVcpus { got: 255, .. })));
        }
    }

    #[test]
    fn room_is_granted_piece_by_piece_and_never_more_than_there_is() {
        let Some(vm) = vm() else { return };
        let layout = crate::layout::Layout::with_room(64, 64 + 10_240, 40).unwrap();
        let (ram, range) = (memory::allocate(&layout).unwrap(), layout.room.unwrap());
        map_ram(&vm, &ram).unwrap();
        let ram = memory::add_room(&ram, &range).unwrap();
        let mut room = Room::new(vm, ram, range);
        room.grant(0).unwrap();
        for mib in 1..=GROWTH_SLOTS as u64 {
            room.grant(mib << 20).unwrap();
            room.grant(1 << 20).unwrap();
        }
        assert_eq!(room.granted(), 10_240 << 20, "the last slot takes the rest");
        room.grant(10_240 << 20).unwrap();
        assert!(matches!(room.grant((10_240 << 20) + 1), Err(VmError::NotRam { .. })));
    }

    #[test]
    fn a_device_that_is_not_kvm_is_refused() {
        let null = std::fs::File::open("/dev/null").unwrap();
        assert!(matches!(Host::new(null.into()), Err(VmError::ApiVersion { got: -1 })));
    }
}
