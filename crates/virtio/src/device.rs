//! The traits that a device implements.
//!
//! A [`VirtioDevice`] has identity, features and configuration; the transport calls it on vCPU
//! threads. When the driver sets DRIVER_OK, it creates an [`Engine`], which owns the queues and
//! runs on a [`crate::Worker`] until the driver resets the device. Each activation creates a new
//! engine, so no state survives a reset.

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
    /// Short name, as in the control API's `DeviceStatus::kind`.
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

/// Counters of one device since it was created; they survive resets.
#[derive(Debug, Default)]
pub struct DeviceCounters {
    operations: AtomicU64,
    bytes: AtomicU64,
    errors: AtomicU64,
    /// Rate limit for log lines that the guest can cause.
    pub(crate) limit: LogLimit,
}

impl DeviceCounters {
    /// Counts a completed request or packet of `bytes` data bytes.
    pub fn operation(&self, bytes: u64) {
        self.operations.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// Counts a request or packet that failed, was malformed, or was dropped.
    pub fn error(&self) {
        self.errors.fetch_add(1, Ordering::Relaxed);
    }

    /// Completed requests or packets.
    pub fn operations(&self) -> u64 {
        self.operations.load(Ordering::Relaxed)
    }

    /// Data bytes of completed requests or packets.
    pub fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Failed, malformed or dropped requests or packets.
    pub fn errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed)
    }
}

/// Interrupts from an engine to its driver; implemented by the transport.
pub trait Interrupt: Send + Sync {
    /// Used buffer notification of queue `index` (section 2.3).
    fn queue(&self, index: u16);
    /// Configuration change notification (section 2.3).
    fn config(&self);
    /// Sets DEVICE_NEEDS_RESET (section 2.1.2) and sends a configuration change notification.
    fn needs_reset(&self);
    /// The eventfd that raises the interrupt of queue `index`, for a device that another process
    /// serves; none if only [`Self::queue`] can raise it. It bypasses the per-vector mask of MSI-X:
    /// a driver has to tolerate an interrupt that was in flight when it masked the vector.
    fn event(&self, _index: u16) -> Option<EventFd> {
        None
    }
}

/// What the transport hands to a device at DRIVER_OK.
pub struct Activation {
    /// One per entry of [`VirtioDevice::queue_sizes`], in order. A queue that the driver did not
    /// enable never has a chain.
    pub queues: Vec<VirtQueue>,
    pub interrupt: Arc<dyn Interrupt>,
    /// Negotiated features.
    pub features: u64,
}

/// Identity, features and configuration of a device.
pub trait VirtioDevice: Send {
    fn kind(&self) -> DeviceKind;
    /// Largest size of each queue; powers of two.
    fn queue_sizes(&self) -> &[u16];
    /// Offered features; [`crate::features::COMMON`] are offered by every device.
    fn features(&self) -> u64;
    /// Reads the device configuration into `data`, which is zeroed; bytes past the end stay zero.
    fn read_config(&self, offset: usize, data: &mut [u8]);
    /// Changes with every change of the configuration that the driver did not cause (section
    /// 2.5.3).
    fn config_generation(&self) -> u8 {
        0
    }
    fn counters(&self) -> Arc<DeviceCounters>;
    /// Whether a device with the same configuration, without any other state, can continue with the
    /// queues of this one, whose engine has drained. Otherwise the reason.
    fn check_saveable(&self) -> Result<(), String>;
    /// Creates the engine. Must not block: it runs on a vCPU thread. An error sets
    /// DEVICE_NEEDS_RESET.
    fn activate(&mut self, activation: Activation) -> io::Result<Box<dyn Engine>>;
}

/// The queues of a device that has exactly `N`; an error for any other number.
pub(crate) fn take_queues<const N: usize>(queues: Vec<VirtQueue>) -> io::Result<[VirtQueue; N]> {
    let count = queues.len();
    queues.try_into().map_err(|_| {
        let message = format!("device has {N} queues, but its transport passed {count}");
        io::Error::new(io::ErrorKind::InvalidInput, message)
    })
}

/// [`VirtioDevice::read_config`] from a configuration structure in bytes.
pub fn read_config_bytes(config: &[u8], offset: usize, data: &mut [u8]) {
    if let Some(rest) = config.get(offset..) {
        let len = rest.len().min(data.len());
        data[..len].copy_from_slice(&rest[..len]);
    }
}

/// The data path of an active device. Every method runs on the worker's thread.
pub trait Engine: Send {
    /// Registers file descriptors. An error sets DEVICE_NEEDS_RESET.
    fn start(&mut self, poll: &mut Poll<'_>) -> io::Result<()>;

    /// The file descriptor registered under `token` is ready; every call may be spurious. Must not
    /// block and must do a bounded amount of work; [`Poll::reschedule`] requests another call for
    /// the rest.
    fn handle(&mut self, token: u32, events: EventSet, poll: &mut Poll<'_>);

    /// When [`Engine::tick`] is to be called next.
    fn deadline(&self) -> Option<Instant> {
        None
    }

    fn tick(&mut self, _now: Instant, _poll: &mut Poll<'_>) {}

    /// Takes no more chains from the queues until [`Engine::resume`]; requests in flight complete.
    fn drain(&mut self) {}

    /// Whether no request is in flight. Called repeatedly after [`Engine::drain`].
    fn drained(&mut self) -> bool {
        true
    }

    /// Continues after a pause.
    fn resume(&mut self, _poll: &mut Poll<'_>) {}
}

/// State of one engine in its worker's epoll.
#[derive(Debug, Default)]
pub(crate) struct PollState {
    /// Tokens to handle in the next round.
    pub(crate) rescheduled: Vec<u32>,
    /// Registered file descriptors. They are removed from epoll when the engine is dropped: closing
    /// one does not remove it while a duplicate is open.
    fds: HashSet<RawFd>,
}

impl PollState {
    pub(crate) fn remove_all(&mut self, epoll: &Epoll) {
        for fd in self.fds.drain() {
            let _ = epoll.ctl(ControlOperation::Delete, fd, EpollEvent::default());
        }
    }
}

/// An engine's access to its worker's epoll.
pub struct Poll<'a> {
    epoll: &'a Epoll,
    engine: u32,
    state: &'a mut PollState,
}

impl<'a> Poll<'a> {
    pub(crate) fn new(epoll: &'a Epoll, engine: u32, state: &'a mut PollState) -> Self {
        Self { epoll, engine, state }
    }

    /// Registers a file descriptor (EPOLL_CTL_ADD); `token` is passed to [`Engine::handle`].
    pub fn add(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.ctl(ControlOperation::Add, fd, token, events)?;
        self.state.fds.insert(fd);
        Ok(())
    }

    /// Changes token or events of a registered file descriptor (EPOLL_CTL_MOD).
    pub fn modify(&mut self, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        self.ctl(ControlOperation::Modify, fd, token, events)
    }

    /// To be called before the file descriptor is closed.
    pub fn remove(&mut self, fd: RawFd) {
        if self.state.fds.remove(&fd) {
            let _ = self.ctl(ControlOperation::Delete, fd, 0, EventSet::empty());
        }
    }

    /// Requests [`Engine::handle`] with this token and no events in the worker's next round.
    pub fn reschedule(&mut self, token: u32) {
        if !self.state.rescheduled.contains(&token) {
            self.state.rescheduled.push(token);
        }
    }

    fn ctl(&self, op: ControlOperation, fd: RawFd, token: u32, events: EventSet) -> io::Result<()> {
        let data = u64::from(self.engine) << 32 | u64::from(token);
        self.epoll.ctl(op, fd, EpollEvent::new(events, data))
    }
}
