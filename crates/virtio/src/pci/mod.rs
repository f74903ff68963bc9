//! Virtio over PCI (virtio 1.2, section 4.1), modern only.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use pci::{Doorbells, Vectors};
use vm_memory::GuestMemoryMmap;

use crate::device::{DeviceCounters, DeviceKind, VirtioDevice};
use crate::worker::WorkerHandle;

/// MSI-X vectors a device needs: one a queue, one for configuration changes.
pub fn vector_count(device: &dyn VirtioDevice) -> u16 {
    device.queue_sizes().len() as u16 + 1
}

/// What may be asked of a plugged device without its lock.
#[derive(Clone)]
pub struct DeviceView {
    kind: DeviceKind,
    status: Arc<AtomicU8>,
    counters: Arc<DeviceCounters>,
}

impl DeviceView {
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// The driver has set DRIVER_OK and the device has not failed.
    pub fn active(&self) -> bool {
        self.status.load(Ordering::Acquire) & 0x44 == 0x04
    }

    pub fn counters(&self) -> &DeviceCounters {
        &self.counters
    }
}

/// A virtio device in a PCI slot.
pub struct VirtioPci {
    view: DeviceView,
}

impl VirtioPci {
    pub fn new(
        device: Box<dyn VirtioDevice>,
        _mem: GuestMemoryMmap,
        _vectors: Arc<dyn Vectors>,
        _doorbells: Arc<dyn Doorbells>,
        _worker: WorkerHandle,
    ) -> io::Result<Self> {
        let view =
            DeviceView { kind: device.kind(), status: Arc::default(), counters: device.counters() };
        Ok(Self { view })
    }

    pub fn view(&self) -> DeviceView {
        self.view.clone()
    }
}
