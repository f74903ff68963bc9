//! A type 0 configuration space: bytes, a mask of writable bits, BARs, capabilities (PCI 3.0,
//! chapter 6).

use serde::{Deserialize, Serialize};

use crate::{BarRange, BarRequest, StateError};

/// Bytes of conventional configuration space; devices here have no extended capabilities.
pub const CONFIG_SIZE: usize = 256;
pub const BAR_COUNT: usize = 6;

const COMMAND: usize = 0x04;
const COMMAND_MEMORY: u8 = 1 << 1;
const COMMAND_MASTER: u8 = 1 << 2;
/// INTx disable.
const COMMAND_HIGH_INTX: u8 = 1 << 2;
const STATUS: usize = 0x06;
const STATUS_CAPABILITIES: u8 = 1 << 4;
const CACHE_LINE: usize = 0x0c;
const BARS: usize = 0x10;
const SUBSYSTEM_VENDOR: usize = 0x2c;
const CAPABILITIES: usize = 0x34;
const INTERRUPT_LINE: usize = 0x3c;
/// First byte after the type 0 header.
const FIRST_CAPABILITY: usize = 0x40;
const BAR_64_BIT: u8 = 0b100;
/// Bits of a BAR's lowest byte that are not address bits.
const BAR_FLAGS: u8 = 0xf;

/// Identification fields of the configuration header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Identity {
    pub vendor: u16,
    pub device: u16,
    pub subsystem_vendor: u16,
    pub subsystem: u16,
    pub revision: u8,
    /// Class, subclass, programming interface.
    pub class: [u8; 3],
}

/// Configuration space of one function.
#[derive(Debug, Clone)]
pub struct ConfigSpace {
    bytes: [u8; CONFIG_SIZE],
    /// Mask of bits that the guest may change.
    writable: [u8; CONFIG_SIZE],
    requests: Vec<BarRequest>,
    last_capability: Option<usize>,
    free: usize,
}

/// The bytes of a configuration space.
#[derive(Debug, Serialize, Deserialize)]
#[serde(transparent)]
pub struct ConfigState(Vec<u8>);

impl ConfigSpace {
    pub fn new(identity: Identity) -> Self {
        let mut space = Self {
            bytes: [0; CONFIG_SIZE],
            writable: [0; CONFIG_SIZE],
            requests: Vec::new(),
            last_capability: None,
            free: FIRST_CAPABILITY,
        };
        let Identity { vendor, device, subsystem_vendor, subsystem, revision, class } = identity;
        space.put(0, &vendor.to_le_bytes());
        space.put(2, &device.to_le_bytes());
        space.put(8, &[revision, class[2], class[1], class[0]]);
        space.put(SUBSYSTEM_VENDOR, &subsystem_vendor.to_le_bytes());
        space.put(SUBSYSTEM_VENDOR + 2, &subsystem.to_le_bytes());
        space.writable[COMMAND] = COMMAND_MEMORY | COMMAND_MASTER;
        space.writable[COMMAND + 1] = COMMAND_HIGH_INTX;
        space.writable[CACHE_LINE] = 0xff;
        space.writable[INTERRUPT_LINE] = 0xff;
        space
    }

    fn put(&mut self, at: usize, bytes: &[u8]) {
        self.bytes[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Adds a 64-bit memory BAR in registers `bar` and `bar + 1`.
    ///
    /// # Panics
    /// If the size is not a power of two of at least 16 bytes, or the register is taken.
    pub fn add_bar(&mut self, bar: u8, size: u64) {
        let index = usize::from(bar);
        assert!(index + 1 < BAR_COUNT && size.is_power_of_two() && size >= 16);
        assert!(self.requests.iter().all(|r| r.bar.abs_diff(bar) > 1), "BAR {bar} is taken");
        let at = BARS + 4 * index;
        let mask = !(size - 1);
        self.writable[at..at + 8].copy_from_slice(&mask.to_le_bytes());
        self.bytes[at] = BAR_64_BIT;
        self.requests.push(BarRequest { bar, size });
    }

    /// Adds a capability; `body` follows its id and next pointer, `writable` is a mask over `body`.
    /// Returns the capability's offset.
    ///
    /// # Panics
    /// If there is no space: each device adds a fixed set.
    pub fn add_capability(&mut self, id: u8, body: &[u8], writable: &[u8]) -> usize {
        let at = self.free;
        assert!(at + 2 + body.len() <= CONFIG_SIZE && body.len() == writable.len());
        self.put(at, &[id, 0]);
        self.put(at + 2, body);
        self.writable[at + 2..at + 2 + body.len()].copy_from_slice(writable);
        let link = self.last_capability.map_or(CAPABILITIES, |last| last + 1);
        self.bytes[link] = at as u8;
        self.bytes[STATUS] |= STATUS_CAPABILITIES;
        self.last_capability = Some(at);
        self.free = (at + 2 + body.len()).next_multiple_of(4);
        at
    }

    /// Reads past [`CONFIG_SIZE`] return zero: there are no extended capabilities.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = self.bytes.get(at).copied().unwrap_or(0);
        }
    }

    /// Writes the writable bits; others keep their value.
    pub fn write(&mut self, offset: u16, data: &[u8]) {
        for (at, value) in (usize::from(offset)..).zip(data) {
            if let (Some(byte), Some(mask)) = (self.bytes.get_mut(at), self.writable.get(at)) {
                *byte = *byte & !mask | value & mask;
            }
        }
    }

    /// All registers.
    pub fn save(&self) -> ConfigState {
        let Self { bytes, writable: _, requests: _, last_capability: _, free: _ } = self;
        ConfigState(bytes.to_vec())
    }

    /// Sets the bits that the guest may change. Fails if other bits differ: the state is that of
    /// another device.
    pub fn load(&mut self, ConfigState(saved): &ConfigState) -> Result<(), StateError> {
        if saved.len() != CONFIG_SIZE {
            let what = format!("{} bytes of configuration space", saved.len());
            return Err(StateError::mismatch(what));
        }
        let fixed = |bytes: &[u8], at: usize| bytes[at] & !self.writable[at];
        if let Some(at) = (0..CONFIG_SIZE).find(|&at| fixed(saved, at) != fixed(&self.bytes, at)) {
            return Err(StateError::mismatch(format!("configuration space at {at:#x}")));
        }
        self.write(0, saved);
        Ok(())
    }

    pub fn bar_requests(&self) -> &[BarRequest] {
        &self.requests
    }

    pub fn assign_bar(&mut self, bar: u8, addr: u64) {
        self.write(BARS as u16 + 4 * u16::from(bar), &addr.to_le_bytes());
    }

    /// The ranges of the BARs; empty while memory decoding is off.
    pub fn bars(&self) -> Vec<BarRange> {
        if self.bytes[COMMAND] & COMMAND_MEMORY == 0 {
            return Vec::new();
        }
        let range = |&BarRequest { bar, size }: &BarRequest| {
            let at = BARS + 4 * usize::from(bar);
            let mut addr = [0; 8];
            addr.copy_from_slice(&self.bytes[at..at + 8]);
            addr[0] &= !BAR_FLAGS;
            BarRange { bar, addr: u64::from_le_bytes(addr), size }
        };
        self.requests.iter().map(range).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn space() -> ConfigSpace {
        let mut space = ConfigSpace::new(Identity {
            vendor: 0x1af4,
            device: 0x1042,
            subsystem_vendor: 0x1af4,
            subsystem: 0x40,
            revision: 1,
            class: [1, 0x80, 0],
        });
        space.add_bar(0, 0x8000);
        space
    }

    fn read<const N: usize>(space: &ConfigSpace, offset: u16) -> [u8; N] {
        let mut data = [0; N];
        space.read(offset, &mut data);
        data
    }

    #[test]
    fn identity_is_at_the_offsets_of_the_header() {
        let space = space();
        assert_eq!(u32::from_le_bytes(read(&space, 0)), 0x1042_1af4);
        assert_eq!(u32::from_le_bytes(read(&space, 8)), 0x0180_0001);
        assert_eq!(u32::from_le_bytes(read(&space, 0x2c)), 0x0040_1af4);
        assert_eq!(read::<4>(&space, 0x100), [0; 4]);
    }

    #[test]
    fn identity_cannot_be_written() {
        let mut space = space();
        for offset in (0..0x40).step_by(4) {
            space.write(offset, &[0xff; 4]);
        }
        assert_eq!(u32::from_le_bytes(read(&space, 0)), 0x1042_1af4);
        assert_eq!(u32::from_le_bytes(read(&space, 8)), 0x0180_0001);
    }

    #[test]
    fn a_bar_is_sized_by_writing_ones_and_moved_by_writing_an_address() {
        let mut space = space();
        space.write(0x10, &[0xff; 4]);
        space.write(0x14, &[0xff; 4]);
        assert_eq!(u32::from_le_bytes(read(&space, 0x10)), 0xffff_8004);
        assert_eq!(u32::from_le_bytes(read(&space, 0x14)), 0xffff_ffff);
        space.assign_bar(0, 0x12_3456_8000);
        assert!(space.bars().is_empty());
        space.write(4, &[2, 0]);
        assert_eq!(space.bars(), [BarRange { bar: 0, addr: 0x12_3456_8000, size: 0x8000 }]);
    }

    #[test]
    fn a_saved_space_is_loaded_into_one_with_the_same_fixed_bits_only() {
        let mut first = space();
        first.add_capability(9, &[1, 2], &[0, 0xff]);
        let empty = first.clone();
        first.assign_bar(0, 0x12_3456_8000);
        first.write(4, &[2, 0]);
        first.write(0x43, &[7]);
        let mut second = empty.clone();
        second.load(&first.save()).unwrap();
        assert_eq!(second.bars(), first.bars());
        assert_eq!(read::<256>(&second, 0), read::<256>(&first, 0));

        let mut other = space();
        let error = other.load(&first.save()).unwrap_err().to_string();
        assert!(error.ends_with("configuration space at 0x6"), "{error}");
        let short = ConfigState(vec![0; 255]);
        assert!(matches!(other.load(&short), Err(StateError::Mismatch { .. })));
    }

    #[test]
    fn capabilities_form_a_terminated_list() {
        let mut space = space();
        let first = space.add_capability(9, &[1, 2, 3], &[0; 3]);
        let second = space.add_capability(0x11, &[4; 10], &[0xff; 10]);
        assert_eq!(read::<1>(&space, 6)[0] & 0x10, 0x10);
        assert_eq!(read::<1>(&space, 0x34), [first as u8]);
        assert_eq!(read::<2>(&space, first as u16), [9, second as u8]);
        assert_eq!(read::<2>(&space, second as u16), [0x11, 0]);
        space.write(second as u16, &[0; 4]);
        assert_eq!(read::<4>(&space, second as u16), [0x11, 0, 0, 0]);
    }
}
