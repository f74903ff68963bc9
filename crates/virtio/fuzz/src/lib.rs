//! A hostile driver: turns fuzz input into descriptor tables, ring states, kicks and events of the
//! host, on the mock queues of `virtio`.
//!
//! Besides crashes, two properties are checked: a device becomes idle when the guest does (no input
//! makes its worker busy-loop), and it drains.

use std::sync::Arc;
use std::time::{Duration, Instant};

use arbitrary::{Result, Unstructured};
use virtio::VirtioDevice;
use virtio::mock::{MockInterrupt, MockQueue, Runner, activation, memory, queues};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

/// Size of guest memory, bytes: first the rings, then buffers.
pub const MEMORY: u64 = 1 << 20;
const MAX_STEPS: usize = 200;

pub struct Guest {
    pub mem: Arc<GuestMemoryMmap>,
    pub queues: Vec<MockQueue>,
    pub runner: Runner,
    buffers: u64,
}

impl Guest {
    /// An address: mostly of a buffer, sometimes of a ring or outside memory.
    pub fn address(&self, u: &mut Unstructured<'_>) -> Result<u64> {
        Ok(match u.int_in_range(0..=9u8)? {
            0 => u.arbitrary()?,
            1 => u64::from(u.arbitrary::<u32>()?) % MEMORY,
            2 => MEMORY - u64::from(u.arbitrary::<u8>()?),
            _ => self.buffers + 64 * u64::from(u.arbitrary::<u8>()?),
        })
    }

    pub fn length(&self, u: &mut Unstructured<'_>) -> Result<u32> {
        Ok(match u.int_in_range(0..=9u8)? {
            0 => u.arbitrary()?,
            1 => 0,
            2 => 512 * u32::from(u.arbitrary::<u8>()? % 8),
            _ => u32::from(u.arbitrary::<u8>()?),
        })
    }

    pub fn write(&self, at: u64, bytes: &[u8]) {
        let _ = self.mem.write_slice(bytes, GuestAddress(at));
    }

    fn queue(&mut self, u: &mut Unstructured<'_>) -> Result<&mut MockQueue> {
        let index = u.choose_index(self.queues.len())?;
        Ok(&mut self.queues[index])
    }

    /// Adds a chain that begins with `prefix` and has arbitrary segments after it.
    pub fn chain(&mut self, u: &mut Unstructured<'_>, prefix: &[(u64, u32)]) -> Result<()> {
        let mut readable = prefix.to_vec();
        let mut writable = Vec::new();
        for _ in 0..u.int_in_range(0..=3)? {
            readable.push((self.address(u)?, self.length(u)?));
        }
        for _ in 0..u.int_in_range(0..=3)? {
            writable.push((self.address(u)?, self.length(u)?));
        }
        let table = self.address(u)? % (MEMORY / 2) + MEMORY / 4;
        let indirect = u.arbitrary()?;
        let queue = self.queue(u)?;
        let count = readable.len() + writable.len();
        if count > 0 && count <= queue.room() {
            if indirect {
                queue.add_indirect(table, &readable, &writable);
            } else {
                queue.add(&readable, &writable);
            }
            queue.kick();
        }
        Ok(())
    }

    /// One arbitrary action of a driver.
    fn step(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.int_in_range(0..=9u8)? {
            0 => {
                let (addr, len) = (self.address(u)?, self.length(u)?);
                let (index, flags, next) = (u.arbitrary::<u16>()?, u.arbitrary()?, u.arbitrary()?);
                let queue = self.queue(u)?;
                queue.write_desc(index % 16, addr, len, flags, next);
            }
            1 => {
                let head: u16 = u.arbitrary()?;
                let wild = u.ratio(1, 10)?;
                self.queue(u)?.publish(if wild { head } else { head % 16 });
            }
            2 if u.ratio(1, 8)? => {
                let index = u.arbitrary()?;
                self.queue(u)?.set_avail(index);
            }
            3 => self.queue(u)?.kick(),
            4 => {
                let at = self.address(u)?;
                let bytes: [u8; 48] = u.arbitrary()?;
                self.write(at, &bytes);
            }
            5 => {
                self.runner.settle(4);
            }
            6 => while self.queue(u)?.used().is_some() {},
            _ => self.chain(u, &[])?,
        }
        Ok(())
    }
}

/// Runs the input against a device; `other` does actions of the host and device-specific requests.
pub fn play(
    data: &[u8],
    device: &mut dyn VirtioDevice,
    mut other: impl FnMut(&mut Guest, &mut Unstructured<'_>) -> Result<()>,
) {
    let mut u = Unstructured::new(data);
    let mem = memory(MEMORY as usize);
    let queues = queues(&mem, 0x1000, device.queue_sizes());
    let buffers = queues.last().map_or(0x1000, MockQueue::end);
    let features = device.features() & (u.arbitrary::<u64>().unwrap_or(u64::MAX) | 1 << 32);
    let made = activation(device, &queues, Arc::new(MockInterrupt::default()), features);
    let engine = device.activate(made).expect("a device that activates");
    let runner = Runner::start(engine).expect("an engine that starts");
    let mut guest = Guest { mem, queues, runner, buffers };
    for _ in 0..MAX_STEPS {
        if u.is_empty() {
            break;
        }
        let done = match u.ratio(1, 3) {
            Ok(true) => other(&mut guest, &mut u),
            _ => guest.step(&mut u),
        };
        if done.is_err() {
            break;
        }
    }
    for queue in &guest.queues {
        queue.kick();
    }
    assert!(guest.runner.settle(20_000), "the worker does not become idle");
    guest.runner.engine().drain();
    let end = Instant::now() + Duration::from_secs(5);
    while !guest.runner.engine().drained() {
        assert!(Instant::now() < end, "the device does not drain");
    }
}
