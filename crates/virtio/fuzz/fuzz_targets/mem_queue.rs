#![no_main]
//! Plug and unplug requests while the host resizes.

use std::fs::File;

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::mem::{BLOCK, Mem};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryMmap};

const REGION: u64 = 1 << 32;
const SIZE: u64 = 80 * BLOCK;
const REQUEST_LEN: u32 = 24;

fuzz_target!(|data: &[u8]| {
    let file = File::from(memfd_create(c"fuzz", MFdFlags::MFD_CLOEXEC).expect("memfd"));
    file.set_len(SIZE).expect("length");
    let ranges = [(GuestAddress(REGION), SIZE as usize, Some(FileOffset::new(file, 0)))];
    let mem = GuestMemoryMmap::from_ranges_with_files(ranges).expect("region");
    let mut device = Mem::new(&mem, REGION..REGION + SIZE).expect("mem");
    let resize = device.resize_handle();
    nacelle_fuzz::play(data, &mut device, |guest, u| {
        if u.ratio(1, 4)? {
            let wanted = u64::from(u.arbitrary::<u16>()?) << 12;
            let _ = resize.request(wanted, u64::from(u.arbitrary::<u16>()?) << 12);
            return Ok(());
        }
        let mut request = [0; REQUEST_LEN as usize];
        let kind = u.arbitrary::<u16>()? % 5;
        let addr = if u.ratio(1, 10)? {
            u.arbitrary()?
        } else {
            REGION + u64::from(u.arbitrary::<u8>()? % 90) * BLOCK
        };
        let count = u.arbitrary::<u16>()? % 90;
        request[..2].copy_from_slice(&kind.to_le_bytes());
        request[8..16].copy_from_slice(&addr.to_le_bytes());
        request[16..18].copy_from_slice(&count.to_le_bytes());
        let at = guest.address(u)?;
        guest.write(at, &request);
        guest.chain(u, &[(at, REQUEST_LEN)])?;
        let state = (resize.plugged(), resize.requested());
        assert!(state.0 <= SIZE && state.1 <= SIZE, "{state:x?}");
        Ok(())
    });
});
