//! Saving a paused VM, and starting a VM from what was saved.
//!
//! ```text
//!   state    JSON: what the VM must be configured like, processors, clock, devices
//!   memory   the boot memory; the client copies it ([`vmm_api::snapshot`])
//! ```
//! Order of loading: memory; vCPUs, whose TSCs must be set before the clock; devices last, because
//! they raise interrupts, which a local APIC that is loaded later would lose.
//!
//! The state is read from a file, so it is checked like other input: what does not match the
//! configuration of the new VM is refused.

use std::fs::File;
use std::io::{self, BufWriter, Seek, Write};
use std::os::unix::fs::FileExt;

use kvm_ioctls::VmFd;
use machine::Ram;
use machine::layout::Layout;
use machine::vcpu::{Vcpu, VcpuError, VcpuState};
use machine::{memory, vm};
use serde::{Deserialize, Serialize};
use vmm_api::{DeviceStatus, VmConfig};

use crate::vcpus::VcpuThreadError;

/// Format of the state; changes with every change of a type in it.
const FORMAT: u32 = 1;
/// Longest state, bytes: that of 64 vCPUs is about 3 MiB.
const STATE_MAX: u64 = 16 << 20;

#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    #[error("the VM is not paused")]
    NotPaused,
    #[error("the VM has a serial port, which cannot be saved")]
    Serial,
    #[error(transparent)]
    VcpuThreads(#[from] VcpuThreadError),
    #[error(transparent)]
    Vcpu(#[from] VcpuError),
    #[error(transparent)]
    Vm(#[from] vm::VmError),
    #[error(transparent)]
    Memory(#[from] memory::MemoryError),
    #[error("the devices of the VM")]
    Devices(#[from] pci::BusError),
    #[error("cannot write the state of the VM")]
    Write(#[source] io::Error),
    #[error("cannot read the state of the VM")]
    Read(#[source] io::Error),
    #[error("the state of the VM is longer than {STATE_MAX} bytes")]
    TooLong,
    #[error("the state of the VM is not valid")]
    Json(#[from] serde_json::Error),
    #[error("the state of the VM has format {got}, this VMM has {FORMAT}; boot the VM instead")]
    Format { got: u32 },
    #[error("the saved VM has {what} {saved}, the configuration {configured}")]
    Mismatch { what: &'static str, saved: String, configured: String },
    #[error("the state of the VM has {got} vCPUs with a TSC, not {want}")]
    Vcpus { got: usize, want: usize },
}

/// What a VM must be configured like to continue from a state.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Shape {
    vcpus: u8,
    max_vcpus: u8,
    memory_mib: u32,
    max_memory_mib: u32,
    free_page_reporting: bool,
    cmdline: String,
    /// Vendor and signature of the processor.
    processor: String,
    /// Id, kind and PCI address, in the order in which they were plugged.
    devices: Vec<String>,
}

impl Shape {
    fn new(config: &VmConfig, processor: String, devices: &[DeviceStatus]) -> Self {
        let device = |d: &DeviceStatus| format!("{} {} {}", d.id, d.kind, d.pci);
        Self {
            vcpus: config.vcpus,
            max_vcpus: config.max_vcpus,
            memory_mib: config.memory_mib,
            max_memory_mib: config.max_memory_mib,
            free_page_reporting: config.free_page_reporting,
            cmdline: config.cmdline.trim().to_owned(),
            processor,
            devices: devices.iter().map(device).collect(),
        }
    }

    /// Fails with the first difference.
    fn check(&self, configured: &Self) -> Result<(), SnapshotError> {
        fn same<T: PartialEq + std::fmt::Debug>(
            what: &'static str,
            saved: &T,
            configured: &T,
        ) -> Result<(), SnapshotError> {
            if saved == configured {
                return Ok(());
            }
            let (saved, configured) = (format!("{saved:?}"), format!("{configured:?}"));
            Err(SnapshotError::Mismatch { what, saved, configured })
        }
        let Self {
            vcpus,
            max_vcpus,
            memory_mib,
            max_memory_mib,
            free_page_reporting,
            cmdline,
            processor,
            devices,
        } = self;
        same("vcpus", vcpus, &configured.vcpus)?;
        same("max_vcpus", max_vcpus, &configured.max_vcpus)?;
        same("memory_mib", memory_mib, &configured.memory_mib)?;
        same("max_memory_mib", max_memory_mib, &configured.max_memory_mib)?;
        same("free_page_reporting", free_page_reporting, &configured.free_page_reporting)?;
        same("cmdline", cmdline, &configured.cmdline)?;
        same("processor", processor, &configured.processor)?;
        same("devices", devices, &configured.devices)
    }
}

/// The state of a VM without its memory.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VmState {
    format: u32,
    shape: Shape,
    /// The paravirtual clock, ns.
    clock: u64,
    vcpus: Vec<VcpuState>,
    devices: pci::BusState,
}

/// The parts of a VM that are saved, or loaded into.
pub struct Parts<'a> {
    pub config: &'a VmConfig,
    /// See [`machine::cpuid::processor`].
    pub processor: &'a str,
    pub vm: &'a VmFd,
    pub ram: &'a Ram,
    pub layout: &'a Layout,
    pub bus: &'a pci::Bus,
    /// Status of the devices.
    pub devices: &'a [DeviceStatus],
}

impl Parts<'_> {
    fn shape(&self) -> Shape {
        Shape::new(self.config, self.processor.to_owned(), self.devices)
    }

    /// Writes a paused VM, whose vCPUs have this state, to `state`. Returns the file with its
    /// memory.
    pub fn save(&self, vcpus: Vec<VcpuState>, state: &File) -> Result<File, SnapshotError> {
        if self.config.serial_console {
            return Err(SnapshotError::Serial);
        }
        let shape = self.shape();
        let (clock, devices) = (vm::clock(self.vm)?, self.bus.save()?);
        let saved = VmState { format: FORMAT, shape, clock, vcpus, devices };
        state.set_len(0).map_err(SnapshotError::Write)?;
        let mut writer = BufWriter::new(state);
        writer.rewind().map_err(SnapshotError::Write)?;
        serde_json::to_writer(&mut writer, &saved)?;
        writer.flush().map_err(SnapshotError::Write)?;
        let memory = memory::file(self.ram, self.layout)?;
        memory.try_clone().map_err(SnapshotError::Write)
    }

    /// Loads a state into a VM that was assembled from a configuration like that of the saved one.
    /// Its memory was loaded before ([`machine::memory::load`]).
    pub fn load(&self, state: VmState, vcpus: &[Vcpu]) -> Result<(), SnapshotError> {
        let VmState { format: _, shape, clock, vcpus: saved, devices } = state;
        shape.check(&self.shape())?;
        let tscs: Vec<u64> = saved.iter().filter_map(VcpuState::tsc).collect();
        let (Some(tsc), true) = (tscs.iter().max(), tscs.len() == vcpus.len()) else {
            return Err(SnapshotError::Vcpus { got: tscs.len(), want: vcpus.len() });
        };
        for vcpu in vcpus {
            vcpu.move_tsc_away(*tsc)?;
        }
        for (vcpu, saved) in vcpus.iter().zip(&saved) {
            vcpu.load(saved, *tsc)?;
        }
        vm::set_clock(self.vm, clock)?;
        Ok(self.bus.load(devices)?)
    }
}

/// Reads a state that [`Parts::save`] has written.
pub fn read(file: &File) -> Result<VmState, SnapshotError> {
    /// Read first: other formats have other fields.
    #[derive(Deserialize)]
    struct Header {
        format: u32,
    }
    let len = file.metadata().map_err(SnapshotError::Read)?.len();
    if len > STATE_MAX {
        return Err(SnapshotError::TooLong);
    }
    let mut text = vec![0; len as usize];
    // Other VMMs may read through the same open file description, so its position is not used.
    file.read_exact_at(&mut text, 0).map_err(SnapshotError::Read)?;
    match serde_json::from_slice::<VmState>(&text) {
        Ok(state) if state.format == FORMAT => Ok(state),
        Ok(state) => Err(SnapshotError::Format { got: state.format }),
        Err(error) => match serde_json::from_slice(&text) {
            Ok(Header { format }) if format != FORMAT => Err(SnapshotError::Format { got: format }),
            _ => Err(error.into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read_text(text: &str) -> SnapshotError {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        read(&file).unwrap_err()
    }

    #[test]
    fn a_state_of_another_format_and_a_damaged_one_are_refused() {
        assert!(matches!(read_text(r#"{"format":7,"new":1}"#), SnapshotError::Format { got: 7 }));
        for text in ["", "{", r#"{"format":1}"#, r#"{"format":1,"new":1}"#, "[1, 2]"] {
            assert!(matches!(read_text(text), SnapshotError::Json(_)), "{text}");
        }
        let file = tempfile::tempfile().unwrap();
        file.set_len(STATE_MAX + 1).unwrap();
        assert!(matches!(read(&file), Err(SnapshotError::TooLong)));
    }

    #[test]
    fn every_difference_of_the_shape_is_named() {
        let shape = || Shape {
            vcpus: 1,
            max_vcpus: 2,
            memory_mib: 64,
            max_memory_mib: 128,
            free_page_reporting: true,
            cmdline: "quiet".to_owned(),
            processor: "AuthenticAMD".to_owned(),
            devices: vec!["rng rng 0000:00:01.0".to_owned()],
        };
        shape().check(&shape()).unwrap();
        let others = [
            ("vcpus", Shape { vcpus: 2, ..shape() }),
            ("max_vcpus", Shape { max_vcpus: 3, ..shape() }),
            ("memory_mib", Shape { memory_mib: 65, ..shape() }),
            ("max_memory_mib", Shape { max_memory_mib: 129, ..shape() }),
            ("free_page_reporting", Shape { free_page_reporting: false, ..shape() }),
            ("cmdline", Shape { cmdline: String::new(), ..shape() }),
            ("processor", Shape { processor: "GenuineIntel".to_owned(), ..shape() }),
            ("devices", Shape { devices: Vec::new(), ..shape() }),
        ];
        for (name, other) in others {
            let found = shape().check(&other).unwrap_err();
            assert!(
                matches!(found, SnapshotError::Mismatch { what, .. } if what == name),
                "{found}"
            );
        }
    }
}
