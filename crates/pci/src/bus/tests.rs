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
}

fn port_config(bus: &Bus, slot: u32, register: u32) -> u32 {
    bus.port_write(PORT_ADDRESS, &(1 << 31 | slot << 11 | register).to_le_bytes());
    let mut data = [0; 4];
    bus.port_read(PORT_DATA, &mut data);
    u32::from_le_bytes(data)
}

fn ecam_config(bus: &Bus, slot: u64, register: u64) -> u32 {
    let mut data = [0; 4];
    bus.ecam_read(slot << 15 | register, &mut data);
    u32::from_le_bytes(data)
}

#[test]
fn both_ways_into_configuration_space_show_the_same_devices() {
    let bus = Bus::new(WINDOW);
    assert_eq!(bus.add(Echo::boxed(0x1042)).unwrap(), 1);
    for slot in 0..32 {
        let seen = ecam_config(&bus, slot, 0);
        assert_eq!(seen, port_config(&bus, slot as u32, 0));
        assert_eq!(seen == u32::MAX, slot > 1);
    }
    assert_eq!(ecam_config(&bus, 1, 0), 0x1042_1af4);
    // Other functions of the same device do not exist.
    assert_eq!(ecam_config(&bus, 1, 0x1000), u32::MAX);
}

#[test]
fn bytes_and_words_of_a_register_can_be_read_by_port() {
    let bus = Bus::new(WINDOW);
    bus.add(Echo::boxed(0x1042)).unwrap();
    bus.port_write(PORT_ADDRESS, &(1u32 << 31 | 1 << 11).to_le_bytes());
    let mut word = [0; 2];
    bus.port_read(PORT_DATA + 2, &mut word);
    assert_eq!(u16::from_le_bytes(word), 0x1042);
    let mut spill = [0; 4];
    bus.port_read(PORT_DATA + 2, &mut spill);
    assert_eq!(spill, [0xff; 4]);
}

#[test]
fn a_bar_answers_only_while_decoded_and_follows_when_moved() {
    let bus = Bus::new(WINDOW);
    bus.add(Echo::boxed(0x1042)).unwrap();
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
fn a_pulled_device_is_gone_and_its_slot_and_addresses_are_reused() {
    let bus = Bus::new(WINDOW);
    let slot = bus.add(Echo::boxed(0x1042)).unwrap();
    bus.ecam_write(1 << 15 | 4, &[2, 0]);
    let bar = ecam_config(&bus, 1, 0x10);
    bus.remove(slot).unwrap();
    assert_eq!(ecam_config(&bus, 1, 0), u32::MAX);
    assert!(!bus.mmio_read(WINDOW.start, &mut [0]));
    assert!(matches!(bus.remove(slot), Err(BusError::Empty { slot: 1 })));
    assert_eq!(bus.add(Echo::boxed(0x1041)).unwrap(), slot);
    assert_eq!(ecam_config(&bus, 1, 0x10), bar);
}

#[test]
fn a_full_window_and_a_full_bus_are_told_apart() {
    let bus = Bus::new(WINDOW);
    for _ in 0..16 {
        bus.add(Echo::boxed(1)).unwrap();
    }
    assert!(matches!(bus.add(Echo::boxed(1)), Err(BusError::NoSpace { size: 0x1000, .. })));
    let bus = Bus::new(0..u64::MAX);
    for _ in 1..SLOTS {
        bus.add(Echo::boxed(1)).unwrap();
    }
    assert!(matches!(bus.add(Echo::boxed(1)), Err(BusError::Full)));
    assert!(matches!(bus.remove(0), Err(BusError::HostBridge { .. })));
}
