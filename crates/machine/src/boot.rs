//! Boot data in guest memory: command line, zero page, E820 map, page tables, GDT. Linux
//! `Documentation/arch/x86/boot.rst`, "64-bit Boot Protocol", and `zero-page.rst`.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params};
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::Ram;
use crate::kernel::Kernel;
use crate::layout::{
    ACPI, CMDLINE, CMDLINE_MAX, ECAM, GDT, HIGH_RAM, LOW_RAM_END, Layout, PAGE_DIRECTORY, PDPT,
    PML4, ZERO_PAGE,
};

const BOOT_FLAG: u16 = 0xaa55;
const HEADER_MAGIC: u32 = u32::from_le_bytes(*b"HdrS");
/// "Undefined" boot loader.
const LOADER_UNDEFINED: u8 = 0xff;
/// Boot protocol 2.15: the version of the header that is created for an ELF kernel.
const PROTOCOL_2_15: u16 = 0x20f;
const LOADED_HIGH: u8 = 1 << 0;

const E820_RAM: u32 = 1;
const E820_RESERVED: u32 = 2;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE_PAGE: u64 = 1 << 7;

/// Selectors required by the 64-bit boot protocol: `__BOOT_CS` and `__BOOT_DS`.
pub const CODE_SELECTOR: u16 = 0x10;
pub const DATA_SELECTOR: u16 = 0x18;
/// Null, unused, 64-bit code, flat data (Intel SDM volume 3, 3.4.5).
pub const GDT_ENTRIES: [u64; 4] = [0, 0, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff];

#[derive(Debug, thiserror::Error)]
pub enum BootError {
    #[error("kernel command line of {len} bytes is longer than {} bytes", CMDLINE_MAX - 1)]
    CmdlineTooLong { len: usize },
    #[error("kernel command line contains a byte that is not printable ASCII: {byte:#04x}")]
    CmdlineByte { byte: u8 },
    #[error("cannot write boot data to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// The contents of the zero page.
#[derive(Debug)]
pub struct Boot<'a> {
    pub kernel: &'a Kernel,
    pub cmdline: &'a str,
    /// Guest-physical address and size, bytes.
    pub initramfs: Option<(u64, u64)>,
    /// Guest-physical address of the RSDP.
    pub rsdp: u64,
}

/// Writes command line, zero page, page tables and GDT.
pub fn write(ram: &Ram, layout: &Layout, boot: &Boot<'_>) -> Result<(), BootError> {
    let cmdline = boot.cmdline.as_bytes();
    if cmdline.len() >= CMDLINE_MAX {
        return Err(BootError::CmdlineTooLong { len: cmdline.len() });
    }
    if let Some(byte) = cmdline.iter().find(|b| !matches!(b, b' '..=b'~')) {
        return Err(BootError::CmdlineByte { byte: *byte });
    }
    ram.write_slice(cmdline, GuestAddress(CMDLINE))?;
    ram.write_obj(0u8, GuestAddress(CMDLINE + cmdline.len() as u64))?;
    ram.write_obj(zero_page(layout, boot), GuestAddress(ZERO_PAGE))?;

    for (n, entry) in GDT_ENTRIES.iter().enumerate() {
        ram.write_obj(*entry, GuestAddress(GDT + 8 * n as u64))?;
    }
    // Identity mapping of the first GiB; the kernel builds its own page tables.
    ram.write_obj(PDPT | PRESENT_WRITABLE, GuestAddress(PML4))?;
    ram.write_obj(PAGE_DIRECTORY | PRESENT_WRITABLE, GuestAddress(PDPT))?;
    for n in 0..512u64 {
        let entry = n << 21 | PRESENT_WRITABLE | LARGE_PAGE;
        ram.write_obj(entry, GuestAddress(PAGE_DIRECTORY + 8 * n))?;
    }
    Ok(())
}

fn zero_page(layout: &Layout, boot: &Boot<'_>) -> boot_params {
    let mut page = boot_params { acpi_rsdp_addr: boot.rsdp, ..Default::default() };
    if let Some(header) = boot.kernel.header {
        page.hdr = header;
    } else {
        page.hdr.boot_flag = BOOT_FLAG;
        page.hdr.header = HEADER_MAGIC;
        page.hdr.version = PROTOCOL_2_15;
        page.hdr.loadflags = LOADED_HIGH;
        page.hdr.kernel_alignment = 0x100_0000;
    }
    page.hdr.type_of_loader = LOADER_UNDEFINED;
    page.hdr.cmd_line_ptr = CMDLINE as u32;
    page.hdr.cmdline_size = boot.cmdline.len() as u32;
    if let Some((address, size)) = boot.initramfs {
        // Below 4 GiB by construction, see `kernel::load_initramfs`.
        page.hdr.ramdisk_image = address as u32;
        page.hdr.ramdisk_size = size as u32;
    }
    let map = memory_map(layout);
    page.e820_table[..map.len()].copy_from_slice(&map);
    page.e820_entries = map.len() as u8;
    page
}

/// The E820 map: RAM and reserved ranges. Linux uses ECAM only if it is reserved.
fn memory_map(layout: &Layout) -> Vec<boot_e820_entry> {
    let entry = |range: &std::ops::Range<u64>, kind| boot_e820_entry {
        addr: range.start,
        size: range.end - range.start,
        r#type: kind,
    };
    let mut map = vec![
        entry(&(0..LOW_RAM_END), E820_RAM),
        entry(&ACPI, E820_RESERVED),
        entry(&(HIGH_RAM..layout.low_ram_end()), E820_RAM),
        entry(&ECAM, E820_RESERVED),
    ];
    map.extend(layout.ram[1..].iter().map(|range| entry(range, E820_RAM)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    fn kernel() -> Kernel {
        let layout = Layout::new(64, 40).unwrap();
        let ram = allocate(&layout).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        let mut image = vec![0u8; 120];
        image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        image[18] = 62;
        image[24..32].copy_from_slice(&(16u64 << 20).to_le_bytes());
        image[32] = 64;
        image[54] = 56;
        image[56] = 1;
        image[64] = 1;
        for (at, value) in [(80, 16u64 << 20), (88, 16 << 20), (96, 120), (104, 0x1000)] {
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        std::io::Write::write_all(&mut file, &image).unwrap();
        crate::kernel::load(&ram, &layout, &mut file).unwrap()
    }

    #[test]
    fn the_e820_map_is_ordered_and_has_all_ram_but_the_legacy_hole() {
        let layout = Layout::new(8192, 46).unwrap();
        let map = memory_map(&layout);
        let mut at = 0;
        let mut total = 0;
        for entry in &map {
            let (addr, size, kind) = (entry.addr, entry.size, entry.r#type);
            assert!(addr >= at, "{addr:#x} overlaps or is out of order");
            at = addr + size;
            total += if kind == E820_RAM { size } else { 0 };
        }
        assert_eq!(total, (8192 << 20) - (HIGH_RAM - LOW_RAM_END));
    }

    #[test]
    fn the_zero_page_points_to_command_line_initramfs_and_acpi() {
        let layout = Layout::new(64, 40).unwrap();
        let ram = allocate(&layout).unwrap();
        let kernel = kernel();
        let boot = Boot {
            kernel: &kernel,
            cmdline: "quiet",
            initramfs: Some((0x300_0000, 4000)),
            rsdp: 0xe_0000,
        };
        write(&ram, &layout, &boot).unwrap();
        let word = |at| ram.read_obj::<u32>(GuestAddress(ZERO_PAGE + at)).unwrap();
        assert_eq!(word(0x070), 0xe_0000);
        assert_eq!(word(0x202).to_le_bytes(), *b"HdrS");
        assert_eq!(word(0x218), 0x300_0000);
        assert_eq!(word(0x21c), 4000);
        assert_eq!(u64::from(word(0x228)), CMDLINE);
        let mut text = [0; 6];
        ram.read_slice(&mut text, GuestAddress(CMDLINE)).unwrap();
        assert_eq!(&text, b"quiet\0");
    }

    #[test]
    fn a_bad_command_line_is_refused() {
        let layout = Layout::new(64, 40).unwrap();
        let ram = allocate(&layout).unwrap();
        let kernel = kernel();
        let attempt = |cmdline: &str| {
            write(&ram, &layout, &Boot { kernel: &kernel, cmdline, initramfs: None, rsdp: 0 })
        };
        let long = "x".repeat(CMDLINE_MAX);
        assert!(matches!(attempt(&long), Err(BootError::CmdlineTooLong { len: CMDLINE_MAX })));
        assert!(matches!(attempt("a\nb"), Err(BootError::CmdlineByte { byte: b'\n' })));
        assert!(attempt(&long[1..]).is_ok());
    }
}
