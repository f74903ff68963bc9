//! Everything that can fail while a VM is assembled.

use machine::acpi::AcpiError;
use machine::boot::BootError;
use machine::cpuid::CpuidError;
use machine::kernel::KernelError;
use machine::layout::LayoutError;
use machine::memory::MemoryError;
use machine::vcpu::VcpuError;
use machine::vm::VmError;

use crate::config::ConfigError;
use crate::control::ControlError;
use crate::jail::JailError;
use crate::seccomp::FilterError;
use crate::snapshot::SnapshotError;
use crate::vcpus::VcpuThreadError;

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
    #[error("cannot add device {id:?}")]
    Device { id: String, source: vmm_api::Error },
    #[error(transparent)]
    VcpuThreads(#[from] VcpuThreadError),
    #[error("cannot continue the saved VM")]
    Restore(#[from] SnapshotError),
    #[error(transparent)]
    Control(#[from] ControlError),
    #[error("{what}")]
    Os { what: &'static str, source: std::io::Error },
}

/// Maps an OS error to [`AssembleError::Os`]; `what` is the failed operation.
pub(super) fn os<E: Into<std::io::Error>>(what: &'static str) -> impl FnOnce(E) -> AssembleError {
    move |source| AssembleError::Os { what, source: source.into() }
}
