#![no_main]
//! Reports of free pages, of the rings too, in a VM that has plugged nothing of its room.

use std::fs::File;

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::balloon::Balloon;
use virtio::mem::{BLOCK, Mem};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// In the midst of the guest's memory of 1 MiB, so that some reports are refused.
const ROOM: u64 = 0;

fuzz_target!(|data: &[u8]| {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(BLOCK).expect("length");
    let ranges = [(GuestAddress(ROOM), BLOCK as usize, Some(FileOffset::new(file, 0)))];
    let mem = GuestMemoryMmap::from_ranges_with_files(ranges).expect("region");
    let room = Mem::new(&mem, ROOM..ROOM + BLOCK).expect("mem").resize();
    let refuses = data.first().is_some_and(|byte| byte & 1 != 0);
    let mut device = Balloon::new(refuses.then_some(room));
    nacelle_fuzz::play(data, &mut device, |guest, u| guest.chain(u, &[]));
});
