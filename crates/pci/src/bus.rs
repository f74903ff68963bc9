//! The root bus: functions, address assignment, and the guest's accesses to devices: configuration
//! ports (PCI 3.0, section 3.2.2.3.2), ECAM (PCI Express Base 4.0, section 7.2.2), memory BARs.
//!
//! # Slots and functions
//! A slot has up to eight functions. A guest probes function 0, and functions 1 to 7 only if
//! function 0 answers with the multi-function bit in its header type (PCI 3.0, section 6.2.1; Linux
//! `pci_scan_slot`). Linux remembers the bit from its first read of function 0. So there are two
//! kinds of slots:
//!
//! - A device that is present when the guest boots ([`Plug::Boot`]) gets a slot of its own, without
//!   the bit: the guest's boot scan then costs one configuration access per slot, as with
//!   single-function devices. [`HOT_SLOTS`] slots are reserved from these devices as long as others
//!   are free.
//! - Devices plugged later ([`Plug::Hot`]) share slots, eight per slot. The bus sets the bit in
//!   function 0 of such a slot from the beginning, so that a rescan finds devices added later. This
//!   costs up to seven configuration accesses per slot and rescan.
//!
//! # Function 0 is removed before its siblings
//! A device is plugged into the lowest free function. So whenever a device gets a function above 0,
//! function 0 is present, and a free function 0 is taken by the next device. One case remains: a
//! device that was plugged but not scanned yet when function 0 is removed; a rescan would not find
//! it. Then a placeholder takes function 0: a host bridge without BARs and without a driver, as AMD
//! processors have in such slots. Once the guest has read its vendor id, the placeholder stays
//! until the VM ends, because the guest would not scan that function again. So placeholders take at
//! most one function in eight.

use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::{BarRange, HostBridge, PciDevice, StateError};

/// Device numbers on a bus.
pub const SLOTS: usize = 32;
/// Functions of a slot.
pub const FUNCTIONS: usize = 8;
/// Functions that devices can have: all but those of the host bridge's slot.
pub const CAPACITY: usize = (SLOTS - 1) * FUNCTIONS;
/// Slots reserved for devices that are plugged while the guest runs: 160 functions.
pub const HOT_SLOTS: usize = 20;
/// Bytes of ECAM space: one bus of 256 functions of 4 KiB.
pub const ECAM_SIZE: u64 = 1 << 20;
/// Port of the configuration address register, 4 bytes.
pub const PORT_ADDRESS: u16 = 0xcf8;
/// First port of the configuration data register, 4 bytes.
pub const PORT_DATA: u16 = 0xcfc;
const ADDRESS_ENABLE: u32 = 1 << 31;
/// Header type (PCI 3.0, section 6.2.1), and its bit for a slot with several functions.
const HEADER_TYPE: u16 = 0x0e;
const MULTI_FUNCTION: u8 = 1 << 7;
/// Offset of the vendor id, the first register that a guest reads of a function.
const VENDOR_ID: u16 = 0;

#[derive(Debug, thiserror::Error)]
pub enum BusError {
    #[error("all {CAPACITY} functions of the PCI bus are in use")]
    Full,
    #[error("no space for a BAR of {size:#x} bytes in the window {window:#x?}")]
    NoSpace { size: u64, window: Range<u64> },
    #[error("there is no device at {address}")]
    Empty { address: Address },
    #[error("the device at {address} cannot be saved")]
    Save { address: Address, source: StateError },
    #[error("cannot load the state of the device at {address}")]
    Load { address: Address, source: StateError },
    #[error("the saved bus has functions {found:02x?}, this one has {expected:02x?}")]
    OtherFunctions { found: Vec<u8>, expected: Vec<u8> },
    #[error("the function at {address} belongs to the bus and cannot be removed")]
    Reserved { address: Address },
}

/// The state of the functions of a bus.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BusState {
    functions: Vec<FunctionState>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct FunctionState {
    /// Slot in the upper five bits, function in the lower three.
    address: u8,
    state: serde_json::Value,
}

/// When a device is plugged.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plug {
    /// Before the guest's first access to configuration space.
    Boot,
    /// While the guest runs.
    Hot,
}

/// A function's address on this bus; shown as Linux writes it, `0000:00:1f.7`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    /// Slot in the upper five bits, function in the lower three, as in a requester id.
    devfn: u8,
}

impl Address {
    /// # Panics
    /// If there is no such slot or function.
    pub fn new(slot: u8, function: u8) -> Self {
        assert!(usize::from(slot) < SLOTS && usize::from(function) < FUNCTIONS);
        Self { devfn: slot << 3 | function }
    }

    pub fn slot(self) -> u8 {
        self.devfn >> 3
    }

    pub fn function(self) -> u8 {
        self.devfn & 7
    }

    fn index(self) -> usize {
        usize::from(self.devfn)
    }

    /// All functions of a slot.
    fn of_slot(slot: u8) -> impl Iterator<Item = Self> + Clone {
        (0..FUNCTIONS as u8).map(move |function| Self::new(slot, function))
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "0000:00:{:02x}.{}", self.slot(), self.function())
    }
}

/// All addresses, in order.
fn addresses() -> impl Iterator<Item = Address> {
    (0..=u8::MAX).map(|devfn| Address { devfn })
}

type Device = Arc<Mutex<Box<dyn PciDevice>>>;

/// A root bus, shared by the vCPU threads.
pub struct Bus {
    window: Range<u64>,
    /// The configuration address register (port 0xcf8). Guests serialize its use themselves.
    address: Mutex<u32>,
    tables: RwLock<Tables>,
}

struct Function {
    device: Device,
    /// The guest has read the vendor id, so it finds the device without reading function 0 again.
    seen: AtomicBool,
    /// A placeholder for function 0; see the module header.
    placeholder: bool,
}

impl Function {
    fn new(device: Box<dyn PciDevice>) -> Self {
        let device = Arc::new(Mutex::new(device));
        Self { device, seen: AtomicBool::new(false), placeholder: false }
    }

    fn placeholder() -> Self {
        Self { placeholder: true, ..Self::new(Box::new(HostBridge::default())) }
    }
}

struct Tables {
    /// By [`Address::index`].
    functions: [Option<Function>; SLOTS * FUNCTIONS],
    /// Slots whose function 0 has the multi-function bit.
    shared: [bool; SLOTS],
    /// Decoded BARs, unordered; where two overlap, the first one answers.
    routes: Vec<Route>,
    /// BAR addresses assigned when devices were plugged.
    assigned: HashMap<Address, Vec<Range<u64>>>,
}

struct Route {
    address: Address,
    range: BarRange,
    device: Device,
}

impl Tables {
    fn new() -> Self {
        Self {
            functions: std::array::from_fn(|_| None),
            shared: [false; SLOTS],
            routes: Vec::new(),
            assigned: HashMap::new(),
        }
    }

    fn get(&self, address: Address) -> Option<&Function> {
        self.functions[address.index()].as_ref()
    }

    fn is_free(&self, slot: u8) -> bool {
        Address::of_slot(slot).all(|address| self.get(address).is_none())
    }

    /// The function for the next device, and whether its slot is shared; see the module header.
    fn choose(&self, plug: Plug) -> Option<(Address, bool)> {
        let slots = || 0..SLOTS as u8;
        let mut free = slots().filter(|slot| self.is_free(*slot));
        if plug == Plug::Boot && free.clone().count() > HOT_SLOTS {
            return free.next().map(|slot| (Address::new(slot, 0), false));
        }
        let mut beside = slots()
            .filter(|slot| self.shared[usize::from(*slot)])
            .flat_map(Address::of_slot)
            .filter(|address| self.get(*address).is_none());
        let address = beside.next().or_else(|| free.next().map(|slot| Address::new(slot, 0)));
        address.map(|address| (address, true))
    }

    /// Adds or removes the placeholder of a slot from which a function was just removed.
    fn keep_slot_visible(&mut self, slot: u8) {
        let first = Address::new(slot, 0);
        let mut others = Address::of_slot(slot).skip(1).filter_map(|address| self.get(address));
        let alone = others.clone().next().is_none();
        let unseen = others.any(|other| !other.seen.load(Ordering::Acquire));
        match self.get(first) {
            None if unseen => self.functions[first.index()] = Some(Function::placeholder()),
            Some(function)
                if alone && function.placeholder && !function.seen.load(Ordering::Acquire) =>
            {
                self.functions[first.index()] = None;
            }
            _ => {}
        }
        if self.is_free(slot) {
            self.shared[usize::from(slot)] = false;
        }
    }
}

impl Bus {
    /// A bus with the host bridge in slot 0. 64-bit BARs are placed within the guest-physical
    /// `window`.
    pub fn new(window: Range<u64>) -> Self {
        let mut tables = Tables::new();
        tables.functions[0] = Some(Function::new(Box::new(HostBridge::default())));
        Self { window, address: Mutex::new(0), tables: RwLock::new(tables) }
    }

    /// Plugs a device, assigns addresses to its BARs, and returns its address. Fails if no function
    /// is free or a BAR does not fit into the window.
    pub fn add(&self, mut device: Box<dyn PciDevice>, plug: Plug) -> Result<Address, BusError> {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        let (address, shared) = tables.choose(plug).ok_or(BusError::Full)?;
        let mut taken: Vec<Range<u64>> = tables.assigned.values().flatten().cloned().collect();
        // Also BARs that the guest has moved.
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
        tables.assigned.insert(address, mine);
        tables.functions[address.index()] = Some(Function::new(device));
        tables.shared[usize::from(address.slot())] = shared;
        Ok(address)
    }

    /// Unplugs a device: from now on its function and its BARs read as all ones. The device is
    /// dropped here, or by a vCPU thread that is in one of its methods when that returns. Fails if
    /// there is no device at `address`, or if it is the host bridge or a placeholder.
    pub fn remove(&self, address: Address) -> Result<(), BusError> {
        if address.slot() == 0 {
            return Err(BusError::Reserved { address });
        }
        let function = {
            let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
            let place = &mut tables.functions[address.index()];
            if place.as_ref().is_some_and(|function| function.placeholder) {
                return Err(BusError::Reserved { address });
            }
            let function = place.take().ok_or(BusError::Empty { address })?;
            tables.routes.retain(|r| r.address != address);
            tables.assigned.remove(&address);
            tables.keep_slot_visible(address.slot());
            function
        };
        drop(function);
        Ok(())
    }

    /// The state of all functions. Fails if one cannot be saved.
    pub fn save(&self) -> Result<BusState, BusError> {
        let held: Vec<_> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            addresses()
                .filter_map(|address| Some((address, tables.get(address)?.device.clone())))
                .collect()
        };
        let mut functions = Vec::new();
        for (address, device) in held {
            let state = lock(&device).save();
            let state = state.map_err(|source| BusError::Save { address, source })?;
            functions.push(FunctionState { address: address.devfn, state });
        }
        Ok(BusState { functions })
    }

    /// Loads the state of all functions into a bus with the same devices at the same addresses,
    /// which were plugged with [`Plug::Boot`]. The guest knows these devices.
    pub fn load(&self, state: BusState) -> Result<(), BusError> {
        let BusState { functions } = state;
        let expected: Vec<u8> = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            let used = addresses().filter(|address| tables.get(*address).is_some());
            used.map(|address| address.devfn).collect()
        };
        let found: Vec<u8> = functions.iter().map(|function| function.address).collect();
        if expected != found {
            return Err(BusError::OtherFunctions { found, expected });
        }
        for FunctionState { address, state } in functions {
            let address = Address { devfn: address };
            let Some(device) = self.device(address) else { continue };
            let bars = {
                let mut locked = lock(&device);
                let loaded = locked.load(state);
                loaded.map_err(|source| BusError::Load { address, source })?;
                locked.bars()
            };
            self.route(address, &device, &bars);
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(function) = tables.get(address) {
                function.seen.store(true, Ordering::Release);
            }
        }
        Ok(())
    }

    /// A read from ports 0xcf8 to 0xcff.
    pub fn port_read(&self, port: u16, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(at) = within(port, PORT_ADDRESS, data.len()) {
            let address = lock(&self.address).to_le_bytes();
            data.copy_from_slice(&address[at..at + data.len()]);
        } else if let Some(at) = within(port, PORT_DATA, data.len())
            && let Some((address, register)) = self.selected()
        {
            self.config_read(address, register + at as u16, data);
        }
    }

    /// A write to ports 0xcf8 to 0xcff. The address register takes only 32-bit writes.
    pub fn port_write(&self, port: u16, data: &[u8]) {
        if port == PORT_ADDRESS {
            if let Ok(bytes) = data.try_into() {
                *lock(&self.address) = u32::from_le_bytes(bytes);
            }
        } else if let Some(at) = within(port, PORT_DATA, data.len())
            && let Some((address, register)) = self.selected()
        {
            self.config_write(address, register + at as u16, data);
        }
    }

    /// The function and register selected by the configuration address register.
    fn selected(&self) -> Option<(Address, u16)> {
        let address = *lock(&self.address);
        let here = address & ADDRESS_ENABLE != 0 && address >> 16 & 0xff == 0;
        let devfn = (address >> 8) as u8;
        here.then_some((Address { devfn }, (address & 0xfc) as u16))
    }

    /// A read at byte `offset` of the ECAM range.
    pub fn ecam_read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((address, register)) = ecam_place(offset, data.len()) {
            self.config_read(address, register, data);
        }
    }

    /// A write at byte `offset` of the ECAM range.
    pub fn ecam_write(&self, offset: u64, data: &[u8]) {
        if let Some((address, register)) = ecam_place(offset, data.len()) {
            self.config_write(address, register, data);
        }
    }

    fn config_read(&self, address: Address, offset: u16, data: &mut [u8]) {
        let (device, first_of_several) = {
            let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
            let Some(function) = tables.get(address) else { return };
            if offset == VENDOR_ID {
                function.seen.store(true, Ordering::Release);
            }
            let shared = tables.shared[usize::from(address.slot())];
            (function.device.clone(), shared && address.function() == 0)
        };
        data.fill(0);
        lock(&device).config_read(offset, data);
        if first_of_several
            && let Some(byte) = HEADER_TYPE.checked_sub(offset)
            && let Some(byte) = data.get_mut(usize::from(byte))
        {
            *byte |= MULTI_FUNCTION;
        }
    }

    fn config_write(&self, address: Address, offset: u16, data: &[u8]) {
        let Some(device) = self.device(address) else { return };
        let mut locked = lock(&device);
        let before = locked.bars();
        locked.config_write(offset, data);
        let after = locked.bars();
        if before != after {
            self.route(address, &device, &after);
        }
    }

    /// Updates the decoded ranges of a device, unless it was unplugged meanwhile.
    fn route(&self, address: Address, device: &Device, ranges: &[BarRange]) {
        let mut tables = self.tables.write().unwrap_or_else(PoisonError::into_inner);
        if !tables.get(address).is_some_and(|held| Arc::ptr_eq(&held.device, device)) {
            return;
        }
        tables.routes.retain(|r| r.address != address);
        tables.routes.extend(ranges.iter().map(|range| Route {
            address,
            range: *range,
            device: device.clone(),
        }));
    }

    /// A read of guest-physical memory; `false` if no BAR is decoded there (the VMM then returns
    /// all ones).
    pub fn mmio_read(&self, addr: u64, data: &mut [u8]) -> bool {
        let Some((device, bar, offset)) = self.decode(addr, data.len()) else { return false };
        data.fill(0);
        lock(&device).mmio_read(bar, offset, data);
        true
    }

    /// A write to guest-physical memory; `false` if no BAR is decoded there.
    pub fn mmio_write(&self, addr: u64, data: &[u8]) -> bool {
        let Some((device, bar, offset)) = self.decode(addr, data.len()) else { return false };
        lock(&device).mmio_write(bar, offset, data);
        true
    }

    fn device(&self, address: Address) -> Option<Device> {
        let tables = self.tables.read().unwrap_or_else(PoisonError::into_inner);
        Some(tables.get(address)?.device.clone())
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

/// Offset of an access of `len` bytes at `port` in the 4-byte register at `base`; none if outside.
fn within(port: u16, base: u16, len: usize) -> Option<usize> {
    let at = usize::from(port.checked_sub(base)?);
    (at + len <= 4).then_some(at)
}

fn ecam_place(offset: u64, len: usize) -> Option<(Address, u16)> {
    let register = (offset & 0xfff) as u16;
    let in_register = usize::from(register % 4) + len <= 4;
    let devfn = (offset >> 12) as u8;
    (offset < ECAM_SIZE && in_register).then_some((Address { devfn }, register))
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
