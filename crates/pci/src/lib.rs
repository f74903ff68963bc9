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
    Address, Bus, BusError, CAPACITY, ECAM_SIZE, FUNCTIONS, HOT_SLOTS, PORT_ADDRESS, PORT_DATA,
    Plug, SLOTS,
};
pub use config::{BAR_COUNT, CONFIG_SIZE, ConfigSpace, Identity};
pub use host_bridge::HostBridge;
pub use msix::{MSIX_ENTRY_SIZE, Msix};
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
