//! A PCI root bus with hot-pluggable functions, for devices whose registers live in 64-bit memory BARs
//! and whose interrupts are MSI-X. PCI Local Bus 3.0, PCI Express Base 4.0 (ECAM only).
//!
//! Has never heard of KVM or virtio: interrupts leave through [`Vectors`], doorbells through
//! [`Doorbells`], both implemented by the VMM. Absent on purpose: bridges below the root, INTx, I/O
//! BARs, 32-bit BARs, expansion ROMs, power management, SR-IOV.
//!
//! Locking: one lock a device and one short lock for the bus' tables. A vCPU that accesses one
//! device never waits for another device.

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

/// A memory BAR as the guest has it decoded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRange {
    /// Index of the BAR's first register, 0 to 5.
    pub bar: u8,
    pub addr: u64,
    pub size: u64,
}

/// A memory BAR a device needs, before it has an address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BarRequest {
    pub bar: u8,
    /// A power of two.
    pub size: u64,
}

/// A function on the bus. Every method is called under that device's own lock.
pub trait PciDevice: Send {
    /// The BARs to give addresses to when the device is plugged.
    fn bar_requests(&self) -> Vec<BarRequest>;
    /// Sets a BAR's address as firmware would have, before the guest sees the device.
    fn assign_bar(&mut self, bar: u8, addr: u64);
    /// Reads configuration space; `data` lies within one 32-bit register.
    fn config_read(&mut self, offset: u16, data: &mut [u8]);
    /// Writes configuration space; `data` lies within one 32-bit register.
    fn config_write(&mut self, offset: u16, data: &[u8]);
    /// The BARs as now decoded; empty while memory decoding is off.
    fn bars(&self) -> Vec<BarRange>;
    fn mmio_read(&mut self, bar: u8, offset: u64, data: &mut [u8]);
    fn mmio_write(&mut self, bar: u8, offset: u64, data: &[u8]);
}

/// What an MSI-X table entry holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct MsixMessage {
    pub address: u64,
    pub data: u32,
    /// The vector will not be triggered until it is programmed again, unmasked.
    pub masked: bool,
}

/// One device's MSI-X vectors; the VMM implements them with irqfds and GSI routes.
pub trait Vectors: Send + Sync {
    /// Called when a vector becomes usable with a new message, and with `masked` when MSI-X is
    /// switched off; masking and unmasking with an unchanged message is handled in this crate.
    fn program(&self, vector: u16, message: MsixMessage) -> io::Result<()>;
    /// Raises the interrupt. Only called for vectors whose last `program` was unmasked.
    fn trigger(&self, vector: u16) -> io::Result<()>;
    /// What raises the interrupt by being written to, past the masks kept here; for another process.
    fn event(&self, _vector: u16) -> io::Result<EventFd> {
        Err(io::ErrorKind::Unsupported.into())
    }
}

/// Addresses at which any guest write signals an event without leaving the kernel.
pub trait Doorbells: Send + Sync {
    fn bind(&self, address: u64, event: &EventFd) -> io::Result<()>;
    fn unbind(&self, address: u64, event: &EventFd) -> io::Result<()>;
}
