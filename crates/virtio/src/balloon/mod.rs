//! Balloon device (virtio 1.2, section 5.5) for free page reporting: the driver reports pages that
//! it does not use, and their memory is returned to the host.
//!
//! - [`spec`]: constants of the specification; [`engine`]: handles reports.
//!
//! The balloon is never inflated: `num_pages` is always 0, and chains in the inflate and deflate
//! queues are returned without effect. A report concerns the guest's own memory; a false one only
//! loses the guest's data there. It must lie in memory granted to the guest: within the hotplug
//! region only in plugged blocks ([`crate::mem`]).

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
use crate::mem::ResizeHandle;

/// The device. All fields of its configuration (`num_pages`, `actual`) are 0.
pub struct Balloon {
    hotplug: Option<ResizeHandle>,
    counters: Arc<DeviceCounters>,
}

impl Balloon {
    /// `hotplug`: the memory device of the VM, if it has one.
    pub fn new(hotplug: Option<ResizeHandle>) -> Self {
        Self { hotplug, counters: Arc::default() }
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

    fn check_saveable(&self) -> Result<(), String> {
        Ok(())
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let [inflate, deflate, reporting] = take_queues(activation.queues)?;
        let (hotplug, counters) = (self.hotplug.clone(), self.counters.clone());
        Ok(Box::new(BalloonEngine::new([inflate, deflate], reporting, hotplug, counters)))
    }
}
