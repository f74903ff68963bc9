//! Balloon device (virtio 1.2, section 5.5) for free page reporting: the driver tells which pages it
//! does not use, and they go back to the host.
//!
//! - [`spec`]: the specification's numbers; [`engine`]: the driver's reports.
//!
//! The balloon itself is never inflated: the configuration always asks for 0 pages, and what a driver
//! puts into the inflate and deflate queues is handed back without effect. A report is a hint about
//! the driver's own memory; the worst that a false one does is to lose what the guest had there. It
//! must lie in memory that was granted to the guest: in the room that a VM grows into, only blocks
//! that are plugged ([`crate::mem`]) count.

mod engine;
mod spec;
#[cfg(test)]
mod tests;

use std::io;
use std::sync::Arc;

use self::engine::BalloonEngine;
use self::spec::{F_REPORTING, QUEUE_SIZES};
use crate::device::{Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice, take_queues};
use crate::features;
use crate::mem::Resize;

/// The device. All fields of its configuration (`num_pages`, `actual`) are 0.
pub struct Balloon {
    room: Option<Resize>,
    counters: Arc<DeviceCounters>,
}

impl Balloon {
    /// `room`: the memory device of a VM that can grow.
    pub fn new(room: Option<Resize>) -> Self {
        Self { room, counters: Arc::default() }
    }
}

impl VirtioDevice for Balloon {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Balloon
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::COMMON | F_REPORTING
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let [inflate, deflate, reporting] = take_queues(activation.queues)?;
        let (room, counters) = (self.room.clone(), self.counters.clone());
        Ok(Box::new(BalloonEngine::new([inflate, deflate], reporting, room, counters)))
    }
}
