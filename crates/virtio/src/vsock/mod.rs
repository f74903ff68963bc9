//! Socket device (virtio 1.2, section 5.10), streams only, opened by the host.
//!
//! A host program connects to a unix socket, sends `CONNECT <port>\n`, reads `OK <host port>\n`,
//! and is then joined to whoever listens on that vsock port in the guest; if nobody does, its
//! connection is closed without an answer. Connections opened by the guest are refused with RST: no
//! service of the host listens.
//!
//! - [`spec`]: the specification's numbers; [`credit`]: flow control as plain values;
//! - [`handshake`]: the client's first line; [`connection`]: one client joined to one guest socket;
//! - [`engine`]: all of them and the queues.

mod connection;
mod credit;
mod engine;
mod handshake;
mod spec;
#[cfg(test)]
mod tests;

use std::io;
use std::os::unix::net::UnixListener;
use std::sync::Arc;

use self::engine::VsockEngine;
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice, read_config_bytes, take_queues,
};
use crate::features;

/// Received packets, sent packets, events. Linux fills the first with buffers of 4 KiB, which an
/// idle guest pays for with as many touched pages.
const QUEUE_SIZES: [u16; 3] = [64, 128, 16];

/// Most clients at once; others wait in the listener's backlog.
/// Attack: a program on the host, or a guest that never answers, that piles up connections until
/// the VMM has no descriptors left for anything else.
pub const MAX_CONNECTIONS: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error("guest address {cid} is reserved (section 5.10.4): use 3 to 2^32 - 2")]
    Cid { cid: u64 },
    #[error("vsock listener")]
    Listener(#[from] io::Error),
}

/// The device.
#[derive(Debug)]
pub struct Vsock {
    guest_cid: u64,
    listener: UnixListener,
    counters: Arc<DeviceCounters>,
}

impl Vsock {
    /// `listener` is bound and listens; clients wait in its backlog while no driver is ready.
    pub fn new(guest_cid: u64, listener: UnixListener) -> Result<Self, VsockError> {
        if guest_cid <= spec::HOST_CID || guest_cid >= u64::from(u32::MAX) {
            return Err(VsockError::Cid { cid: guest_cid });
        }
        listener.set_nonblocking(true)?;
        Ok(Self { guest_cid, listener, counters: Arc::default() })
    }
}

impl VirtioDevice for Vsock {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Vsock
    }

    fn queue_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn features(&self) -> u64 {
        features::COMMON
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.guest_cid.to_le_bytes(), offset, data);
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let queues = take_queues(activation.queues)?;
        let listener = self.listener.try_clone()?;
        let counters = self.counters.clone();
        Ok(Box::new(VsockEngine::new(self.guest_cid, MAX_CONNECTIONS, listener, queues, counters)))
    }
}
