#![no_main]

use std::io;
use std::sync::{Arc, OnceLock};

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use pci::{Address, Bus, Doorbells, MsixMessage, Plug, Vectors};
use virtio::mock::memory;
use virtio::pci::VirtioPci;
use virtio::rng::Rng;
use virtio::{Worker, WorkerHandle};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::EventFd;

const WINDOW: u64 = 0x40_0000_0000;
/// Slot 1 in ECAM.
const SLOT: u64 = 1 << 15;

struct Nowhere;

impl Vectors for Nowhere {
    fn program(&self, vector: u16, message: MsixMessage) -> io::Result<()> {
        assert!(vector < 2);
        // A guest can write messages that KVM refuses.
        if message.data & 1 == 0 { Ok(()) } else { Err(io::ErrorKind::InvalidInput.into()) }
    }

    fn trigger(&self, vector: u16) -> io::Result<()> {
        assert!(vector < 2);
        Ok(())
    }
}

impl Doorbells for Nowhere {
    fn bind(&self, address: u64, _event: &EventFd) -> io::Result<()> {
        if address % 8 == 0 { Ok(()) } else { Err(io::ErrorKind::AlreadyExists.into()) }
    }

    fn unbind(&self, _address: u64, _event: &EventFd) -> io::Result<()> {
        Ok(())
    }
}

fn worker() -> WorkerHandle {
    static WORKER: OnceLock<Worker> = OnceLock::new();
    WORKER.get_or_init(|| Worker::spawn("fuzz", || {}).expect("a thread")).handle()
}

fn value(u: &mut Unstructured<'_>) -> Result<[u8; 8]> {
    let wide = match u.int_in_range(0..=3u8)? {
        0 => u.arbitrary::<u64>()?,
        1 => u64::from(u.arbitrary::<u8>()?),
        2 => 0x1000 * u64::from(u.arbitrary::<u8>()?),
        _ => *u.choose(&[0, 1, 3, 11, 15, 0x3000_0000, u64::MAX])?,
    };
    Ok(wide.to_le_bytes())
}

/// The initialization steps of a driver, between which arbitrary accesses happen.
fn bring_up(bus: &Bus) {
    let write = |at: u64, data: &[u8]| bus.mmio_write(WINDOW + at, data);
    bus.ecam_write(SLOT | 4, &[6, 0]);
    write(0x14, &[3]);
    write(0x08, &1u32.to_le_bytes());
    write(0x0c, &1u32.to_le_bytes());
    write(0x14, &[11]);
    write(0x16, &[0, 0]);
    write(0x20, &0x1000u64.to_le_bytes());
    write(0x28, &0x2000u64.to_le_bytes());
    write(0x30, &0x3000u64.to_le_bytes());
    write(0x1c, &[1, 0]);
    write(0x14, &[15]);
}

fn step(bus: &Bus, mem: &GuestMemoryMmap, u: &mut Unstructured<'_>) -> Result<()> {
    let len = *u.choose(&[1usize, 2, 4, 8])?;
    let mut data = value(u)?;
    let data = &mut data[..len];
    let register = u64::from(u.arbitrary::<u8>()?);
    let bar = match u.int_in_range(0..=3u8)? {
        0 => u64::from(u.arbitrary::<u16>()?),
        1 => 0x4000 + register,
        _ => register % 0x40,
    };
    match u.int_in_range(0..=9u8)? {
        0 => bus.ecam_read(SLOT | register, data),
        1 => bus.ecam_write(SLOT | register, data),
        2 => bus.port_write(0xcf8 + u.int_in_range(0..=7u16)?, data),
        3 => bus.port_read(0xcf8 + u.int_in_range(0..=7u16)?, data),
        4 => {
            bus.mmio_read(WINDOW.wrapping_add(bar), data);
        }
        5 => {
            let at = u64::from(u.arbitrary::<u16>()?);
            let _ = mem.write_slice(data, GuestAddress(at));
        }
        6 => bring_up(bus),
        7 => {
            bus.mmio_write(WINDOW + 0x3000, data);
        }
        _ => {
            bus.mmio_write(WINDOW.wrapping_add(bar), data);
        }
    }
    Ok(())
}

/// A bus with one device, which no driver uses.
fn new_bus(mem: &GuestMemoryMmap) -> (Bus, Address) {
    let nowhere = Arc::new(Nowhere);
    let rng = Box::new(Rng::new().expect("rng"));
    let device = VirtioPci::new(rng, mem.clone(), nowhere.clone(), nowhere, worker());
    let bus = Bus::new(WINDOW..WINDOW + (1 << 20));
    let address = bus.add(Box::new(device.expect("device")), Plug::Boot).expect("a free slot");
    (bus, address)
}

/// Replaces a few numbers of a saved state.
fn damage(state: &mut serde_json::Value, u: &mut Unstructured<'_>) -> Result<()> {
    fn numbers<'a>(value: &'a mut serde_json::Value, found: &mut Vec<&'a mut serde_json::Value>) {
        match value {
            serde_json::Value::Array(values) => values.iter_mut().for_each(|v| numbers(v, found)),
            serde_json::Value::Object(values) => {
                values.iter_mut().for_each(|(_, v)| numbers(v, found));
            }
            serde_json::Value::Number(_) => found.push(value),
            _ => {}
        }
    }
    let mut found = Vec::new();
    numbers(state, &mut found);
    for _ in 0..u.int_in_range(0..=3u8)? {
        let index = u.choose_index(found.len())?;
        *found[index] = u64::from_le_bytes(value(u)?).into();
    }
    Ok(())
}

/// Saves the bus and continues with a new one that has loaded the state, damaged or not.
fn save_and_load(
    (bus, address): (Bus, Address),
    mem: &GuestMemoryMmap,
    u: &mut Unstructured<'_>,
) -> Result<(Bus, Address)> {
    // Refused while the device is being reset.
    let Ok(state) = bus.save() else { return Ok((bus, address)) };
    let mut state = serde_json::to_value(state).expect("a state is JSON");
    damage(&mut state, u)?;
    let next = new_bus(mem);
    if let Ok(state) = serde_json::from_value(state) {
        let _ = next.0.load(state);
    }
    Ok(next)
}

fuzz_target!(|data: &[u8]| {
    let mut u = Unstructured::new(data);
    let mem = memory(1 << 16);
    let (mut bus, mut address) = new_bus(&mem);
    for _ in 0..400 {
        if u.is_empty() {
            break;
        }
        if u.ratio(1, 40).unwrap_or(false) {
            match save_and_load((bus, address), &mem, &mut u) {
                Ok(next) => (bus, address) = next,
                Err(_) => return,
            }
        } else if step(&bus, &mem, &mut u).is_err() {
            break;
        }
    }
    bus.remove(address).expect("the device");
});
