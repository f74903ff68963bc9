//! Where everything stands in guest-physical memory.
//!
//! ```text
//!  0x0000_0500  GDT                          0xc000_0000  end of low RAM (3 GiB at most)
//!  0x0000_7000  zero page (boot_params)      0xc000_0000  32-bit PCI window, 512 MiB
//!  0x0000_9000  page tables (3 pages)        0xe000_0000  ECAM of bus 0, 1 MiB
//!  0x0002_0000  kernel command line          0xfee0_0000  local APICs
//!  0x000e_0000  ACPI tables (to 1 MiB)       0xfffb_c000  KVM's own 4 pages (identity map, TSS)
//!  0x0010_0000  kernel and up                4 GiB        high RAM
//!  top of low RAM: initramfs                 above RAM    room to grow, if any
//!                                            above that   64-bit PCI window, 64 GiB
//! ```

use std::ops::Range;

pub const PAGE: u64 = 4 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

pub const GDT: u64 = 0x500;
pub const ZERO_PAGE: u64 = 0x7000;
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;
pub const PAGE_DIRECTORY: u64 = 0xb000;
pub const CMDLINE: u64 = 0x2_0000;
/// Linux on x86 keeps 2048 bytes of command line, the terminating zero included.
pub const CMDLINE_MAX: usize = 2048;
/// End of the RAM below the legacy video hole.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables; also where a kernel without the boot protocol's pointer looks for the RSDP.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
pub const HIGH_RAM: u64 = 0x10_0000;

const HOLE: Range<u64> = 3 * GIB..4 * GIB;
/// For 32-bit BARs.
pub const PCI_WINDOW_32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI configuration space of bus 0: 32 devices x 8 functions x 4 KiB.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Four pages that KVM uses on processors without unrestricted guest mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: u64 = 0xfffb_d000;

const PCI_WINDOW_64_SIZE: u64 = 64 * GIB;
/// Linux adds memory by blocks of this size, and by larger ones in a VM with [`LARGE_VM`] of RAM
/// (`probe_memory_block_size`): what begins or ends in the middle of a block could not be used.
const MEMORY_BLOCK: u64 = 128 * MIB;
const LARGE_MEMORY_BLOCK: u64 = 2 * GIB;
const LARGE_VM: u64 = 64 * GIB;
/// The kernel is loaded at 16 MiB, and must be able to unpack its initramfs.
pub const MEMORY_MIN_MIB: u32 = 48;
/// Most vCPUs: APIC ids stay far below 255, where x2APIC-only tables would begin.
pub const VCPUS_MAX: u8 = 64;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error("guest memory of {got} MiB is less than the {MEMORY_MIN_MIB} MiB a kernel needs")]
    TooSmall { got: u32 },
    #[error(
        "guest memory of {got} MiB does not fit: this processor has {bits} guest-physical address \
         bits, enough for {limit} MiB beside the PCI window"
    )]
    TooLarge { got: u32, bits: u8, limit: u64 },
}

// Windows, ECAM, APICs and KVM's pages lie in the hole, in order.
const _: () = {
    assert!(HOLE.start <= PCI_WINDOW_32.start && PCI_WINDOW_32.end <= ECAM.start);
    assert!(ECAM.end <= LOCAL_APIC as u64 && (LOCAL_APIC as u64) < KVM_IDENTITY_MAP);
    assert!(KVM_IDENTITY_MAP + PAGE == KVM_TSS && KVM_TSS + 3 * PAGE <= HOLE.end);
};

/// The parts that depend on the VM's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// RAM below and above the hole, in order; the second is missing in small VMs.
    pub ram: Vec<Range<u64>>,
    /// Where memory can be plugged in later; nothing is there yet.
    pub room: Option<Range<u64>>,
    /// For 64-bit BARs.
    pub pci_window_64: Range<u64>,
}

impl Layout {
    /// Lays out `memory_mib` of RAM on a processor with `address_bits` guest-physical address bits.
    pub fn new(memory_mib: u32, address_bits: u8) -> Result<Self, LayoutError> {
        Self::with_room(memory_mib, memory_mib, address_bits)
    }

    /// The same with room to grow to `max_memory_mib`, as far as there are addresses.
    pub fn with_room(
        memory_mib: u32,
        max_memory_mib: u32,
        address_bits: u8,
    ) -> Result<Self, LayoutError> {
        let got = memory_mib;
        if memory_mib < MEMORY_MIN_MIB {
            return Err(LayoutError::TooSmall { got });
        }
        let end_of_space = 1u64 << address_bits.clamp(36, 52);
        let room = end_of_space - PCI_WINDOW_64_SIZE;
        let size = u64::from(memory_mib) * MIB;
        let (ram, end) = if size <= HOLE.start {
            (std::iter::once(0..size).collect(), HOLE.end)
        } else {
            let end = HOLE.end + (size - HOLE.start);
            (vec![0..HOLE.start, HOLE.end..end], end)
        };
        // Aligned so that a BAR of any size up to the window's can be placed in it.
        if end.next_multiple_of(PCI_WINDOW_64_SIZE) > room {
            let limit = (room - (HOLE.end - HOLE.start)) / MIB;
            return Err(LayoutError::TooLarge { got, bits: address_bits, limit });
        }
        let block = memory_block(end);
        let free = end.next_multiple_of(block)..room;
        let grown = u64::from(max_memory_mib.saturating_sub(memory_mib)) * MIB;
        let grown = grown.next_multiple_of(block);
        let grown = grown.min(free.end.saturating_sub(free.start) / block * block);
        let growth = (grown > 0).then(|| free.start..free.start + grown);
        let end = growth.as_ref().map_or(end, |growth| growth.end);
        let start = end.next_multiple_of(PCI_WINDOW_64_SIZE);
        Ok(Self { ram, room: growth, pci_window_64: start..start + PCI_WINDOW_64_SIZE })
    }

    /// What the guest's kernel adds memory by.
    pub fn memory_block(&self) -> u64 {
        memory_block(self.ram.last().map_or(0, |piece| piece.end))
    }

    /// End of the RAM below 4 GiB.
    pub fn low_ram_end(&self) -> u64 {
        self.ram[0].end
    }
}

fn memory_block(ram_end: u64) -> u64 {
    if ram_end < LARGE_VM { MEMORY_BLOCK } else { LARGE_MEMORY_BLOCK }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_small_vm_has_one_piece_of_ram() {
        let layout = Layout::new(256, 40).unwrap();
        assert_eq!((layout.ram.len(), layout.ram[0].clone()), (1, 0..256 * MIB));
        assert_eq!(layout.pci_window_64, 64 * GIB..128 * GIB);
    }

    #[test]
    fn ram_over_3_gib_goes_on_above_4_gib_and_no_byte_is_lost() {
        for mib in [3071, 3072, 3073, 4096, 70_000] {
            let layout = Layout::new(mib, 46).unwrap();
            let total: u64 = layout.ram.iter().map(|r| r.end - r.start).sum();
            assert_eq!(total, u64::from(mib) * MIB);
            assert!(layout.low_ram_end() <= HOLE.start);
            assert!(layout.pci_window_64.start >= layout.ram.last().unwrap().end);
        }
    }

    #[test]
    fn room_to_grow_lies_between_ram_and_the_pci_window_and_ends_with_the_address_space() {
        assert_eq!(Layout::new(512, 40).unwrap().room, None);
        let small = Layout::with_room(512, 1025, 40).unwrap();
        assert_eq!(small.room, Some(4 * GIB..4 * GIB + 640 * MIB));
        for (now, most) in [(512, 300_000), (4000, 5000), (4001, 4002), (70_000, 80_000)] {
            let layout = Layout::with_room(now, most, 46).unwrap();
            let (room, block) = (layout.room.clone().unwrap(), layout.memory_block());
            assert_eq!((room.start % block, room.end % block), (0, 0));
            assert!(room.start >= layout.ram.last().unwrap().end && room.start >= HOLE.end);
            assert!(room.end - room.start >= u64::from(most - now) * MIB);
            assert!(layout.pci_window_64.start >= room.end);
        }
        let cut = Layout::with_room(512, u32::MAX, 40).unwrap();
        assert_eq!(cut.pci_window_64.end, 1 << 40);
        assert!(cut.room.unwrap().end <= cut.pci_window_64.start);
    }

    #[test]
    fn a_vm_that_does_not_fit_is_refused_with_the_limit() {
        assert_eq!(Layout::new(0, 40), Err(LayoutError::TooSmall { got: 0 }));
        let Err(LayoutError::TooLarge { limit, .. }) = Layout::new(u32::MAX, 40) else {
            panic!("4 PiB fit into 40 address bits");
        };
        assert!(Layout::new((limit as u32 - 64) & !0xffff, 40).is_ok());
    }
}
