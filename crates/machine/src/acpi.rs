//! ACPI 6.5 tables of a hardware-reduced machine (section 4.1): RSDP, XSDT, FADT, MADT, MCFG, DSDT.
//!
//! The DSDT has a PCI Express root bridge with its windows (also for devices plugged later), the
//! ECAM reservation, the pvpanic port (`QEMU0001`), and the optional serial port. No interrupt
//! sources and no I/O APIC: see [`crate::vm`].

use acpi_tables::Aml;
use acpi_tables::aml::{
    self, AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Memory32Fixed, Name, Package,
    Path, ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace as Space, GAS};
use acpi_tables::madt::{EnabledStatus, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::Ram;
use crate::layout::{ACPI, ECAM, LOCAL_APIC, Layout, PCI_WINDOW_32};

/// SLEEP_CONTROL_REG (4.8.3.7): bit 5 SLP_EN, bits 4:2 SLP_TYP.
pub const SLEEP_CONTROL_PORT: u16 = 0x600;
pub const SLEEP_STATUS_PORT: u16 = 0x601;
pub const RESET_PORT: u16 = 0x602;
pub const RESET_VALUE: u8 = 0x01;
/// SLP_TYP of S5 (soft off), as `\_S5` in the DSDT says.
pub const SLEEP_TYPE_S5: u8 = 5;
/// Port of the pvpanic device (QEMU `docs/specs/pvpanic.rst`).
pub const PANIC_PORT: u16 = 0x505;
pub const SERIAL_PORT: u16 = 0x3f8;
pub const SERIAL_PORTS: u8 = 8;

const OEM: [u8; 6] = *b"NACELL";
const OEM_TABLE: [u8; 8] = *b"NACELLVM";
const OEM_REVISION: u32 = 1;
const RSDP_LEN: u64 = 36;
/// ACPI 5.2.9.3: VGA not present, CMOS RTC not present, no PCIe ASPM.
const BOOT_ARCH: u16 = 1 << 2 | 1 << 4 | 1 << 5;

#[derive(Debug, thiserror::Error)]
pub enum AcpiError {
    #[error("ACPI tables of {len} bytes do not fit into {} bytes", ACPI.end - ACPI.start)]
    TooLong { len: u64 },
    #[error("cannot write ACPI tables to guest memory")]
    Memory(#[from] GuestMemoryError),
}

/// Writes all tables; returns the RSDP's address.
pub fn write(ram: &Ram, layout: &Layout, vcpus: u8, serial: bool) -> Result<u64, AcpiError> {
    let mut at = Cursor { next: ACPI.start + RSDP_LEN.next_multiple_of(64), ram };
    let dsdt = at.put(dsdt(layout, serial).as_slice())?;
    let mut xsdt = XSDT::new(OEM, OEM_TABLE, OEM_REVISION);
    for table in [bytes(&fadt(dsdt)), bytes(&madt(vcpus)), bytes(&mcfg())] {
        xsdt.add_entry(at.put(&table)?);
    }
    let xsdt = at.put(&bytes(&xsdt))?;
    ram.write_slice(&bytes(&Rsdp::new(OEM, xsdt)), GuestAddress(ACPI.start))?;
    Ok(ACPI.start)
}

struct Cursor<'a> {
    next: u64,
    ram: &'a Ram,
}

impl Cursor<'_> {
    fn put(&mut self, table: &[u8]) -> Result<u64, AcpiError> {
        let at = self.next;
        let end = at + table.len() as u64;
        if end > ACPI.end {
            return Err(AcpiError::TooLong { len: end - ACPI.start });
        }
        self.ram.write_slice(table, GuestAddress(at))?;
        self.next = end.next_multiple_of(64);
        Ok(at)
    }
}

fn bytes(table: &dyn Aml) -> Vec<u8> {
    let mut bytes = Vec::new();
    table.to_aml_bytes(&mut bytes);
    bytes
}

fn fadt(dsdt: u64) -> acpi_tables::fadt::FADT {
    let port = |port: u16| GAS::new(Space::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM, OEM_TABLE, OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        .flag(Flags::Wbinvd)
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton)
        .flag(Flags::Headless);
    fadt.iapc_boot_arch = BOOT_ARCH.into();
    fadt.reset_reg = port(RESET_PORT);
    fadt.reset_value = RESET_VALUE;
    fadt.sleep_control_reg = port(SLEEP_CONTROL_PORT);
    fadt.sleep_status_reg = port(SLEEP_STATUS_PORT);
    fadt.finalize()
}

/// Every vCPU is listed as enabled: Linux can bring only present CPUs online through sysfs.
/// `maxcpus=` on the kernel command line says how many are online at boot.
fn madt(vcpus: u8) -> MADT {
    let apics = LocalInterruptController::Address(LOCAL_APIC);
    let mut madt = MADT::new(OEM, OEM_TABLE, OEM_REVISION, apics);
    for id in 0..vcpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt
}

fn mcfg() -> MCFG {
    let mut mcfg = MCFG::new(OEM, OEM_TABLE, OEM_REVISION);
    mcfg.add_ecam(ECAM.start, 0, 0, 0);
    mcfg
}

fn dsdt(layout: &Layout, serial: bool) -> Sdt {
    let mut code = Vec::new();
    let s5 = Package::new(vec![&SLEEP_TYPE_S5, &aml::ZERO, &aml::ZERO, &aml::ZERO]);
    Name::new("_S5_".into(), &s5).to_aml_bytes(&mut code);
    system_bus(layout, serial, &mut code);
    let mut dsdt = Sdt::new(*b"DSDT", 36, 6, OEM, OEM_TABLE, OEM_REVISION);
    dsdt.append_slice(&code);
    dsdt
}

fn system_bus(layout: &Layout, serial: bool, code: &mut Vec<u8>) {
    let id = |path: &str, id: &str| Name::new(Path::new(path), &EISAName::new(id));

    let bus = AddressSpace::new_bus_number(0u16, 0);
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        PCI_WINDOW_32.start as u32,
        (PCI_WINDOW_32.end - 1) as u32,
        None,
    );
    let high = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout.pci_window_64.start,
        layout.pci_window_64.end - 1,
        None,
    );
    let windows = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&bus, &low, &high]));
    let (hid, cid) = (id("_HID", "PNP0A08"), id("_CID", "PNP0A03"));
    let (uid, seg) = (Name::new("_UID".into(), &aml::ZERO), Name::new("_SEG".into(), &aml::ZERO));
    let bbn = Name::new("_BBN".into(), &aml::ZERO);
    let pci = Device::new("PCI0".into(), vec![&hid, &cid, &uid, &seg, &bbn, &windows]);

    // Linux uses ECAM only if it is reserved here or in the E820 map.
    let ecam = Memory32Fixed::new(true, ECAM.start as u32, (ECAM.end - ECAM.start) as u32);
    let ecam = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ecam]));
    let board_id = id("_HID", "PNP0C02");
    let board = Device::new("MBRD".into(), vec![&board_id, &ecam]);

    let port = IO::new(PANIC_PORT, PANIC_PORT, 1, 1);
    let port = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&port]));
    let panic_id = Name::new("_HID".into(), &"QEMU0001");
    let present = Name::new("_STA".into(), &0x0fu8);
    let panic = Device::new("PEVT".into(), vec![&panic_id, &present, &port]);

    // Without an interrupt Linux polls the port by timer: enough for debugging a kernel.
    let ports = IO::new(SERIAL_PORT, SERIAL_PORT, 1, SERIAL_PORTS);
    let ports = Name::new("_CRS".into(), &ResourceTemplate::new(vec![&ports]));
    let serial_id = id("_HID", "PNP0501");
    let serial_uid = Name::new("_UID".into(), &aml::ZERO);
    let com1 = Device::new("COM1".into(), vec![&serial_id, &serial_uid, &ports]);

    let mut devices: Vec<&dyn Aml> = vec![&pci, &board, &panic];
    if serial {
        devices.push(&com1);
    }
    Scope::new("\\_SB_".into(), devices).to_aml_bytes(code);
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::allocate;

    fn table(ram: &Ram, at: u64) -> Vec<u8> {
        let len: u32 = ram.read_obj(GuestAddress(at + 4)).unwrap();
        let mut table = vec![0; len as usize];
        ram.read_slice(&mut table, GuestAddress(at)).unwrap();
        table
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    fn long(table: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(table[at..at + 8].try_into().unwrap())
    }

    #[test]
    fn every_table_is_reachable_from_the_rsdp_and_has_a_valid_checksum() {
        for (vcpus, serial) in [(1, false), (64, true)] {
            let layout = Layout::new(64, 40).unwrap();
            let ram = allocate(&layout).unwrap();
            let at = write(&ram, &layout, vcpus, serial).unwrap();
            let mut rsdp = [0; 36];
            ram.read_slice(&mut rsdp, GuestAddress(at)).unwrap();
            assert_eq!(&rsdp[..8], b"RSD PTR ");
            assert_eq!((sum(&rsdp[..20]), sum(&rsdp)), (0, 0));
            let xsdt = table(&ram, long(&rsdp, 24));
            assert_eq!((&xsdt[..4], sum(&xsdt)), (&b"XSDT"[..], 0));
            let mut seen = Vec::new();
            for entry in xsdt[36..].chunks(8) {
                let table = table(&ram, long(entry, 0));
                assert_eq!(sum(&table), 0);
                if &table[..4] == b"FACP" {
                    let dsdt = self::table(&ram, long(&table, 140));
                    assert_eq!((&dsdt[..4], sum(&dsdt)), (&b"DSDT"[..], 0));
                    let com1 = dsdt.windows(4).any(|w| w == b"COM1");
                    assert_eq!(com1, serial);
                }
                if &table[..4] == b"APIC" {
                    assert_eq!(table.len(), 44 + 8 * usize::from(vcpus));
                }
                seen.push(table[..4].to_vec());
            }
            assert_eq!(seen, [b"FACP".to_vec(), b"APIC".to_vec(), b"MCFG".to_vec()]);
        }
    }
}
