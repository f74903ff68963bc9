use std::collections::hash_map::Entry;

use proptest::prelude::*;

use super::*;
use crate::{BarRequest, ConfigSpace, Identity};

const WINDOW: Range<u64> = 0x40_0000_0000..0x40_0001_0000;

struct Echo {
    config: ConfigSpace,
    last: Vec<u8>,
}

impl Echo {
    fn boxed(device: u16) -> Box<Self> {
        let mut config = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device,
            subsystem_vendor: 0,
            subsystem: 0,
            revision: 1,
            class: [0xff, 0, 0],
        });
        config.add_bar(0, 0x1000);
        Box::new(Self { config, last: Vec::new() })
    }
}

impl PciDevice for Echo {
    fn bar_requests(&self) -> Vec<BarRequest> {
        self.config.bar_requests().to_vec()
    }

    fn assign_bar(&mut self, bar: u8, addr: u64) {
        self.config.assign_bar(bar, addr);
    }

    fn config_read(&mut self, offset: u16, data: &mut [u8]) {
        self.config.read(offset, data);
    }

    fn config_write(&mut self, offset: u16, data: &[u8]) {
        self.config.write(offset, data);
    }

    fn bars(&self) -> Vec<BarRange> {
        self.config.bars()
    }

    fn mmio_read(&mut self, _bar: u8, _offset: u64, data: &mut [u8]) {
        let len = data.len().min(self.last.len());
        data[..len].copy_from_slice(&self.last[..len]);
    }

    fn mmio_write(&mut self, _bar: u8, _offset: u64, data: &[u8]) {
        self.last = data.to_vec();
    }

    fn save(&mut self) -> Result<serde_json::Value, StateError> {
        if self.last == [0xff] {
            return Err(StateError::Unsaveable { why: "last write was 0xff".to_owned() });
        }
        Ok(serde_json::to_value((self.config.save(), &self.last))?)
    }

    fn load(&mut self, state: serde_json::Value) -> Result<(), StateError> {
        let (config, last): (crate::ConfigState, _) = serde_json::from_value(state)?;
        self.last = last;
        self.config.load(&config)
    }
}

#[test]
fn a_saved_bus_is_loaded_into_one_with_the_same_devices_at_the_same_addresses() {
    let bus = |devices: &[u16]| {
        let bus = Bus::new(WINDOW);
        for device in devices {
            bus.add(Echo::boxed(*device), Plug::Boot).unwrap();
        }
        bus
    };
    let first = bus(&[0x1041, 0x1042]);
    for slot in [1, 2] {
        first.ecam_write(slot << 15 | 4, &[2, 0]);
    }
    // The guest moves a BAR.
    let moved = WINDOW.start + 0x8000;
    first.ecam_write(1 << 15 | 0x10, &(moved as u32).to_le_bytes());
    assert!(first.mmio_write(moved, b"abcd"));
    let text = serde_json::to_string(&first.save().unwrap()).unwrap();

    let second = bus(&[0x1041, 0x1042]);
    second.load(serde_json::from_str(&text).unwrap()).unwrap();
    let mut data = [0; 4];
    assert!(second.mmio_read(moved, &mut data));
    assert_eq!(&data, b"abcd");
    assert!(!second.mmio_read(WINDOW.start, &mut data), "the former BAR is still decoded");

    let load = |bus: &Bus| bus.load(serde_json::from_str(&text).unwrap()).unwrap_err();
    assert!(matches!(load(&bus(&[0x1041])), BusError::OtherFunctions { .. }));
    assert!(matches!(load(&bus(&[0x1041, 0x1043])), BusError::Load { address, .. }
        if address == at(2, 0)));
    assert!(first.mmio_write(moved, &[0xff]));
    assert!(matches!(first.save(), Err(BusError::Save { address, .. }) if address == at(1, 0)));
}

fn port_config(bus: &Bus, address: Address, register: u32) -> u32 {
    let devfn = u32::from(address.devfn);
    bus.port_write(PORT_ADDRESS, &(1 << 31 | devfn << 8 | register).to_le_bytes());
    let mut data = [0; 4];
    bus.port_read(PORT_DATA, &mut data);
    u32::from_le_bytes(data)
}

fn ecam_config(bus: &Bus, address: Address, register: u64) -> u32 {
    let mut data = [0; 4];
    bus.ecam_read(u64::from(address.devfn) << 12 | register, &mut data);
    u32::from_le_bytes(data)
}

fn at(slot: u8, function: u8) -> Address {
    Address::new(slot, function)
}

fn every_address() -> impl Iterator<Item = Address> + Clone {
    (0..SLOTS as u8).flat_map(Address::of_slot)
}

fn is_multi_function(bus: &Bus, address: Address) -> bool {
    ecam_config(bus, address, 0xc) >> 16 & 0x80 != 0
}

#[test]
fn ports_and_ecam_show_the_same_devices() {
    let bus = Bus::new(WINDOW);
    assert_eq!(bus.add(Echo::boxed(0x1042), Plug::Boot).unwrap(), at(1, 0));
    assert_eq!(bus.add(Echo::boxed(0x1043), Plug::Hot).unwrap(), at(2, 0));
    assert_eq!(bus.add(Echo::boxed(0x1044), Plug::Hot).unwrap(), at(2, 1));
    let there = [at(0, 0), at(1, 0), at(2, 0), at(2, 1)];
    for address in every_address() {
        let seen = ecam_config(&bus, address, 0);
        assert_eq!(seen, port_config(&bus, address, 0));
        assert_eq!(seen != u32::MAX, there.contains(&address), "{address}");
    }
    assert_eq!(ecam_config(&bus, at(1, 0), 0), 0x1042_1af4);
    assert_eq!(ecam_config(&bus, at(2, 1), 0), 0x1044_1af4);
    assert_eq!(at(0x1f, 7).to_string(), "0000:00:1f.7");
}

#[test]
fn parts_of_a_register_can_be_read_through_ports() {
    let bus = Bus::new(WINDOW);
    bus.add(Echo::boxed(0x1042), Plug::Boot).unwrap();
    bus.port_write(PORT_ADDRESS, &(1u32 << 31 | 1 << 11).to_le_bytes());
    let mut word = [0; 2];
    bus.port_read(PORT_DATA + 2, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x1042);
    let mut spill = [0; 4];
    bus.port_read(PORT_DATA + 2, &mut spill);
    assert_eq!(spill, [0xff; 4]);
}

#[test]
fn a_bar_answers_only_while_decoded_and_at_its_current_address() {
    let bus = Bus::new(WINDOW);
    bus.add(Echo::boxed(0x1042), Plug::Boot).unwrap();
    let home = WINDOW.start;
    assert!(!bus.mmio_write(home, &[1]));
    bus.ecam_write(1 << 15 | 4, &[2, 0]);
    assert!(bus.mmio_write(home, &[7]));
    let moved = home + 0x8000;
    bus.ecam_write(1 << 15 | 0x10, &(moved as u32).to_le_bytes());
    let mut data = [0];
    assert!(!bus.mmio_read(home, &mut data));
    assert!(bus.mmio_read(moved, &mut data));
    assert_eq!(data, [7]);
    assert!(!bus.mmio_read(moved + 0xfff, &mut [0; 2]));
}

#[test]
fn function_and_addresses_of_an_unplugged_device_are_reused() {
    for plug in [Plug::Boot, Plug::Hot] {
        let bus = Bus::new(WINDOW);
        let address = bus.add(Echo::boxed(0x1042), plug).unwrap();
        bus.ecam_write(1 << 15 | 4, &[2, 0]);
        let bar = ecam_config(&bus, at(1, 0), 0x10);
        bus.remove(address).unwrap();
        assert_eq!(ecam_config(&bus, at(1, 0), 0), u32::MAX);
        assert!(!bus.mmio_read(WINDOW.start, &mut [0]));
        assert!(matches!(bus.remove(address), Err(BusError::Empty { .. })));
        assert_eq!(bus.add(Echo::boxed(0x1041), plug).unwrap(), address);
        assert_eq!(ecam_config(&bus, at(1, 0), 0x10), bar);
    }
}

#[test]
fn a_full_window_and_a_full_bus_are_different_errors() {
    let bus = Bus::new(WINDOW);
    for _ in 0..16 {
        bus.add(Echo::boxed(1), Plug::Boot).unwrap();
    }
    let refused = bus.add(Echo::boxed(1), Plug::Boot);
    assert!(matches!(refused, Err(BusError::NoSpace { size: 0x1000, .. })));
    for plug in [Plug::Boot, Plug::Hot] {
        let bus = Bus::new(0..u64::MAX);
        while bus.add(Echo::boxed(1), plug).is_ok() {}
        assert!(matches!(bus.add(Echo::boxed(1), plug), Err(BusError::Full)));
        let devices = every_address().filter(|address| ecam_config(&bus, *address, 0) != u32::MAX);
        let alone = if plug == Plug::Boot { SLOTS - 1 - HOT_SLOTS } else { 0 };
        assert_eq!(devices.count(), 1 + alone + (SLOTS - 1 - alone) * FUNCTIONS);
        assert!(matches!(bus.remove(at(0, 0)), Err(BusError::Reserved { .. })));
    }
}

#[test]
fn boot_devices_get_slots_of_their_own_and_leave_the_reserved_slots_free() {
    let bus = Bus::new(0..u64::MAX);
    for slot in 1..SLOTS as u8 - HOT_SLOTS as u8 {
        assert_eq!(bus.add(Echo::boxed(1), Plug::Boot).unwrap(), at(slot, 0));
    }
    assert!(!(0..SLOTS as u8).any(|slot| {
        let seen = ecam_config(&bus, at(slot, 0), 0) != u32::MAX;
        seen && is_multi_function(&bus, at(slot, 0))
    }));
    let mut guest = Guest::default();
    assert_eq!(guest.scan(&bus), SLOTS);
    for n in 0..HOT_SLOTS * FUNCTIONS {
        let address = bus.add(Echo::boxed(1), Plug::Hot).unwrap();
        assert_eq!(address.devfn, ((SLOTS - HOT_SLOTS) * FUNCTIONS + n) as u8);
    }
    guest.scan(&bus);
    assert_eq!(guest.known.len(), SLOTS - HOT_SLOTS + HOT_SLOTS * FUNCTIONS);
    assert!(matches!(bus.add(Echo::boxed(1), Plug::Hot), Err(BusError::Full)));
}

#[test]
fn function_0_of_a_shared_slot_has_the_multi_function_bit_for_reads_of_any_width() {
    let bus = Bus::new(WINDOW);
    bus.add(Echo::boxed(1), Plug::Hot).unwrap();
    bus.add(Echo::boxed(2), Plug::Hot).unwrap();
    assert!(is_multi_function(&bus, at(1, 0)) && !is_multi_function(&bus, at(1, 1)));
    let (mut byte, mut word) = ([0], [0; 2]);
    bus.ecam_read(1 << 15 | 0xe, &mut byte);
    bus.ecam_read(1 << 15 | 0xe, &mut word);
    assert_eq!((byte, word), ([0x80], [0x80, 0]));
    bus.ecam_read(1 << 15 | 0xf, &mut byte);
    assert_eq!(byte, [0]);
}

#[test]
fn a_device_not_scanned_yet_is_found_after_function_0_was_removed() {
    let bus = Bus::new(WINDOW);
    let mut guest = Guest::default();
    let first = bus.add(Echo::boxed(1), Plug::Hot).unwrap();
    guest.scan(&bus);
    let second = bus.add(Echo::boxed(2), Plug::Hot).unwrap();
    guest.release(first);
    bus.remove(first).unwrap();
    guest.scan(&bus);
    assert!(guest.known.contains_key(&second));
    // A placeholder that the guest has seen stays and cannot be removed.
    assert!(matches!(bus.remove(first), Err(BusError::Reserved { .. })));
    assert_eq!(bus.add(Echo::boxed(3), Plug::Hot).unwrap(), at(1, 2));
}

#[test]
fn a_placeholder_that_the_guest_has_not_seen_is_removed() {
    let bus = Bus::new(WINDOW);
    let first = bus.add(Echo::boxed(1), Plug::Hot).unwrap();
    let second = bus.add(Echo::boxed(2), Plug::Hot).unwrap();
    bus.remove(first).unwrap();
    assert_eq!(ecam_config(&bus, first, 4), 0, "a placeholder");
    bus.remove(second).unwrap();
    assert_eq!(ecam_config(&bus, first, 0), u32::MAX);
    // No placeholder if the guest knows the remaining devices.
    let mut guest = Guest::default();
    let first = bus.add(Echo::boxed(1), Plug::Hot).unwrap();
    bus.add(Echo::boxed(2), Plug::Hot).unwrap();
    guest.scan(&bus);
    guest.release(first);
    bus.remove(first).unwrap();
    assert_eq!(ecam_config(&bus, first, 0), u32::MAX);
    assert_eq!(bus.add(Echo::boxed(3), Plug::Hot).unwrap(), first);
}

/// Scans as Linux does (`drivers/pci/probe.c`, `pci_scan_slot`): known functions are not read
/// again.
#[derive(Default)]
struct Guest {
    /// Known functions, and whether they had the multi-function bit when they were found.
    known: HashMap<Address, bool>,
}

impl Guest {
    /// Returns the number of vendor ids read.
    fn scan(&mut self, bus: &Bus) -> usize {
        let mut reads = 0;
        for slot in 0..SLOTS as u8 {
            for address in Address::of_slot(slot) {
                if let Entry::Vacant(unknown) = self.known.entry(address) {
                    reads += 1;
                    if ecam_config(bus, address, 0) != u32::MAX {
                        unknown.insert(is_multi_function(bus, address));
                    }
                }
                let first = self.known.get(&at(slot, 0));
                if first != Some(&true) {
                    break;
                }
            }
        }
        reads
    }

    fn release(&mut self, address: Address) {
        self.known.remove(&address);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Plug,
    Scan,
    /// Index into the list of plugged devices.
    Remove(usize),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        4 => Just(Step::Plug),
        3 => Just(Step::Scan),
        4 => any::<usize>().prop_map(Step::Remove),
    ]
}

proptest! {
    /// After any sequence of plugs and removals a scan finds every plugged device, and no address
    /// that the guest still knows is reused.
    #[test]
    fn a_scan_finds_all_plugged_devices(steps in proptest::collection::vec(step(), 0..200)) {
        let bus = Bus::new(0..u64::MAX);
        let mut guest = Guest::default();
        let mut plugged: Vec<Address> = Vec::new();
        guest.scan(&bus);
        for step in steps {
            match step {
                Step::Plug => {
                    let address = bus.add(Echo::boxed(1), Plug::Hot).unwrap();
                    prop_assert!(!guest.known.contains_key(&address), "{address} is still known");
                    plugged.push(address);
                }
                Step::Scan => {
                    guest.scan(&bus);
                    for address in &plugged {
                        prop_assert!(guest.known.contains_key(address), "{address} is not found");
                    }
                }
                Step::Remove(n) if !plugged.is_empty() => {
                    let address = plugged.swap_remove(n % plugged.len());
                    guest.release(address);
                    bus.remove(address).unwrap();
                }
                Step::Remove(_) => {}
            }
        }
        for address in plugged {
            guest.release(address);
            bus.remove(address).unwrap();
        }
        // At most one placeholder per slot is left.
        let left = every_address().filter(|a| ecam_config(&bus, *a, 0) != u32::MAX);
        prop_assert!(left.clone().all(|address| address.function() == 0));
        while bus.add(Echo::boxed(1), Plug::Hot).is_ok() {}
        let all = every_address().filter(|a| ecam_config(&bus, *a, 0) != u32::MAX).count();
        prop_assert_eq!(all, 1 + CAPACITY);
    }
}
