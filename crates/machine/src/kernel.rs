//! Loads kernel and initramfs into guest memory.
//!
//! A kernel is an ELF `vmlinux` (its segments go to their physical addresses, its entry point is
//! `startup_64`) or a bzImage (Linux `Documentation/arch/x86/boot.rst`, protocol 2.12 or later,
//! with the 64-bit entry point 0x200 bytes into its protected-mode part).

use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};

use linux_loader::loader::bootparam::setup_header;
use linux_loader::loader::{BzImage, Elf, KernelLoader};
use vm_memory::{Bytes, GuestAddress, ReadVolatile};

use crate::Ram;
use crate::layout::{HIGH_RAM, Layout, PAGE};

/// `xloadflags`: the image has a 64-bit entry point at +0x200.
const XLF_KERNEL_64: u16 = 1 << 0;
/// First protocol version with `xloadflags` and the 64-bit entry point.
const PROTOCOL_2_12: u16 = 0x20c;
const ENTRY_64: u64 = 0x200;
/// Highest end of the initramfs for an ELF kernel; a bzImage has it in its header.
const INITRD_ADDR_MAX: u64 = 0x7fff_ffff;

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    #[error("cannot read the {what}")]
    Read { what: &'static str, source: io::Error },
    #[error(
        "kernel is neither an ELF vmlinux nor a bzImage (it begins with {begins:02x?}); pass the \
         uncompressed vmlinux or the distribution's vmlinuz"
    )]
    Unknown { begins: [u8; 4] },
    #[error("kernel is an ELF file for machine {machine}, not x86-64 (62)")]
    Machine { machine: u16 },
    #[error("kernel's entry point {entry:#x} lies outside its segments")]
    Entry { entry: u64 },
    #[error(
        "kernel has boot protocol {version:#x}; a 64-bit kernel with 0x20c or later is required"
    )]
    Protocol { version: u16 },
    // The loader's error prints its causes itself.
    #[error(
        "kernel image is malformed or does not fit into guest memory ending at {ram_end:#x}: \
         {error}"
    )]
    Load { ram_end: u64, error: linux_loader::loader::Error },
    #[error(
        "kernel needs memory up to {needs:#x}, guest memory ends at {ram_end:#x}; give the VM more \
         memory"
    )]
    TooBig { needs: u64, ram_end: u64 },
    #[error(
        "initramfs of {size} bytes does not fit between the kernel's end {from:#x} and {to:#x}; \
         give the VM more memory"
    )]
    Initramfs { size: u64, from: u64, to: u64 },
}

/// A kernel in guest memory.
#[derive(Debug, Clone)]
pub struct Kernel {
    pub entry: u64,
    /// First address after the memory that the kernel uses before it reads the E820 map.
    pub end: u64,
    /// Header of a bzImage, which is copied into the zero page.
    pub header: Option<setup_header>,
    initrd_max: u64,
}

/// Loads an ELF vmlinux or a bzImage.
pub fn load(ram: &Ram, layout: &Layout, file: &mut File) -> Result<Kernel, KernelError> {
    let read = |source| KernelError::Read { what: "kernel", source };
    let mut begins = [0; 0x210];
    file.rewind().map_err(read)?;
    let len = read_up_to(file, &mut begins).map_err(read)?;
    file.rewind().map_err(read)?;
    let ram_end = layout.low_ram_end();
    let kernel = if begins.starts_with(b"\x7fELF") {
        load_elf(ram, file, u16::from_le_bytes([begins[18], begins[19]]), ram_end)?
    } else if len == begins.len() && &begins[0x202..0x206] == b"HdrS" {
        load_bzimage(ram, file, ram_end)?
    } else {
        let begins = [begins[0], begins[1], begins[2], begins[3]];
        return Err(KernelError::Unknown { begins });
    };
    if kernel.end > ram_end {
        return Err(KernelError::TooBig { needs: kernel.end, ram_end });
    }
    Ok(kernel)
}

fn load_elf(ram: &Ram, file: &mut File, machine: u16, ram_end: u64) -> Result<Kernel, KernelError> {
    const EM_X86_64: u16 = 62;
    if machine != EM_X86_64 {
        return Err(KernelError::Machine { machine });
    }
    let loaded = Elf::load(ram, None, file, Some(GuestAddress(HIGH_RAM)))
        .map_err(|error| KernelError::Load { ram_end, error })?;
    let (entry, end) = (loaded.kernel_load.0, loaded.kernel_end);
    if entry >= end {
        return Err(KernelError::Entry { entry });
    }
    Ok(Kernel { entry, end, header: None, initrd_max: INITRD_ADDR_MAX })
}

fn load_bzimage(ram: &Ram, file: &mut File, ram_end: u64) -> Result<Kernel, KernelError> {
    let read = |source| KernelError::Read { what: "kernel", source };
    // `pref_address`, offset 0x258.
    let mut preferred = [0; 8];
    file.seek(SeekFrom::Start(0x258)).map_err(read)?;
    file.read_exact(&mut preferred).map_err(read)?;
    let at = u64::from_le_bytes(preferred).max(HIGH_RAM);
    if at >= ram_end {
        return Err(KernelError::TooBig { needs: at, ram_end });
    }
    let loaded = BzImage::load(ram, Some(GuestAddress(at)), file, None)
        .map_err(|error| KernelError::Load { ram_end, error })?;
    let header = loaded.setup_header.unwrap_or_default();
    let (version, flags) = (header.version, header.xloadflags);
    if version < PROTOCOL_2_12 || flags & XLF_KERNEL_64 == 0 {
        return Err(KernelError::Protocol { version });
    }
    // `init_size` covers decompression in place and the kernel's own first page tables.
    let end = loaded.kernel_end.max(at.saturating_add(u64::from(header.init_size)));
    let initrd_max = u64::from(header.initrd_addr_max);
    Ok(Kernel { entry: at + ENTRY_64, end, header: Some(header), initrd_max })
}

/// Loads the initramfs as high as the kernel allows; returns its guest-physical address and size in
/// bytes.
pub fn load_initramfs(
    ram: &Ram,
    layout: &Layout,
    kernel: &Kernel,
    file: &mut File,
) -> Result<(u64, u64), KernelError> {
    let read = |source| KernelError::Read { what: "initramfs", source };
    let size = file.seek(SeekFrom::End(0)).map_err(read)?;
    file.rewind().map_err(read)?;
    let to = layout.low_ram_end().min(kernel.initrd_max + 1);
    let from = kernel.end.next_multiple_of(PAGE);
    let at = to.checked_sub(size).map(|at| at & !(PAGE - 1)).filter(|at| *at >= from);
    let Some(at) = at else { return Err(KernelError::Initramfs { size, from, to }) };
    ram.read_exact_volatile_from(GuestAddress(at), file, size as usize)
        .map_err(|e| read(io::Error::other(e)))?;
    Ok((at, size))
}

fn read_up_to(file: &mut File, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = 0;
    while len < buffer.len() {
        match file.read(&mut buffer[len..])? {
            0 => break,
            n => len += n,
        }
    }
    Ok(len)
}

// The loaders need `File` to implement ReadVolatile.
const _: fn() = || {
    fn readable<T: ReadVolatile>() {}
    readable::<File>();
};

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;
    use crate::memory::allocate;

    /// An ELF header with one loadable segment of `size` bytes at `address`.
    fn elf(address: u64, size: u64, machine: u16) -> Vec<u8> {
        let mut image = vec![0u8; 0x1000];
        image[..7].copy_from_slice(b"\x7fELF\x02\x01\x01");
        image[16] = 2;
        image[18..20].copy_from_slice(&machine.to_le_bytes());
        image[24..32].copy_from_slice(&address.to_le_bytes());
        image[32..40].copy_from_slice(&64u64.to_le_bytes());
        image[54..56].copy_from_slice(&56u16.to_le_bytes());
        image[56..58].copy_from_slice(&1u16.to_le_bytes());
        image[64] = 1;
        for (at, value) in [(72, 0x800u64), (80, address), (88, address), (96, 0x100), (104, size)]
        {
            image[at..at + 8].copy_from_slice(&value.to_le_bytes());
        }
        image[0x800] = 0xf4;
        image
    }

    fn file(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file
    }

    fn small() -> (Ram, Layout) {
        let layout = Layout::new(64, 40).unwrap();
        (allocate(&layout).unwrap(), layout)
    }

    #[test]
    fn an_elf_kernel_is_loaded_at_its_physical_address() {
        let (ram, layout) = small();
        let kernel = load(&ram, &layout, &mut file(&elf(16 << 20, 0x2000, 62))).unwrap();
        assert_eq!((kernel.entry, kernel.end), (16 << 20, (16 << 20) + 0x2000));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(16 << 20)).unwrap(), 0xf4);
    }

    #[test]
    fn files_that_are_not_loadable_kernels_are_refused() {
        let (ram, layout) = small();
        let load = |bytes: &[u8]| load(&ram, &layout, &mut file(bytes)).unwrap_err();
        assert!(
            matches!(load(b"#!/bin/sh\n"), KernelError::Unknown { begins } if &begins == b"#!/b")
        );
        assert!(matches!(load(b""), KernelError::Unknown { .. }));
        assert!(matches!(load(&elf(1 << 24, 0x100, 183)), KernelError::Machine { machine: 183 }));
        assert!(matches!(load(&elf(1 << 24, 1 << 30, 62)), KernelError::TooBig { .. }));
        assert!(matches!(load(&elf(1 << 40, 0x100, 62)), KernelError::Load { .. }));
        assert!(matches!(load(&elf(1 << 24, 0x100, 62)[..100]), KernelError::Load { .. }));
    }

    #[test]
    fn an_old_bzimage_is_refused() {
        let (ram, layout) = small();
        let mut image = vec![0u8; 0x1000];
        image[0x1f1] = 1;
        image[0x202..0x206].copy_from_slice(b"HdrS");
        image[0x206..0x208].copy_from_slice(&0x20bu16.to_le_bytes());
        image[0x211] = 1;
        let error = load(&ram, &layout, &mut file(&image)).unwrap_err();
        assert!(matches!(error, KernelError::Protocol { version: 0x20b }), "{error:?}");
    }

    #[test]
    fn the_initramfs_is_loaded_at_the_top_of_low_ram_and_must_fit() {
        let (ram, layout) = small();
        let kernel = load(&ram, &layout, &mut file(&elf(16 << 20, 0x2000, 62))).unwrap();
        let (at, size) = load_initramfs(&ram, &layout, &kernel, &mut file(&[7; 5000])).unwrap();
        assert_eq!((at, size), ((64 << 20) - 8192, 5000));
        assert_eq!(ram.read_obj::<u8>(GuestAddress(at + 4999)).unwrap(), 7);
        let big = tempfile::tempfile().unwrap();
        big.set_len(60 << 20).unwrap();
        let error = load_initramfs(&ram, &layout, &kernel, &mut { big }).unwrap_err();
        assert!(matches!(error, KernelError::Initramfs { .. }));
    }
}
