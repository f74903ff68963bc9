//! The virtio PCI transport (virtio 1.2, section 4.1), non-transitional devices only: capabilities,
//! common configuration, notifications, MSI-X.
//!
//! ```text
//!   0 -> ACKNOWLEDGE -> DRIVER -> FEATURES_OK -> DRIVER_OK  engine runs on its worker
//!   ^                                              |
//!   +-- engine dropped <-- old status is read <-- driver writes status 0
//! ```
//! A reset never blocks the vCPU thread: the status reads 0 once the engine was dropped (section
//! 4.1.4.3.2: the driver polls for that). Register writes that the state does not allow are
//! ignored.

mod common;
mod interrupt;
mod queues;
mod spec;
mod state;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use pci::{
    BarRange, BarRequest, ConfigSpace, Doorbells, Identity, Msix, PciDevice, StateError, Vectors,
};
use vm_memory::GuestMemoryMmap;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use self::interrupt::{PciInterrupt, SharedState};
use self::queues::QueueSetup;
use self::spec::{CAP_MSIX, CAP_VENDOR, DEVICE_BASE, REVISION, SUBSYSTEM, VENDOR, layout, status};
use crate::device::{Activation, DeviceCounters, DeviceKind, VirtioDevice};
use crate::features;
use crate::granted::{AccessibleMemory, Granted};
use crate::queue::VirtQueue;
use crate::worker::{Attachment, Detached, WorkerHandle};

/// MSI-X vectors of a device: one for configuration changes, one per queue.
pub fn vector_count(device: &dyn VirtioDevice) -> u16 {
    device.queue_sizes().len() as u16 + 1
}

/// Status and counters of a plugged device, readable without its lock.
#[derive(Clone)]
pub struct DeviceView {
    kind: DeviceKind,
    shared: Arc<SharedState>,
    counters: Arc<DeviceCounters>,
}

impl DeviceView {
    pub fn kind(&self) -> DeviceKind {
        self.kind
    }

    /// The driver has set DRIVER_OK and the device does not need a reset.
    pub fn active(&self) -> bool {
        let bits = self.shared.status.load(Ordering::Acquire);
        bits & (status::DRIVER_OK | status::NEEDS_RESET) == status::DRIVER_OK
    }

    pub fn counters(&self) -> &DeviceCounters {
        &self.counters
    }
}

/// A virtio device in a PCI slot.
pub struct VirtioPci {
    // Set at creation.
    device: Box<dyn VirtioDevice>,
    mem: Arc<GuestMemoryMmap>,
    granted: Granted,
    doorbells: Arc<dyn Doorbells>,
    worker: WorkerHandle,
    kicks: Vec<EventFd>,
    msix_control: u16,
    pci_cfg: u16,
    shared: Arc<SharedState>,
    // Registers that the driver writes.
    config: ConfigSpace,
    queues: Vec<QueueSetup>,
    queue_select: u16,
    device_feature_select: u32,
    driver_feature_select: u32,
    driver_features: u64,
    // Runtime state.
    active: Option<Active>,
    resetting: Option<Detached>,
    /// Address of queue 0's doorbell while the doorbells are bound.
    doorbell_addr: Option<u64>,
}

/// Where the queues of an activation begin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Start {
    /// At index 0, as the driver expects after a reset.
    New,
    /// At the used ring's index: the device continues from a saved state.
    AtUsedIndex,
}

struct Active {
    attachment: Attachment,
    interrupt: Arc<PciInterrupt>,
}

impl VirtioPci {
    /// The transport of `device`, whose queues lie in `mem` and whose engines run on `worker`.
    /// `vectors` are [`vector_count`] vectors used by this device only. Fails if no eventfd can be
    /// created.
    pub fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestMemoryMmap,
        vectors: Arc<dyn Vectors>,
        doorbells: Arc<dyn Doorbells>,
        worker: WorkerHandle,
    ) -> io::Result<Self> {
        let sizes = device.queue_sizes();
        let kicks =
            sizes.iter().map(|_| EventFd::new(EFD_NONBLOCK)).collect::<io::Result<Vec<_>>>()?;
        let count = vector_count(&*device);
        let shared = Arc::new(SharedState::new(sizes.len(), Msix::new(count, vectors)));
        let queues = (0..).zip(sizes).map(|(index, max)| QueueSetup::new(index, *max)).collect();
        let (config, msix_control, pci_cfg) = config_space(&*device, count);
        Ok(Self {
            device,
            mem: Arc::new(mem),
            granted: Granted::all(),
            doorbells,
            worker,
            kicks,
            msix_control,
            pci_cfg,
            shared,
            config,
            queues,
            queue_select: 0,
            device_feature_select: 0,
            driver_feature_select: 0,
            driver_features: 0,
            active: None,
            resetting: None,
            doorbell_addr: None,
        })
    }

    /// Limits rings and buffers to granted memory; others are errors of the driver.
    pub fn with_granted(mut self, granted: Granted) -> Self {
        self.granted = granted;
        self
    }

    fn accessible_memory(&self) -> AccessibleMemory {
        AccessibleMemory::new(self.mem.clone(), self.granted.clone())
    }

    /// A handle for status and counters that outlives the device's move into the bus.
    pub fn view(&self) -> DeviceView {
        DeviceView {
            kind: self.device.kind(),
            shared: self.shared.clone(),
            counters: self.device.counters(),
        }
    }

    /// DRIVER_OK was set: creates the engine and starts it on the worker.
    fn activate(&mut self, start: Start) {
        let interrupt = Arc::new(PciInterrupt::new(self.shared.clone()));
        let event_idx = self.driver_features & features::RING_EVENT_IDX != 0;
        let counters = self.device.counters();
        let accessible = self.accessible_memory();
        let mut queues = Vec::with_capacity(self.queues.len());
        for (setup, kick) in self.queues.iter().zip(&self.kicks) {
            let queue = setup.build(&accessible, event_idx).map_err(io::Error::other);
            let built = queue.and_then(|queue| Ok((queue, kick.try_clone()?)));
            let (queue, kick) = match built {
                Ok(built) => built,
                Err(error) => return self.fail(&error),
            };
            let (mem, interrupt) = (self.mem.clone(), interrupt.clone());
            let queue = VirtQueue::new(setup.index, queue, kick, mem, interrupt, counters.clone());
            let mut queue = queue.with_granted(self.granted.clone());
            match start {
                Start::New => {}
                Start::AtUsedIndex => queue.resume_at_used_index(),
            }
            queues.push(queue);
        }
        let activation =
            Activation { queues, interrupt: interrupt.clone(), features: self.driver_features };
        let engine = match self.device.activate(activation) {
            Ok(engine) => engine,
            Err(error) => return self.fail(&error),
        };
        match self.worker.attach(engine, interrupt.clone()) {
            Ok(attachment) => self.active = Some(Active { attachment, interrupt }),
            Err(error) => return self.fail(&io::Error::other(error)),
        }
        self.update_doorbells();
    }

    fn fail(&mut self, error: &dyn std::error::Error) {
        let (device, counters) = (self.device.kind().name(), self.device.counters());
        crate::guest_warn!(counters.limit, device, %error, "device needs a reset");
        counters.error();
        self.shared.needs_reset();
    }

    /// Detaches the engine; [`Self::finish_reset`] completes the reset once it was dropped.
    fn begin_reset(&mut self) {
        if let Some(Active { attachment, interrupt }) = self.active.take() {
            interrupt.disable();
            self.resetting = Some(attachment.detach());
            self.update_doorbells();
        }
        self.finish_reset();
    }

    /// Completes a reset whose engine was dropped; without effect before that.
    fn finish_reset(&mut self) {
        if self.active.is_some() || self.resetting.as_ref().is_some_and(|d| !d.is_done()) {
            return;
        }
        self.resetting = None;
        self.shared.reset();
        for kick in &self.kicks {
            let _ = kick.read();
        }
        for queue in &mut self.queues {
            *queue = QueueSetup::new(queue.index, queue.max);
        }
        self.queue_select = 0;
        self.device_feature_select = 0;
        self.driver_feature_select = 0;
        self.driver_features = 0;
    }

    /// Binds the doorbells at the BAR's current address while an engine is attached, and unbinds
    /// them otherwise.
    fn update_doorbells(&mut self) {
        let bar = self.config.bars().first().map(|range| range.addr);
        let wanted = bar
            .filter(|_| self.active.is_some())
            .and_then(|addr| addr.checked_add(layout::NOTIFY))
            .filter(|addr| addr.checked_add(layout::PAGE).is_some());
        if wanted == self.doorbell_addr {
            return;
        }
        if let Some(addr) = std::mem::replace(&mut self.doorbell_addr, wanted) {
            self.each_doorbell(addr, |doorbells, addr, kick| doorbells.unbind(addr, kick));
        }
        if let Some(addr) = wanted {
            self.each_doorbell(addr, |doorbells, addr, kick| doorbells.bind(addr, kick));
        }
    }

    /// A doorbell that cannot be bound still works, as a KVM exit to [`Self::mmio_write`].
    fn each_doorbell(
        &self,
        base: u64,
        action: impl Fn(&dyn Doorbells, u64, &EventFd) -> io::Result<()>,
    ) {
        for (index, kick) in (0..).zip(&self.kicks) {
            let addr = base + index * u64::from(layout::NOTIFY_STRIDE);
            if let Err(error) = action(&*self.doorbells, addr, kick) {
                let (device, counters) = (self.device.kind().name(), self.device.counters());
                crate::guest_warn!(counters.limit, device, addr, %error, "cannot set a doorbell");
            }
        }
    }

    /// The range of the BAR that `struct virtio_pci_cfg_cap` selects: offset and length, bytes
    /// (section 4.1.4.9).
    fn cfg_window(&self) -> Option<(u64, usize)> {
        let mut cap = [0; 16];
        self.config.read(self.pci_cfg, &mut cap);
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|n| cap[at + n]));
        let (bar, offset, len) = (cap[4], u64::from(word(8)), word(12) as usize);
        let good =
            bar == layout::BAR && matches!(len, 1 | 2 | 4) && offset + len as u64 <= layout::SIZE;
        good.then_some((offset, len))
    }

    /// Whether a configuration access begins at `pci_cfg_data`.
    fn is_cfg_data(&self, offset: u16) -> bool {
        offset == self.pci_cfg + 16
    }
}

impl PciDevice for VirtioPci {
    fn bar_requests(&self) -> Vec<BarRequest> {
        self.config.bar_requests().to_vec()
    }

    fn assign_bar(&mut self, bar: u8, addr: u64) {
        self.config.assign_bar(bar, addr);
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        if self.is_cfg_data(offset)
            && let Some((at, len)) = self.cfg_window()
        {
            let mut value = [0; 4];
            self.mmio_read(layout::BAR, at, &mut value[..len]);
            self.config.write(offset, &value);
        }
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
        if self.is_cfg_data(offset)
            && let Some((at, len)) = self.cfg_window()
        {
            let mut value = [0; 4];
            self.config.read(offset, &mut value);
            self.mmio_write(layout::BAR, at, &value[..len]);
        }
        let end = usize::from(offset) + data.len();
        let control = usize::from(self.msix_control) + 1;
        if (usize::from(offset)..end).contains(&control) {
            let mut high = [0];
            self.config.read(control as u16, &mut high);
            self.shared.msix.set_control(high[0]);
        }
        self.update_doorbells();
    }

    fn bars(&self) -> Vec<BarRange> {
        self.config.bars()
    }

    fn mmio_read(&mut self, bar: u8, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if bar != layout::BAR {
            return;
        }
        let at = offset % layout::PAGE;
        match offset - at {
            layout::COMMON => self.common_read(at, data),
            layout::ISR if at == 0 => data[0] = self.shared.isr.swap(0, Ordering::AcqRel),
            layout::DEVICE => self.device.read_config(at as usize, data),
            layout::MSIX_TABLE => self.shared.msix.read_table(at, data),
            layout::MSIX_PENDING => self.shared.msix.read_pending(at, data),
            _ => {}
        }
    }

    fn mmio_write(&mut self, bar: u8, offset: u64, data: &[u8]) {
        if bar != layout::BAR {
            return;
        }
        let at = offset % layout::PAGE;
        match offset - at {
            layout::COMMON => self.common_write(at, data),
            layout::NOTIFY => {
                let index = (at / u64::from(layout::NOTIFY_STRIDE)) as usize;
                if let (Some(kick), true) = (self.kicks.get(index), self.active.is_some()) {
                    let _ = kick.write(1);
                }
            }
            layout::MSIX_TABLE => self.shared.msix.write_table(at, data),
            // No device here has a writable configuration field.
            _ => {}
        }
    }

    fn save(&mut self) -> Result<serde_json::Value, StateError> {
        self.save_state()
    }

    fn load(&mut self, state: serde_json::Value) -> Result<(), StateError> {
        self.load_state(state)
    }
}

impl Drop for VirtioPci {
    /// Unplugged: the worker drops the engine and its files once it has drained.
    fn drop(&mut self) {
        if let Some(Active { attachment, interrupt }) = self.active.take() {
            interrupt.disable();
            attachment.detach();
        }
        self.update_doorbells();
    }
}

/// The configuration space, with the offsets of MSI-X message control and of the PCI configuration
/// access capability.
fn config_space(device: &dyn VirtioDevice, vectors: u16) -> (ConfigSpace, u16, u16) {
    let kind = device.kind();
    let mut config = ConfigSpace::new(Identity {
        vendor: VENDOR,
        device: DEVICE_BASE + kind as u16,
        subsystem_vendor: VENDOR,
        subsystem: SUBSYSTEM,
        revision: REVISION,
        class: kind.class(),
    });
    config.add_bar(layout::BAR, layout::SIZE);

    // PCI 3.0, section 6.8.2: message control, table and pending bits, all in BAR 0.
    let mut msix = [0; 10];
    msix[..2].copy_from_slice(&(vectors - 1).to_le_bytes());
    msix[2..6].copy_from_slice(&(layout::MSIX_TABLE as u32).to_le_bytes());
    msix[6..].copy_from_slice(&(layout::MSIX_PENDING as u32).to_le_bytes());
    let mut writable = [0; 10];
    writable[1] = 0xc0; // enable, function mask
    let msix = config.add_capability(CAP_MSIX, &msix, &writable);

    let stride = layout::NOTIFY_STRIDE.to_le_bytes();
    for (kind, offset, len, extra) in [
        (spec::CFG_COMMON, layout::COMMON, spec::common::SIZE, &[][..]),
        (spec::CFG_ISR, layout::ISR, 1, &[]),
        (spec::CFG_DEVICE, layout::DEVICE, layout::PAGE, &[]),
        (spec::CFG_NOTIFY, layout::NOTIFY, layout::PAGE, &stride),
    ] {
        let body = capability(kind, offset as u32, len as u32, extra);
        config.add_capability(CAP_VENDOR, &body, &vec![0; body.len()]);
    }
    // The driver writes bar, offset, length and data of the access window.
    let body = capability(spec::CFG_PCI, 0, 0, &[0; 4]);
    let mut writable = vec![0; body.len()];
    writable[2] = 0xff;
    writable[6..].fill(0xff);
    let pci_cfg = config.add_capability(CAP_VENDOR, &body, &writable);
    (config, msix as u16 + 2, pci_cfg as u16)
}

/// `struct virtio_pci_cap` after its first two bytes: capability length, type, BAR, id, padding,
/// offset, length, type-specific data.
fn capability(kind: u8, offset: u32, len: u32, extra: &[u8]) -> Vec<u8> {
    let mut body = vec![(16 + extra.len()) as u8, kind, layout::BAR, 0, 0, 0];
    body.extend(offset.to_le_bytes());
    body.extend(len.to_le_bytes());
    body.extend(extra);
    body
}
