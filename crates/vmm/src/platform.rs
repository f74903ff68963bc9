//! Dispatches the guest's port and memory-mapped accesses: PCI, power, pvpanic port, serial port.
//!
//! Other addresses read as all ones and ignore writes. Called on vCPU threads; no access waits for
//! a device's worker.

use std::io::{self, Write};
use std::sync::{Arc, Mutex, PoisonError};

use machine::acpi::{
    PANIC_PORT, RESET_PORT, RESET_VALUE, SERIAL_PORT, SERIAL_PORTS, SLEEP_CONTROL_PORT,
    SLEEP_STATUS_PORT, SLEEP_TYPE_S5,
};
use machine::layout::ECAM;
use machine::vcpu::Bus;
use vm_superio::serial::NoEvents;
use vm_superio::{Serial, Trigger};
use vmm_api::ExitReason;

use crate::console::Console;
use crate::exit::ExitState;

/// SLP_EN and SLP_TYP of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0x7;
/// Events of the panic port (QEMU `docs/specs/pvpanic.rst`): the guest has panicked.
const PANICKED: u8 = 1 << 0;
/// Keyboard controller: command port, and the command that resets the CPU. Linux's fallback when an
/// ACPI reset is not available.
const KEYBOARD_PORT: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// One VM's platform.
pub struct Platform {
    pci: Arc<pci::Bus>,
    exit: ExitState,
    serial: Option<Mutex<Uart>>,
}

type Uart = Serial<NoInterrupt, NoEvents, ConsoleWriter>;

impl Platform {
    /// With `serial` an 8250 is emulated, whose output goes to that console.
    pub fn new(pci: Arc<pci::Bus>, exit: ExitState, serial: Option<Console>) -> Self {
        let uart = |console| Mutex::new(Serial::new(NoInterrupt, ConsoleWriter(console)));
        Self { pci, exit, serial: serial.map(uart) }
    }

    fn port_read_byte(&self, port: u16) -> u8 {
        match port {
            PANIC_PORT => PANICKED,
            SLEEP_CONTROL_PORT | SLEEP_STATUS_PORT => 0,
            // Keyboard controller status: output and input buffer empty.
            KEYBOARD_PORT => 0,
            _ => match (&self.serial, serial_register(port)) {
                (Some(uart), Some(register)) => {
                    uart.lock().unwrap_or_else(PoisonError::into_inner).read(register)
                }
                _ => 0xff,
            },
        }
    }

    fn port_write_byte(&self, port: u16, value: u8) {
        match port {
            PANIC_PORT if value & PANICKED != 0 => self.exit.panicked(),
            SLEEP_CONTROL_PORT if value & SLEEP_ENABLE != 0 => {
                if value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK == SLEEP_TYPE_S5 {
                    self.exit.set(ExitReason::Shutdown, "guest powered off");
                }
            }
            RESET_PORT if value == RESET_VALUE => self.exit.set(ExitReason::Reset, "guest reset"),
            KEYBOARD_PORT if value == KEYBOARD_RESET => {
                self.exit.set(ExitReason::Reset, "guest reset through the keyboard controller");
            }
            _ => {
                if let (Some(uart), Some(register)) = (&self.serial, serial_register(port)) {
                    // The writer never fails, and there is no interrupt.
                    let mut uart = uart.lock().unwrap_or_else(PoisonError::into_inner);
                    let _ = uart.write(register, value);
                }
            }
        }
    }
}

fn serial_register(port: u16) -> Option<u8> {
    let register = port.checked_sub(SERIAL_PORT)? as u8;
    (port < SERIAL_PORT + u16::from(SERIAL_PORTS)).then_some(register)
}

impl Bus for Platform {
    fn port_read(&self, port: u16, data: &mut [u8]) {
        match port {
            // PCI configuration space is accessed through ECAM only: one exit per access instead of
            // two. All ones tell Linux that configuration mechanism 1 is absent.
            0xcf8..=0xcff => data.fill(0xff),
            _ => data.fill_with(|| self.port_read_byte(port)),
        }
    }

    fn port_write(&self, port: u16, data: &[u8]) {
        for byte in data {
            self.port_write_byte(port, *byte);
        }
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if ECAM.contains(&address) {
            self.pci.ecam_read(address - ECAM.start, data);
        } else if !self.pci.mmio_read(address, data) {
            data.fill(0xff);
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) {
        if ECAM.contains(&address) {
            self.pci.ecam_write(address - ECAM.start, data);
        } else {
            self.pci.mmio_write(address, data);
        }
    }
}

/// The guest polls the serial port: there is no I/O APIC for its interrupt.
struct NoInterrupt;

impl Trigger for NoInterrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        Ok(())
    }
}

struct ConsoleWriter(Console);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn platform() -> (Platform, ExitState, std::fs::File) {
        let exit = ExitState::new().unwrap();
        let file = tempfile::tempfile().unwrap();
        let console = Console::new(file.try_clone().unwrap()).unwrap();
        let bus = Arc::new(pci::Bus::new(1 << 32..1 << 33));
        (Platform::new(bus, exit.clone(), Some(console)), exit, file)
    }

    fn reason(exit: &ExitState) -> ExitReason {
        exit.report(b"x").reason
    }

    #[test]
    fn sleep_state_5_is_a_power_off_and_other_states_are_not() {
        let (platform, exit, _) = platform();
        for value in [0, SLEEP_TYPE_S5 << 2, SLEEP_ENABLE | 3 << 2] {
            platform.port_write(SLEEP_CONTROL_PORT, &[value]);
            assert!(!exit.is_set(), "{value:#x} powered off");
        }
        platform.port_write(SLEEP_CONTROL_PORT, &[SLEEP_ENABLE | SLEEP_TYPE_S5 << 2]);
        assert_eq!(reason(&exit), ExitReason::Shutdown);
    }

    #[test]
    fn a_reset_through_acpi_or_the_keyboard_controller_ends_the_vm() {
        for (port, value) in [(RESET_PORT, RESET_VALUE), (KEYBOARD_PORT, KEYBOARD_RESET)] {
            let (platform, exit, _) = platform();
            platform.port_write(port, &[0]);
            assert!(!exit.is_set());
            platform.port_write(port, &[value]);
            assert_eq!(reason(&exit), ExitReason::Reset);
        }
    }

    #[test]
    fn the_pvpanic_port_reads_its_events_and_a_write_makes_a_reset_a_panic() {
        let (platform, exit, _) = platform();
        let mut capability = [0];
        platform.port_read(PANIC_PORT, &mut capability);
        assert_eq!(capability, [PANICKED]);
        platform.port_write(PANIC_PORT, &[PANICKED]);
        platform.port_write(RESET_PORT, &[RESET_VALUE]);
        assert_eq!(reason(&exit), ExitReason::Panic);
    }

    #[test]
    fn serial_output_reaches_the_console_from_single_and_string_writes() {
        let (platform, _, file) = platform();
        platform.port_write(SERIAL_PORT, b"a");
        platform.port_write(SERIAL_PORT, b"bc\n");
        assert_eq!(vmm_api::console_ring::read(&file, 0).unwrap().0, b"abc\n");
    }

    #[test]
    fn other_addresses_read_as_all_ones_and_ignore_writes() {
        let (platform, exit, _) = platform();
        let mut data = [0; 4];
        platform.port_read(0xcfc, &mut data);
        assert_eq!(data, [0xff; 4]);
        platform.mmio_read(0xd000_0000, &mut data);
        assert_eq!(data, [0xff; 4]);
        platform.mmio_write(0, &[0; 8]);
        platform.port_write(0x80, &[1]);
        assert!(!exit.is_set());
        platform.mmio_read(ECAM.start, &mut data);
        assert_ne!(data, [0xff; 4], "the host bridge does not answer");
    }
}
