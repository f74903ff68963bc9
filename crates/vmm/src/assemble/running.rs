//! The running VM: carries out requests of the control socket.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use kvm_ioctls::VmFd;
use machine::Ram;
use machine::layout::Layout;
use vmm_api::{Counters, Phase, Reply, Request, VERSION, VmStatus};

use crate::config::{self, ConfigError};
use crate::control::Vm;
use crate::devices::Devices;
use crate::memory::Memory;
use crate::snapshot::{self, SnapshotError};
use crate::vcpus::{VcpuThreadError, VcpuThreads};

/// A running VM.
pub(super) struct RunningVm {
    pub(super) config: vmm_api::VmConfig,
    pub(super) memory: Memory,
    pub(super) devices: Devices,
    pub(super) vcpu_threads: VcpuThreads,
    pub(super) paused: AtomicBool,
    pub(super) vm: Arc<VmFd>,
    pub(super) bus: Arc<pci::Bus>,
    pub(super) ram: Ram,
    pub(super) layout: Layout,
    /// See [`machine::cpuid::processor`].
    pub(super) processor: String,
    /// Microseconds from `main` to the start of the vCPUs.
    pub(super) start_us: u64,
}

impl RunningVm {
    fn add(&self, request: Request, fd: OwnedFd) -> Result<String, vmm_api::Error> {
        let refused =
            |error: ConfigError| vmm_api::Error::Malformed { message: crate::chain(&error) };
        match request {
            Request::AddDisk { disk } => {
                self.devices.add_disk(config::hot_disk(&disk, fd).map_err(refused)?)
            }
            Request::AddNet { net } => {
                self.devices.add_net(config::hot_net(&net, fd).map_err(refused)?)
            }
            Request::AddFs { id, tag } => {
                self.devices.add_fs(config::hot_fs(&id, &tag, fd).map_err(refused)?)
            }
            other => {
                Err(vmm_api::Error::Failed { message: format!("{other:?} has no file descriptor") })
            }
        }
    }

    fn pause(&self) -> Result<(), vmm_api::Error> {
        let failed =
            |error: VcpuThreadError| vmm_api::Error::Failed { message: crate::chain(&error) };
        if self.paused.load(Ordering::Acquire) {
            return Ok(());
        }
        self.vcpu_threads.pause().map_err(failed)?;
        if let Err(error) = self.devices.pause() {
            self.vcpu_threads.resume();
            return Err(error);
        }
        self.paused.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes the state to `file`; returns the file with the memory.
    fn snapshot(&self, file: OwnedFd) -> Result<OwnedFd, vmm_api::Error> {
        let failed = |error: &dyn std::error::Error| vmm_api::Error::Failed {
            message: format!("cannot save the VM: {}", crate::chain(error)),
        };
        let file = config::hot_state(file).map_err(|e| failed(&e))?;
        let saved = || {
            if !self.paused.load(Ordering::Acquire) {
                return Err(SnapshotError::NotPaused);
            }
            let vcpus = self.vcpu_threads.save()?;
            let parts = snapshot::Parts {
                config: &self.config,
                processor: &self.processor,
                vm: &self.vm,
                ram: &self.ram,
                layout: &self.layout,
                bus: &self.bus,
                devices: &self.devices.list(),
            };
            parts.save(vcpus, &file)
        };
        saved().map(OwnedFd::from).map_err(|e| failed(&e))
    }

    fn resume(&self) -> Result<(), vmm_api::Error> {
        if self.paused.load(Ordering::Acquire) {
            self.devices.resume()?;
            self.vcpu_threads.resume();
            self.paused.store(false, Ordering::Release);
        }
        Ok(())
    }
}

impl Vm for RunningVm {
    fn status(&self) -> VmStatus {
        let paused = self.paused.load(Ordering::Acquire);
        VmStatus {
            version: VERSION,
            phase: if paused { Phase::Paused } else { Phase::Running },
            pid: std::process::id(),
            vcpus: self.config.vcpus,
            memory_mib: self.memory.requested_mib(),
            plugged_mib: self.memory.plugged_mib(),
            max_memory_mib: self.memory.max_mib(),
            devices: self.devices.list(),
        }
    }

    fn counters(&self) -> Counters {
        let (exits, start_us) = (self.vcpu_threads.exits(), self.start_us);
        Counters { exits, start_us, devices: self.devices.counters() }
    }

    fn perform(&self, request: Request, mut fds: Vec<OwnedFd>) -> (Reply, Vec<OwnedFd>) {
        let done = |result: Result<(), vmm_api::Error>| match result {
            Ok(()) => Reply::Done,
            Err(error) => Reply::Error(error),
        };
        let reply = match (request, fds.pop()) {
            (Request::Pause, _) => done(self.pause()),
            (Request::Resume, _) => done(self.resume()),
            (Request::ResizeMemory { memory_mib }, _) => done(self.memory.resize(memory_mib)),
            (Request::RemoveDevice { id }, _) => done(self.devices.remove(&id)),
            (Request::Snapshot, Some(file)) => match self.snapshot(file) {
                Ok(memory) => return (Reply::Saved, vec![memory]),
                Err(error) => Reply::Error(error),
            },
            (request, Some(fd)) => match self.add(request, fd) {
                Ok(pci) => Reply::Added { pci },
                Err(error) => Reply::Error(error),
            },
            (request, None) => {
                let message = format!("{request:?} needs a file descriptor");
                Reply::Error(vmm_api::Error::Failed { message })
            }
        };
        (reply, Vec::new())
    }
}
