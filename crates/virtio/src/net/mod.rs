//! Network device (virtio 1.2, section 5.1) on a tap: one queue pair, checksum and TCP segmentation
//! offload both ways, mergeable receive buffers.
//!
//! - [`spec`]: constants of the specification; [`tap`]: ioctls of the tap; [`engine`]: moves
//!   packets.
//!
//! Not implemented: control queue, multiqueue, UDP fragmentation offload.

mod engine;
mod spec;
mod tap;
#[cfg(test)]
mod tests;

use std::fs::File;
use std::io;
use std::sync::Arc;

use self::engine::NetEngine;
use self::spec::{
    F_CSUM, F_GUEST_CSUM, F_GUEST_TSO4, F_GUEST_TSO6, F_HOST_TSO4, F_HOST_TSO6, F_MAC, F_MRG_RXBUF,
    F_MTU, F_STATUS, MIN_MTU,
};
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice, read_config_bytes, take_queues,
};
use crate::features;

const QUEUE_SIZE: u16 = 256;

/// Sets a tap's offloads (TUNSETOFFLOAD).
type SetOffloads = fn(&File, libc::c_uint) -> io::Result<()>;

#[derive(Debug, thiserror::Error)]
pub enum NetError {
    #[error("MTU {mtu} is below {MIN_MTU}")]
    Mtu { mtu: u16 },
    #[error("MAC address {mac:02x?} is a group address or all zero")]
    Mac { mac: [u8; 6] },
    #[error("file descriptor is not a tap with IFF_VNET_HDR")]
    Tap(#[source] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Net {
    tap: Arc<File>,
    set_offloads: SetOffloads,
    mac: [u8; 6],
    mtu: u16,
    counters: Arc<DeviceCounters>,
}

impl Net {
    /// A device on `tap`, which has `IFF_TAP | IFF_NO_PI | IFF_VNET_HDR`. Fails if it has not, or
    /// if MAC address or MTU (bytes) are invalid.
    pub fn new(tap: File, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        tap::prepare(&tap).map_err(NetError::Tap)?;
        Self::over(tap, tap::set_offloads, mac, mtu)
    }

    /// A device on any file that reads and writes whole packets with their headers, for tests and
    /// fuzz targets.
    #[cfg(any(test, feature = "mock"))]
    pub fn over_packets(packets: File, mac: [u8; 6], mtu: u16) -> Result<Self, NetError> {
        Self::over(packets, |_, _| Ok(()), mac, mtu)
    }

    fn over(
        tap: File,
        set_offloads: SetOffloads,
        mac: [u8; 6],
        mtu: u16,
    ) -> Result<Self, NetError> {
        if mtu < MIN_MTU {
            return Err(NetError::Mtu { mtu });
        }
        if mac == [0; 6] || mac[0] & 1 != 0 {
            return Err(NetError::Mac { mac });
        }
        Ok(Self { tap: Arc::new(tap), set_offloads, mac, mtu, counters: Arc::default() })
    }
}

impl VirtioDevice for Net {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Net
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let to_host = F_CSUM | F_HOST_TSO4 | F_HOST_TSO6;
        let to_guest = F_GUEST_CSUM | F_GUEST_TSO4 | F_GUEST_TSO6 | F_MRG_RXBUF;
        features::COMMON | F_MAC | F_MTU | F_STATUS | to_host | to_guest
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&spec::config(self.mac, self.mtu), offset, data);
    }

    fn check_saveable(&self) -> Result<(), String> {
        Err("its tap belongs to one VM".to_owned())
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let queues = take_queues(activation.queues)?;
        let (tap, counters) = (self.tap.clone(), self.counters.clone());
        let engine = NetEngine::new(activation.features, self.set_offloads, tap, queues, counters);
        Ok(Box::new(engine))
    }
}
