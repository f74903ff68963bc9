//! Socket device (virtio 1.2, section 5.10): stream sockets only, connections opened by the host
//! only.
//!
//! A host client connects to a unix socket, sends `CONNECT <port>\n` and reads `OK <host port>\n`.
//! It is then connected to the guest's listener on that vsock port; without a listener its
//! connection is closed without an answer. Connections opened by the guest are refused with RST:
//! the host has no listeners.
//!
//! - [`spec`]: constants of the specification; [`credit`]: flow control;
//! - [`handshake`]: the CONNECT line; [`connection`]: one client connected to one guest socket;
//! - [`engine`]: queues and all connections.
//!
//! An implementation of our own: rust-vmm's `vhost-device-vsock` is a separate process that speaks
//! vhost-user.

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
use std::sync::atomic::{AtomicUsize, Ordering};

use self::engine::VsockEngine;
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice, read_config_bytes, take_queues,
};
use crate::features;

/// Queues rx, tx, event (section 5.10.2). Linux fills rx with buffers of 4 KiB, each a touched page
/// of an idle guest.
const QUEUE_SIZES: [u16; 3] = [64, 128, 16];

/// Most clients at once; further ones wait in the listener's backlog.
/// Attack: a host program, or a guest that never answers, accumulates connections until the VMM has
/// no file descriptors left.
pub const MAX_CONNECTIONS: usize = 1024;

#[derive(Debug, thiserror::Error)]
pub enum VsockError {
    #[error("guest CID {cid} is reserved (virtio 1.2, section 5.10.4): use 3 to 2^32 - 2")]
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
    /// Connections, and packets that end one.
    open: Arc<AtomicUsize>,
}

impl Vsock {
    /// `listener` is a listening unix stream socket; clients wait in its backlog until the driver
    /// is ready. Fails if the CID is reserved or the listener cannot be made non-blocking.
    pub fn new(guest_cid: u64, listener: UnixListener) -> Result<Self, VsockError> {
        if guest_cid <= spec::HOST_CID || guest_cid >= u64::from(u32::MAX) {
            return Err(VsockError::Cid { cid: guest_cid });
        }
        listener.set_nonblocking(true)?;
        Ok(Self { guest_cid, listener, counters: Arc::default(), open: Arc::default() })
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

    fn check_saveable(&self) -> Result<(), String> {
        match self.open.load(Ordering::Acquire) {
            0 => Ok(()),
            open => Err(format!("{open} connections are open")),
        }
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let queues = take_queues(activation.queues)?;
        let listener = self.listener.try_clone()?;
        let counters = self.counters.clone();
        let engine = VsockEngine::new(self.guest_cid, MAX_CONNECTIONS, listener, queues, counters);
        Ok(Box::new(engine.with_gauge(self.open.clone())))
    }
}
