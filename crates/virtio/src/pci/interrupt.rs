//! Device status and interrupts: written by vCPU threads, read and raised by worker threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU16, Ordering};

use pci::Msix;
use vmm_sys_util::eventfd::EventFd;

use super::spec::{ISR_CONFIG, ISR_QUEUE, NO_VECTOR, status};
use crate::device::Interrupt;

/// State shared between the transport and the interrupts of its engines.
pub(super) struct SharedState {
    pub(super) status: AtomicU8,
    pub(super) isr: AtomicU8,
    pub(super) config_vector: AtomicU16,
    pub(super) queue_vectors: Vec<AtomicU16>,
    pub(super) msix: Msix,
}

impl SharedState {
    pub(super) fn new(queues: usize, msix: Msix) -> Self {
        let none = || AtomicU16::new(NO_VECTOR);
        Self {
            status: AtomicU8::new(0),
            isr: AtomicU8::new(0),
            config_vector: none(),
            queue_vectors: std::iter::repeat_with(none).take(queues).collect(),
            msix,
        }
    }

    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::Release);
        self.isr.store(0, Ordering::Release);
        self.config_vector.store(NO_VECTOR, Ordering::Release);
        for vector in &self.queue_vectors {
            vector.store(NO_VECTOR, Ordering::Release);
        }
    }

    fn raise(&self, vector: &AtomicU16, isr: u8) {
        // INTx does not exist here, but a driver without MSI-X may poll the ISR status (section
        // 4.1.4.5).
        if !self.msix.enabled() {
            self.isr.fetch_or(isr, Ordering::AcqRel);
            return;
        }
        let vector = vector.load(Ordering::Acquire);
        if vector != NO_VECTOR {
            self.msix.trigger(vector);
        }
    }

    pub(super) fn needs_reset(&self) {
        self.status.fetch_or(status::NEEDS_RESET, Ordering::AcqRel);
        self.raise(&self.config_vector, ISR_CONFIG);
    }
}

/// The interrupts of one activation. Disabled when the driver resets the device: the engine of that
/// activation may still be draining.
pub(super) struct PciInterrupt {
    shared: Arc<SharedState>,
    enabled: AtomicBool,
}

impl PciInterrupt {
    pub(super) fn new(shared: Arc<SharedState>) -> Self {
        Self { shared, enabled: AtomicBool::new(true) }
    }

    pub(super) fn disable(&self) {
        self.enabled.store(false, Ordering::Release);
    }

    fn enabled(&self) -> bool {
        self.enabled.load(Ordering::Acquire)
    }
}

impl Interrupt for PciInterrupt {
    fn queue(&self, index: u16) {
        if self.enabled()
            && let Some(vector) = self.shared.queue_vectors.get(usize::from(index))
        {
            self.shared.raise(vector, ISR_QUEUE);
        }
    }

    fn config(&self) {
        if self.enabled() {
            self.shared.raise(&self.shared.config_vector, ISR_CONFIG);
        }
    }

    fn needs_reset(&self) {
        if self.enabled() {
            self.shared.needs_reset();
        }
    }

    fn event(&self, index: u16) -> Option<EventFd> {
        let vector = self.shared.queue_vectors.get(usize::from(index))?.load(Ordering::Acquire);
        if vector == NO_VECTOR || !self.shared.msix.enabled() {
            return None;
        }
        self.shared.msix.event(vector).ok()
    }
}
