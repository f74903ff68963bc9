#![no_main]
//! A back end with arbitrary replies, and a driver that pauses and resets.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::time::Duration;

use arbitrary::{Result, Unstructured};
use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::VirtioDevice;
use virtio::fs::Fs;
use virtio::mock::{MockInterrupt, MockQueue, Runner, activation, queues};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const MEMORY: usize = 1 << 18;

fn memory() -> Arc<GuestMemoryMmap> {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(MEMORY as u64).expect("memfd");
    let range = (GuestAddress(0), MEMORY, Some(FileOffset::new(file, 0)));
    Arc::new(GuestMemoryMmap::from_ranges_with_files([range]).expect("memory"))
}

fn start(fs: &mut Fs, queues: &[MockQueue]) -> Runner {
    let made = activation(fs, queues, Arc::new(MockInterrupt::default()), fs.features());
    Runner::start(fs.activate(made).expect("an engine")).expect("an engine that starts")
}

/// A reply, mostly with a valid header.
fn reply(u: &mut Unstructured<'_>) -> Result<Vec<u8>> {
    let request = *u.choose(&[1u32, 11, 11, 3, 0])?;
    let flags = if u.ratio(9, 10)? { 5u32 } else { u.arbitrary()? };
    let size = if u.ratio(9, 10)? { 8u32 } else { u.arbitrary()? };
    let payload = match u.int_in_range(0..=3u8)? {
        0 => u.arbitrary::<u64>()?,
        1 => u64::from(u.arbitrary::<u8>()? % 3) | u64::from(u.arbitrary::<u16>()?) << 32,
        _ => u64::MAX,
    };
    let mut bytes = Vec::new();
    for word in [request, flags, size] {
        bytes.extend(word.to_ne_bytes());
    }
    bytes.extend(payload.to_ne_bytes());
    bytes.truncate(u.int_in_range(1..=20)?.max(if u.ratio(9, 10)? { 20 } else { 1 }));
    Ok(bytes)
}

fn play(u: &mut Unstructured<'_>) -> Result<()> {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    theirs.set_nonblocking(true).expect("a socket");
    let mut backend = Some(theirs);
    let mem = memory();
    let mut fs = Fs::new("fuzz", ours.into(), 2).expect("fs");
    let mut rings = queues(&mem, 0x1000, fs.queue_sizes());
    let mut runner = start(&mut fs, &rings);
    for _ in 0..100 {
        if u.is_empty() {
            break;
        }
        match u.int_in_range(0..=9u8)? {
            0 => runner.engine().drain(),
            1 => {
                runner.engine().drained();
            }
            2 => runner.resume(),
            3 if u.ratio(1, 8)? => backend = None,
            4 => {
                drop(runner);
                rings = queues(&mem, 0x1000, fs.queue_sizes());
                runner = start(&mut fs, &rings);
            }
            5 if rings[1].room() > 2 => {
                rings[1].add(&[(0x20000, 40)], &[(0x30000, u.int_in_range(1..=64)?)]);
                rings[1].kick();
            }
            _ => {
                if let Some(socket) = &mut backend {
                    let _ = socket.read(&mut [0; 4096]);
                    let _ = socket.write(&reply(u)?);
                }
            }
        }
        runner.round(Duration::ZERO);
    }
    drop(backend);
    runner.engine().drain();
    assert!(runner.engine().drained(), "a dead backend holds up a reset");
    runner.resume();
    assert!(runner.settle(1000), "the worker never comes to rest");
    Ok(())
}

fuzz_target!(|data: &[u8]| {
    let _ = play(&mut Unstructured::new(data));
});
