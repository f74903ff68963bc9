//! The bare virtual machine on KVM: memory, vCPUs, boot protocol, ACPI tables, interrupts.
//!
//! Has never heard of virtio, PCI devices, control sockets or pods. Port and memory-mapped accesses
//! leave through [`vcpu::Bus`]; interrupts enter through [`interrupts::Line`].
//!
//! - [`layout`]: where everything stands in guest-physical memory.
//! - [`memory`]: guest RAM from a memfd.
//! - [`vm`]: the VM itself; what KVM must offer.
//! - [`boot`], [`kernel`], [`acpi`]: what the guest finds when it starts.
//! - [`cpuid`], [`vcpu`]: processors.
//! - [`interrupts`]: MSI routes, irqfds, ioeventfds.
//! - [`probe`]: what KVM on this host is worth, measured by running guest code.

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

/// Guest RAM as the rest of the VMM sees it.
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
