//! What a device is to its transport and to its worker.
//!
//! A [`VirtioDevice`] is the still half: identity, features, configuration; it lives with the
//! transport, on vCPU threads. When the driver sets DRIVER_OK it makes an [`Engine`], the moving
//! half, which owns the queues and runs on a [`crate::Worker`] until the driver resets the device.
//! A fresh activation makes a fresh engine, so a reset cannot leave state behind.

use std::collections::HashSet;
use std::io;
use std::os::fd::RawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

pub use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent};
use vmm_sys_util::eventfd::EventFd;

use crate::limit::LogLimit;
use crate::queue::VirtQueue;

/// Device types (virtio 1.2, section 5).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub enum DeviceKind {
    Net = 1,
    Block = 2,
    Console = 3,
    Rng = 4,
    Balloon = 5,
    Vsock = 19,
    Mem = 24,
    Fs = 26,
}

impl DeviceKind {
    /// Short name, as in the control API.
    pub fn name(self) -> &'static str {
        match self {
            Self::Net => "net",
            Self::Block => "blk",
            Self::Console => "console",
            Self::Rng => "rng",
            Self::Balloon => "balloon",
            Self::Vsock => "vsock",
            Self::Mem => "mem",
            Self::Fs => "fs",
        }
    }

    /// PCI class, subclass and programming interface (PCI Code and ID Assignment 1.11).
    pub fn class(self) -> [u8; 3] {
        match self {
            Self::Net => [0x02, 0x00, 0x00],
            Self::Block | Self::Fs => [0x01, 0x80, 0x00],
            Self::Console => [0x07, 0x80, 0x00],
            Self::Rng | Self::Balloon | Self::Mem => [0xff, 0x00, 0x00],
            Self::Vsock => [0x02, 0x80, 0x00],
        }
    }
}

/// Counts of one device since it was made; shared with whoever wants to read them.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    /// For what the guest makes the device log.
    pub(crate) limit: LogLimit,
}

impl DeviceCounters {
    /// A request or packet that was carried out.
    pub fn operation(&self, bytes: u64) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// A request or packet that failed, was malformed, or was dropped.
    pub fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// How an engine calls its driver; implemented by the transport.
pub trait Interrupt: Send + Sync {
    /// Used buffers in queue `index`.
    fn queue(&self, index: u16);
    /// The device's configuration has changed.
    fn config(&self);
    /// Sets DEVICE_NEEDS_RESET (section 2.1.2) and tells the driver.
    fn needs_reset(&self);
    /// What raises the interrupt of queue `index` by being written to, for a device that another
    /// process serves; none where only [`Self::queue`] does. It goes past a mask of that one vector:
    /// a driver has to bear an interrupt that was on its way when it masked the vector anyhow.
    fn event(&self, _index: u16) -> Option<EventFd> {
        None
    }
}

/// What an engine is made from.
pub struct Activation {
    /// As many as the device announced, in order; one that the driver left disabled never has
    /// anything in it.
    pub queues: Vec<VirtQueue>,
    pub interrupt: Arc<dyn Interrupt>,
    /// Features both sides agreed on.
    pub features: u64,
}

/// The still half of a device.
pub trait VirtioDevice: Send {
    fn kind(&self) -> DeviceKind;
    /// Largest size of each queue; powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Features offered; see [`crate::features`] for those every device offers.
    fn features(&self) -> u64;
    /// Reads device configuration; bytes past its end stay as they are (zero).
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Changes whenever the configuration does without the driver's doing (section 2.5.3).
    fn config_generation(&self) -> u8 {
        0
    }
    fn counters(&self) -> Arc<DeviceCounters>;
    /// Makes the moving half. Never blocks: runs on a vCPU thread.
    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>>;
}

/// The queues of a device that has exactly `N`.
pub(crate) fn take_queues<const N: usize>(queues: Vec<VirtQueue>) -> io::Result<[VirtQueue; N]> {
    let count = queues.len();
    queues.try_into().map_err(|_| {
        let message = format!("device has {N} queues, its transport brought {count}");
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })
}

/// Reads from a configuration structure given as bytes.
pub fn read_config_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    if let Some(rest) = config.get(offset..) {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}

/// The moving half of a device. Every method runs on the worker's thread.
pub trait Engine: Send {
    /// Registers descriptors. An error sets DEVICE_NEEDS_RESET.
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()>;

    /// Something registered under `token` is ready (or was: every call may be spurious). Must not
    /// block and must do a bounded amount of work; what is left over is asked for with
    /// [`Poll::again`].
    fn handle(&mut self, token: u32, events: EventSet, poll: &mut Poll<'_>);

    /// When [`Engine::tick`] wants to be called next.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn tick(&mut self, _now: Instant, _poll: &mut Poll<'_>) {}

    /// Begins to finish what is in flight; nothing new is taken from the queues until
    /// [`Engine::resume`].
    fn drain(&mut self) {}

    /// Whether nothing is in flight any more. Called repeatedly after [`Engine::drain`].
    fn drained(&mut self) -> bool {
        true
    }

    /// Goes on after a pause.
    fn resume(&mut self, _poll: &mut Poll<'_>) {}
}

/// What a worker remembers of one engine's use of its epoll.
#[derive(Debug, Default)]
pub(crate) struct PollState {
    /// Tokens to handle in the next round.
    pub(crate) again: Vec<u32>,
    /// Registered descriptors. They are taken out of epoll when the engine goes: closing does not,
    /// where a duplicate stays open elsewhere.
    fds: HashSet<RawFd>,
}

impl PollState {
    pub(crate) fn remove_all(&mut self, epoll: &Epoll) {
        for fd in self.fds.drain() {
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }
}

/// An engine's view of its worker's epoll.
pub struct Poll<'a> {
    epoll: &'a Epoll,
    engine: u32,
    state: &'a mut PollState,
}

impl<'a> Poll<'a> {
    pub(crate) fn new(epoll: &'a Epoll, engine: u32, state: &'a mut PollState) -> Self {
        Self { epoll, engine, state }
    }

    pub fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.ctl(ControlOperation::Add, fd, token, events)?;
        self.state.fds.insert(fd);
        Ok(())
    }

    pub fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.ctl(ControlOperation::Modify, fd, token, events)
    }

    /// To be called before the descriptor is closed.
    pub fn remove(&mut self, fd: RawFd) {
        if self.state.fds.remove(&fd) {
            let _ = self.ctl(ControlOperation::Delete, fd, 0, EventSet::empty());
        }
    }

    /// Asks for [`Engine::handle`] with this token (and no events) in the worker's next round.
    pub fn again(&mut self, token: u32) {
        if !self.state.again.contains(&token) {
            self.state.again.push(token);
        }
    }

    fn ctl(&self, op: ControlOperation, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        let data = u64::from(self.engine) << 32 | u64::from(token);
        self.epoll.ctl(op, fd, EpollEvent::new(events, data))
    }
}
