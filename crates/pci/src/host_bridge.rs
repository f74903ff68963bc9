//! The host bridge in slot 0. Operating systems look for it to decide whether configuration
//! mechanism 1 works (PCI 3.0, section 3.2.2.3).

use crate::config::{ConfigSpace, Identity};
use crate::{BarRange, BarRequest, PciDevice, StateError};

/// Red Hat's vendor id, and its device id of generic host bridges (QEMU).
const VENDOR: u16 = 0x1b36;
const DEVICE: u16 = 0x0008;
/// Class: bridge, subclass: host bridge.
const CLASS: [u8; 3] = [0x06, 0x00, 0x00];

/// Has a configuration space only.
#[derive(Debug)]
pub struct HostBridge {
    config: ConfigSpace,
}

impl Default for HostBridge {
    fn default() -> Self {
        Self {
            config: ConfigSpace::new(Identity {
                vendor: VENDOR,
                device: DEVICE,
                subsystem_vendor: 0,
                subsystem: 0,
                revision: 0,
                class: CLASS,
            }),
        }
    }
}

impl PciDevice for HostBridge {
    fn bar_requests(&self) -> Vec<BarRequest> {
        Vec::new()
    }

    fn assign_bar(&mut self, _bar: u8, _addr: u64) {}

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bars(&self) -> Vec<BarRange> {
        Vec::new()
    }

    fn mmio_read(&mut self, _bar: u8, _offset: u64, _data: &mut [u8]) {}

    fn mmio_write(&mut self, _bar: u8, _offset: u64, _data: &[u8]) {}

    fn save(&mut self) -> Result<serde_json::Value, StateError> {
        Ok(serde_json::to_value(self.config.save())?)
    }

    fn load(&mut self, state: serde_json::Value) -> Result<(), StateError> {
        self.config.load(&serde_json::from_value(state)?)
    }
}
