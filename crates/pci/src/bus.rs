//! The root bus: slots, address assignment, and the ways a guest reaches devices: configuration
//! ports (PCI 3.0, section 3.2.2.3.2), ECAM (PCI Express Base 4.0, section 7.2.2), memory BARs.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use crate::{BarRange, HostBridge, PciDevice};

/// Device numbers on a bus.
pub const SLOTS: usize = 32;
/// Bytes of ECAM space: one bus of 256 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 1 << 20;
/// Port of the configuration address register, 4 bytes.
pub const PORT_ADDRESS: u16 = 0xcf8;
/// First port of the configuration data register, 4 bytes.
pub const PORT_DATA: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;

#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("the PCI bus has no free slot of its {SLOTS}")]
    Full,
    #[error("no room for a BAR of {size:#x} bytes in the window {window:#x?}")]
    NoSpace { size: u64, window: Range<u64> },
    #[error("PCI slot {slot} is empty")]
    Empty { slot: u8 },
    #[error("PCI slot {slot} holds the host bridge")]
    HostBridge { slot: u8 },
}

type Device = Arc<Mutex<Box<dyn PciDevice>>>;

/// A root bus, shared by the vCPU threads.
pub struct Bus {
    window: Range<u64>,
    /// The configuration address register. Guests serialize its use themselves.
    address: Mutex<u32>,
    tables: RwLock<Tables>,
}

#[derive(Default)]
struct Tables {
    slots: [Option<Device>; SLOTS],
    /// What the guest has decoded, in no order; where two overlap, the first answers.
    routes: Vec<Route>,
    /// What was assigned when devices were plugged, by slot.
    assigned: HashMap<u8, Vec<Range<u64>>>,
}

struct Route {
    slot: u8,
    range: BarRange,
    device: Device,
}

impl Bus {
    /// A bus with the host bridge in slot 0, which places 64-bit BARs within `window`.
    pub fn new(window: Range<u64>) -> Self {
        let mut tables = Tables::default();
        tables.slots[0] = Some(Arc::new(Mutex::new(Box::new(HostBridge::default()))));
        Self { window, address: Mutex::new(0), tables: RwLock::new(tables) }
    }

    /// Plugs a device: gives its BARs addresses and returns its slot.
    pub fn add(&self, mut device: Box<dyn PciDevice>) -> Result<u8, BusError> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let free = tables.slots.iter().position(Option::is_none).ok_or(BusError::Full)?;
        let slot = free as u8;
        let mut taken: Vec<Range<u64>> = tables.assigned.values().flatten().cloned().collect();
        // Also what the guest has moved elsewhere.
        taken.extend(tables.routes.iter().map(|r| r.range.addr..r.range.end()));
        let mut mine = Vec::new();
        for request in device.bar_requests() {
            let range = first_fit(&self.window, request.size, &taken).ok_or_else(|| {
                BusError::NoSpace { size: request.size, window: self.window.clone() }
            })?;
            device.assign_bar(request.bar, range.start);
            taken.push(range.clone());
            mine.push(range);
        }
        tables.assigned.insert(slot, mine);
        tables.slots[free] = Some(Arc::new(Mutex::new(device)));
        Ok(slot)
    }

    /// Pulls a device: from now on its slot and its addresses answer all ones. The device is
    /// dropped here, or by a vCPU that is inside it right now when that leaves it.
    pub fn remove(&self, slot: u8) -> Result<(), BusError> {
        if slot == 0 {
            return Err(BusError::HostBridge { slot });
        }
        let device = {
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            let place = tables.slots.get_mut(usize::from(slot)).ok_or(BusError::Empty { slot })?;
            let device = place.take().ok_or(BusError::Empty { slot })?;
            tables.routes.retain(|r| r.slot != slot);
            tables.assigned.remove(&slot);
            device
        };
        drop(device);
        Ok(())
    }

    /// A read from ports 0xcf8 to 0xcff.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(at) = within(port, PORT_ADDRESS, data.len()) {
            let address = lock(&self.address).to_le_bytes();
            data.copy_from_slice(&address[at..at + data.len()]);
        } else if let Some(at) = within(port, PORT_DATA, data.len())
            && let Some((slot, register)) = self.selected()
        {
            self.config_read(slot, register + at as u16, data);
        }
    }

    /// A write to ports 0xcf8 to 0xcff. The address register takes only whole writes.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if port == PORT_ADDRESS {
            if let Ok(bytes) = data.try_into() {
                *lock(&self.address) = u32::from_le_bytes(bytes);
            }
        } else if let Some(at) = within(port, PORT_DATA, data.len())
            && let Some((slot, register)) = self.selected()
        {
            self.config_write(slot, register + at as u16, data);
        }
    }

    /// Slot and register that the address register selects on this bus.
    fn selected(&self) -> Option<(u8, u16)> {
        let address = *lock(&self.address);
        let (bus, function) = (address >> 16 & 0xff, address >> 8 & 0x7);
        let here = address & ADDRESS_ENABLE != 0 && bus == 0 && function == 0;
        here.then_some(((address >> 11 & 0x1f) as u8, (address & 0xfc) as u16))
    }

    /// A read at `offset` of the ECAM range.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((slot, register)) = ecam_place(offset, data.len()) {
            self.config_read(slot, register, data);
        }
    }

    /// A write at `offset` of the ECAM range.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((slot, register)) = ecam_place(offset, data.len()) {
            self.config_write(slot, register, data);
        }
    }

    fn config_read(&self, slot: u8, offset: u16, data: &mut [u8]) {
        if let Some(device) = self.device(slot) {
            data.fill(0);
            lock(&device).config_read(offset, data);
        }
    }

    fn config_write(&self, slot: u8, offset: u16, data: &[u8]) {
        let Some(device) = self.device(slot) else { return };
        let mut locked = lock(&device);
        let before = locked.bars();
        locked.config_write(offset, data);
        let after = locked.bars();
        if before != after {
            self.route(slot, &device, &after);
        }
    }

    /// Takes over what the guest has decoded, unless the device has been pulled meanwhile.
    fn route(&self, slot: u8, device: &Device, ranges: &[BarRange]) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let held = tables.slots[usize::from(slot)].as_ref();
        if !held.is_some_and(|d| Arc::ptr_eq(d, device)) {
            return;
        }
        tables.routes.retain(|r| r.slot != slot);
        tables.routes.extend(ranges.iter().map(|range| Route {
            slot,
            range: *range,
            device: device.clone(),
        }));
    }

    /// A read of guest-physical memory; `false` when no BAR is decoded there (the VMM answers all
    /// ones).
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some((device, bar, offset)) = self.decode(addr, data.len()) else { return false };
        data.fill(0);
        lock(&device).mmio_read(bar, offset, data);
        true
    }

    /// A write to guest-physical memory; `false` when no BAR is decoded there.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((device, bar, offset)) = self.decode(addr, data.len()) else { return false };
        lock(&device).mmio_write(bar, offset, data);
        true
    }

    fn device(&self, slot: u8) -> Option<Device> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        tables.slots.get(usize::from(slot))?.clone()
    }

    fn decode(&self, addr: u64, len: usize) -> Option<(Device, u8, u64)> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        let route = tables.routes.iter().find(|r| r.range.contains(addr, len as u64))?;
        Some((route.device.clone(), route.range.bar, addr - route.range.addr))
    }
}

impl BarRange {
    fn end(&self) -> u64 {
        self.addr.saturating_add(self.size)
    }

    fn contains(&self, addr: u64, len: u64) -> bool {
        let offset = addr.checked_sub(self.addr);
        offset.and_then(|o| o.checked_add(len)).is_some_and(|end| end <= self.size)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Where an access of `len` bytes at `port` falls in the 4-byte register at `base`.
fn within(port: u16, base: u16, len: usize) -> Option<usize> {
    let at = usize::from(port.checked_sub(base)?);
    (at + len <= 4).then_some(at)
}

fn ecam_place(offset: u64, len: usize) -> Option<(u8, u16)> {
    let register = (offset & 0xfff) as u16;
    let in_register = usize::from(register % 4) + len <= 4;
    let function = offset >> 12 & 0x7;
    (offset < ECAM_SIZE && in_register && function == 0).then_some(((offset >> 15) as u8, register))
}

/// The lowest naturally aligned free range.
fn first_fit(window: &Range<u64>, size: u64, taken: &[Range<u64>]) -> Option<Range<u64>> {
    let mut start = window.start.checked_next_multiple_of(size)?;
    loop {
        let end = start.checked_add(size).filter(|end| *end <= window.end)?;
        match taken.iter().find(|t| t.start < end && start < t.end) {
            None => return Some(start..end),
            Some(t) => start = t.end.checked_next_multiple_of(size)?,
        }
    }
}

#[cfg(test)]
mod tests;
