//! Block device.

use std::fs::File;
use std::io;
use std::sync::Arc;

use crate::device::{Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice};
use crate::features;

pub struct Block {
    counters: Arc<DeviceCounters>,
}

impl Block {
    pub fn new(_file: File, _serial: &str, _read_only: bool) -> io::Result<Self> {
        Ok(Self { counters: Arc::default() })
    }
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256]
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
