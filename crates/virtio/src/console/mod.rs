//! Console device.

use std::io;
use std::sync::Arc;

use crate::device::{Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice};
use crate::features;

pub struct Console {
    counters: Arc<DeviceCounters>,
}

impl Console {
    pub fn new(_sink: Box<dyn FnMut(&[u8]) + Send>) -> io::Result<Self> {
        Ok(Self { counters: Arc::default() })
    }
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &[64, 64]
    }

    fn features(&self) -> u64 {
        features::COMMON
    }

    fn read_config(&self, _offset: usize, _data: &mut [u8]) {}

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, _activation: Activation) -> io::Result<Box<dyn Engine>> {
        Err(io::ErrorKind::Unsupported.into())
    }
}
