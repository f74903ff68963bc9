//! Vsock device.

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use crate::device::{Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice};
use crate::features;

pub struct Vsock {
    counters: Arc<DeviceCounters>,
}

impl Vsock {
    pub fn new(_guest_cid: u64, _listener: UnixListener) -> io::Result<Self> {
        Ok(Self { counters: Arc::default() })
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 256, 64]
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
