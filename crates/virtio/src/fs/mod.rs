//! File system device (virtio 1.2, section 5.11) as a vhost-user front end: a back end process
//! answers the requests, so the VMM parses no FUSE request while that process runs.
//!
//! - [`spec`]: constants of the specifications; [`connection`]: messages to the back end;
//! - [`engine`]: starts and stops the rings in the back end; [`orphan`]: answers requests after it
//!   has exited.
//!
//! The back end (`nacelle-fs`) has access to the tenant's files; the VMM has not. It gets the
//! guest's memory and, per queue, the kick eventfd (doorbell) and the call eventfd (interrupt), so
//! requests do not involve threads of the VMM.

mod connection;
mod engine;
mod orphan;
mod spec;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};

use self::connection::Connection;
use self::engine::FsEngine;
pub use self::spec::TAG_LEN;
use self::spec::{CONFIG_LEN, QUEUES_MAX};
use crate::device::{
    Activation, DeviceCounters, DeviceKind, Engine, VirtioDevice, read_config_bytes,
};
use crate::features;

/// Sizes of the hiprio queue (FORGET, INTERRUPT) and of each request queue (section 5.11.2). Linux
/// puts as many pages into a request as the queue has entries, up to 256. Each queue costs the guest
/// some 30 KiB; only VMs with shares have this device.
const FIRST_QUEUE_SIZE: u16 = 128;
const REQUEST_QUEUE_SIZE: u16 = 512;

#[derive(Debug, thiserror::Error)]
pub enum FsError {
    #[error("tag {tag:?} is not 1 to {TAG_LEN} bytes without a NUL")]
    Tag { tag: String },
    #[error("{count} request queues, not 1 to {}", QUEUES_MAX - 1)]
    Queues { count: u16 },
}

/// The device.
pub struct Fs {
    config: [u8; CONFIG_LEN],
    queue_sizes: Vec<u16>,
    /// The connection between activations; none once it has failed.
    home: Arc<Mutex<Option<Connection>>>,
    counters: Arc<DeviceCounters>,
}

impl Fs {
    /// A file system that the guest mounts by `tag`, 1 to 36 bytes without NUL. `backend` is the
    /// connected vhost-user socket of a server that can serve `request_queues` queues. Linux (6.11 and
    /// later) uses one for each of its CPUs, and a reply interrupts the CPU that sent the request; with
    /// one queue for all CPUs, most replies arrive at another CPU, which has to wake the one that waits.
    pub fn new(tag: &str, backend: OwnedFd, request_queues: u16) -> Result<Self, FsError> {
        if !(1..=TAG_LEN).contains(&tag.len()) || tag.contains('\0') {
            return Err(FsError::Tag { tag: tag.to_owned() });
        }
        let count = usize::from(request_queues);
        if !(1..QUEUES_MAX).contains(&count) {
            return Err(FsError::Queues { count: request_queues });
        }
        let mut queue_sizes = vec![FIRST_QUEUE_SIZE];
        queue_sizes.resize(1 + count, REQUEST_QUEUE_SIZE);
        let mut config = [0; CONFIG_LEN];
        config[..tag.len()].copy_from_slice(tag.as_bytes());
        config[TAG_LEN..].copy_from_slice(&u32::from(request_queues).to_le_bytes());
        let home = Arc::new(Mutex::new(Some(Connection::new(backend))));
        Ok(Self { config, queue_sizes, home, counters: Arc::default() })
    }
}

impl VirtioDevice for Fs {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Fs
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    /// Offered before the back end was asked, which happens at activation; a back end without these
    /// features is treated as failed.
    fn features(&self) -> u64 {
        features::COMMON
    }

    fn read_config(&self, offset: usize, data: &mut [u8]) {
        read_config_bytes(&self.config, offset, data);
    }

    fn check_saveable(&self) -> Result<(), String> {
        Err("its backend has state of its own".to_owned())
    }

    fn counters(&self) -> Arc<DeviceCounters> {
        self.counters.clone()
    }

    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>> {
        let Activation { queues, interrupt, features } = activation;
        let (got, want) = (queues.len(), self.queue_sizes.len());
        if got != want {
            let message = format!("device has {want} queues, its transport brought {got}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let connection = self.home.lock().unwrap_or_else(PoisonError::into_inner).take();
        let (home, counters) = (self.home.clone(), self.counters.clone());
        Ok(Box::new(FsEngine::new(queues, interrupt, features, connection, home, counters)))
    }
}
