//! Net device.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::device::{Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice};
use crate::features;

pub struct Net {
    counters: Arc<DeviceCounters>,
}

impl Net {
    pub fn new(_tap: File, _mac: [u8; 6], _mtu: u16) -> io::Result<Self> {
        Ok(Self { counters: Arc::default() })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256]
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
