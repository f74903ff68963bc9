//! The guest-physical memory layout.
//!
//! ```text
//!  0x0000_0500  GDT                          0xc000_0000  end of low RAM (3 GiB at most)
//!  0x0000_7000  zero page (boot_params)      0xc000_0000  32-bit PCI window, 512 MiB
//!  0x0000_9000  page tables (3 pages)        0xe000_0000  ECAM of bus 0, 1 MiB
//!  0x0002_0000  kernel command line          0xfee0_0000  local APICs
//!  0x000e_0000  ACPI tables (to 1 MiB)       0xfffb_c000  KVM's own 4 pages (identity map, TSS)
//!  0x0010_0000  kernel and up                4 GiB        high RAM
//!  top of low RAM: initramfs                 above RAM    hotplug region, if any
//!                                            above that   64-bit PCI window, 64 GiB
//! ```

use std::ops::Range;

pub const PAGE: u64 = 4 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

/// Guest-physical addresses of boot data.
pub const GDT: u64 = 0x500;
pub const ZERO_PAGE: u64 = 0x7000;
pub const PML4: u64 = 0x9000;
pub const PDPT: u64 = 0xa000;
pub const PAGE_DIRECTORY: u64 = 0xb000;
pub const CMDLINE: u64 = 0x2_0000;
/// `COMMAND_LINE_SIZE` of Linux on x86, bytes, with the terminating zero.
pub const CMDLINE_MAX: usize = 2048;
/// End of the RAM below the legacy video hole.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// ACPI tables. A kernel also searches the RSDP here if the zero page does not have its address.
pub const ACPI: Range<u64> = 0xe_0000..0x10_0000;
/// Start of the RAM above the legacy video hole and the ACPI tables.
pub const HIGH_RAM: u64 = 0x10_0000;

const HOLE: Range<u64> = 3 * GIB..4 * GIB;
/// For 32-bit BARs.
pub const PCI_WINDOW_32: Range<u64> = 0xc000_0000..0xe000_0000;
/// PCI configuration space of bus 0: 32 devices x 8 functions x 4 KiB.
pub const ECAM: Range<u64> = 0xe000_0000..0xe010_0000;
/// Base address of the local APICs (reset value of IA32_APIC_BASE).
pub const LOCAL_APIC: u32 = 0xfee0_0000;
/// Four pages that KVM uses on processors without unrestricted guest mode.
pub const KVM_IDENTITY_MAP: u64 = 0xfffb_c000;
pub const KVM_TSS: u64 = 0xfffb_d000;

const PCI_WINDOW_64_SIZE: u64 = 64 * GIB;
/// Linux adds memory in blocks of this size, and of [`LARGE_MEMORY_BLOCK`] in a VM with
/// [`LARGE_VM`] of RAM (`probe_memory_block_size`). Partial blocks cannot be used.
const MEMORY_BLOCK: u64 = 128 * MIB;
const LARGE_MEMORY_BLOCK: u64 = 2 * GIB;
const LARGE_VM: u64 = 64 * GIB;
/// The kernel is loaded at 16 MiB, and needs memory to unpack its initramfs.
pub const MEMORY_MIN_MIB: u32 = 48;
/// Most vCPUs: with APIC ids below 255 no x2APIC entries are needed in the MADT.
pub const VCPUS_MAX: u8 = 64;

#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum LayoutError {
    #[error("guest memory of {got} MiB is less than the {MEMORY_MIN_MIB} MiB a kernel needs")]
    TooSmall { got: u32 },
    #[error(
        "guest memory of {got} MiB is too large: this processor has {bits} guest-physical address \
         bits, enough for {limit} MiB and the PCI window"
    )]
    TooLarge { got: u32, bits: u8, limit: u64 },
}

// PCI window, ECAM, local APICs and KVM's pages lie in the hole, in this order.
const _: () = {
    assert!(HOLE.start <= PCI_WINDOW_32.start && PCI_WINDOW_32.end <= ECAM.start);
    assert!(ECAM.end <= LOCAL_APIC as u64 && (LOCAL_APIC as u64) < KVM_IDENTITY_MAP);
    assert!(KVM_IDENTITY_MAP + PAGE == KVM_TSS && KVM_TSS + 3 * PAGE <= HOLE.end);
};

/// The parts of the layout that depend on the VM's size.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layout {
    /// RAM below and above the hole, in order; VMs of up to 3 GiB have only the first.
    pub ram: Vec<Range<u64>>,
    /// Region of the memory device, in which memory can be plugged later.
    pub hotplug: Option<Range<u64>>,
    /// For 64-bit BARs.
    pub pci_window_64: Range<u64>,
}

impl Layout {
    /// Lays out `memory_mib` of RAM on a processor with `address_bits` guest-physical address bits.
    /// Fails if that is less than [`MEMORY_MIN_MIB`] or does not fit into the address space.
    pub fn new(memory_mib: u32, address_bits: u8) -> Result<Self, LayoutError> {
        Self::with_hotplug(memory_mib, memory_mib, address_bits)
    }

    /// Like [`Self::new`], with a hotplug region for `max_memory_mib` in all, limited by the
    /// address space.
    pub fn with_hotplug(
        memory_mib: u32,
        max_memory_mib: u32,
        address_bits: u8,
    ) -> Result<Self, LayoutError> {
        let got = memory_mib;
        if memory_mib < MEMORY_MIN_MIB {
            return Err(LayoutError::TooSmall { got });
        }
        let end_of_space = 1u64 << address_bits.clamp(36, 52);
        let ram_limit = end_of_space - PCI_WINDOW_64_SIZE;
        let size = u64::from(memory_mib) * MIB;
        let (ram, end) = if size <= HOLE.start {
            (std::iter::once(0..size).collect(), HOLE.end)
        } else {
            let end = HOLE.end + (size - HOLE.start);
            (vec![0..HOLE.start, HOLE.end..end], end)
        };
        // Aligned so that a BAR of any size up to the window's fits into it.
        if end.next_multiple_of(PCI_WINDOW_64_SIZE) > ram_limit {
            let limit = (ram_limit - (HOLE.end - HOLE.start)) / MIB;
            return Err(LayoutError::TooLarge { got, bits: address_bits, limit });
        }
        let block = memory_block(end);
        let free = end.next_multiple_of(block)..ram_limit;
        let grown = u64::from(max_memory_mib.saturating_sub(memory_mib)) * MIB;
        let grown = grown.next_multiple_of(block);
        let grown = grown.min(free.end.saturating_sub(free.start) / block * block);
        let growth = (grown > 0).then(|| free.start..free.start + grown);
        let end = growth.as_ref().map_or(end, |growth| growth.end);
        let start = end.next_multiple_of(PCI_WINDOW_64_SIZE);
        Ok(Self { ram, hotplug: growth, pci_window_64: start..start + PCI_WINDOW_64_SIZE })
    }

    /// Unit in which the guest's kernel adds memory, bytes.
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
    fn ram_over_3_gib_continues_above_4_gib_without_loss() {
        for mib in [3071, 3072, 3073, 4096, 70_000] {
            let layout = Layout::new(mib, 46).unwrap();
            let total: u64 = layout.ram.iter().map(|r| r.end - r.start).sum();
            assert_eq!(total, u64::from(mib) * MIB);
            assert!(layout.low_ram_end() <= HOLE.start);
            assert!(layout.pci_window_64.start >= layout.ram.last().unwrap().end);
        }
    }

    #[test]
    fn the_hotplug_region_lies_between_ram_and_the_pci_window_and_within_the_address_space() {
        assert_eq!(Layout::new(512, 40).unwrap().hotplug, None);
        let small = Layout::with_hotplug(512, 1025, 40).unwrap();
        assert_eq!(small.hotplug, Some(4 * GIB..4 * GIB + 640 * MIB));
        for (now, most) in [(512, 300_000), (4000, 5000), (4001, 4002), (70_000, 80_000)] {
            let layout = Layout::with_hotplug(now, most, 46).unwrap();
            let (hotplug, block) = (layout.hotplug.clone().unwrap(), layout.memory_block());
            assert_eq!((hotplug.start % block, hotplug.end % block), (0, 0));
            assert!(hotplug.start >= layout.ram.last().unwrap().end && hotplug.start >= HOLE.end);
            assert!(hotplug.end - hotplug.start >= u64::from(most - now) * MIB);
            assert!(layout.pci_window_64.start >= hotplug.end);
        }
        let cut = Layout::with_hotplug(512, u32::MAX, 40).unwrap();
        assert_eq!(cut.pci_window_64.end, 1 << 40);
        assert!(cut.hotplug.unwrap().end <= cut.pci_window_64.start);
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
