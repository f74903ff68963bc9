//! A PCI root bus with hot-pluggable functions, for devices with 64-bit memory BARs and MSI-X. PCI
//! Local Bus 3.0, PCI Express Base 4.0 (ECAM only).
//!
//! Does not depend on KVM or virtio: interrupts go through [`Vectors`], doorbells through
//! [`Doorbells`], both implemented by the VMM. Not implemented: bridges below the root, INTx, I/O
//! BARs, 32-bit BARs, expansion ROMs, power management, SR-IOV.
//!
//! Locking: one lock per device, and one lock for the tables of the bus that is held briefly. A
//! vCPU that accesses one device never waits for another device.

mod bus;
mod config;
mod host_bridge;
mod msix;

use std::io;

pub use bus::{
    Address, Bus, BusError, BusState, CAPACITY, ECAM_SIZE, FUNCTIONS, HOT_SLOTS, PORT_ADDRESS,
    PORT_DATA, Plug, SLOTS,
};
pub use config::{BAR_COUNT, CONFIG_SIZE, ConfigSpace, ConfigState, Identity};
pub use host_bridge::HostBridge;
pub use msix::{MSIX_ENTRY_SIZE, Msix, MsixState};
use vmm_sys_util::eventfd::EventFd;

/// A decoded memory BAR.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    /// Index of the BAR's first register, 0 to 5.
    pub bar: u8,
    pub addr: u64,
    pub size: u64,
}

/// A memory BAR that a device needs, without an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRequest {
    pub bar: u8,
    /// Bytes, a power of two.
    pub size: u64,
}

/// A function on the bus. Every method is called under that device's own lock.
pub trait PciDevice: Send {
    /// The BARs that get addresses when the device is plugged.
    fn bar_requests(&self) -> Vec<BarRequest>;
    /// Sets a BAR's address, as firmware does, before the guest sees the device.
    fn assign_bar(&mut self, bar: u8, addr: u64);
    /// Reads configuration space; `data` lies within one 32-bit register.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; `data` lies within one 32-bit register.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// The decoded BARs; empty while memory decoding is off.
    fn bars(&self) -> Vec<BarRange>;
    /// Reads `data` at byte `offset` of a BAR.
    fn mmio_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    /// Writes `data` at byte `offset` of a BAR.
    fn mmio_write(&mut self, bar: u8, offset: u64, data: &[u8]);
    /// The state of the device, for [`Self::load`]. To be called while neither vCPUs nor the device
    /// run. Fails if the device cannot be saved, or not now.
    fn save(&mut self) -> Result<serde_json::Value, StateError>;
    /// Continues from a saved state, in a new device of the same kind. A state is input that may
    /// have been changed: one that does not belong to this device is refused.
    fn load(&mut self, state: serde_json::Value) -> Result<(), StateError>;
}

/// Why a device cannot be saved, or not be loaded from a state.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    #[error("{why}")]
    Unsaveable { why: String },
    #[error("the state is not that of this kind of device")]
    Format(#[from] serde_json::Error),
    #[error("the state does not match the device: {what}")]
    Mismatch { what: String },
    #[error("cannot continue from the state")]
    Io(#[from] io::Error),
}

impl StateError {
    /// A state of another device; `what` differs.
    pub fn mismatch(what: impl Into<String>) -> Self {
        Self::Mismatch { what: what.into() }
    }
}

/// The contents of an MSI-X table entry (PCI 3.0, section 6.8.2).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsixMessage {
    pub address: u64,
    pub data: u32,
    /// The vector is not triggered until it is programmed again with `masked` false.
    pub masked: bool,
}

/// One device's MSI-X vectors; the VMM implements them with irqfds and GSI routes.
pub trait Vectors: Send + Sync {
    /// Called when a vector is unmasked with a new message, and with `masked` when MSI-X is
    /// disabled. Masking and unmasking without a new message is handled in this crate.
    fn program(&self, vector: u16, message: MsixMessage) -> io::Result<()>;
    /// Raises the interrupt. Called only for vectors whose last `program` was unmasked.
    fn trigger(&self, vector: u16) -> io::Result<()>;
    /// The eventfd that raises the interrupt when written, for another process. It bypasses the
    /// masks kept in this crate.
    fn event(&self, _vector: u16) -> io::Result<EventFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Guest-physical addresses at which a guest write signals an eventfd in the kernel (ioeventfd).
pub trait Doorbells: Send + Sync {
    /// A write of any length to `address` signals `event` from now on.
    fn bind(&self, address: u64, event: &EventFd) -> io::Result<()>;
    /// Undoes [`Self::bind`].
    fn unbind(&self, address: u64, event: &EventFd) -> io::Result<()>;
}
