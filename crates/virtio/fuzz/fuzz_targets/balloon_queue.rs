#![no_main]
//! Free page reports, also of the rings, in a VM with an unplugged hotplug region.

use std::fs::File;

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::balloon::Balloon;
use virtio::mem::{BLOCK, Mem};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

/// Overlaps the guest's memory of 1 MiB, so that some reports are refused.
const HOTPLUG: u64 = 0;

fuzz_target!(|data: &[u8]| {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(BLOCK).expect("length");
    let ranges = [(GuestAddress(HOTPLUG), BLOCK as usize, Some(FileOffset::new(file, 0)))];
    let mem = GuestMemoryMmap::from_ranges_with_files(ranges).expect("region");
    let hotplug = Mem::new(&mem, HOTPLUG..HOTPLUG + BLOCK).expect("mem").resize_handle();
    let refuses = data.first().is_some_and(|byte| byte & 1 != 0);
    let mut device = Balloon::new(refuses.then_some(hotplug));
    nacelle_fuzz::play(data, &mut device, |guest, u| guest.chain(u, &[]));
});
