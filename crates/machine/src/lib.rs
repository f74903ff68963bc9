//! A virtual machine on KVM without devices: memory, vCPUs, boot protocol, ACPI tables, interrupts.
//!
//! Does not depend on virtio, PCI devices, the control socket or pods. Port and memory-mapped
//! accesses of the guest go to [`vcpu::Bus`]; interrupts come from [`interrupts::InterruptRoute`].
//!
//! - [`layout`]: the guest-physical memory layout.
//! - [`memory`]: guest RAM from a memfd.
//! - [`vm`]: required KVM capabilities, VM creation, memory slots.
//! - [`boot`], [`kernel`], [`acpi`]: kernel, boot data and ACPI tables in guest memory.
//! - [`cpuid`], [`vcpu`]: vCPUs.
//! - [`interrupts`]: MSI routes, irqfds, ioeventfds.
//! - [`probe`]: measures KVM's speed on this host by running guest code.

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod interrupts;
pub mod kernel;
pub mod layout;
pub mod memory;
pub mod probe;
pub mod vcpu;
pub mod vm;

/// Guest memory without a dirty bitmap.
pub type Ram = vm_memory::GuestMemoryMmap<()>;

/// A KVM call that failed.
#[derive(Debug, thiserror::Error)]
#[error("/dev/kvm: {call} failed; {advice}")]
pub struct KvmError {
    pub call: &'static str,
    /// What the operator can do.
    pub advice: &'static str,
    #[source]
    pub source: kvm_ioctls::Error,
}

impl KvmError {
    pub(crate) fn of(
        call: &'static str,
        advice: &'static str,
    ) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |source| Self { call, advice, source }
    }
}
