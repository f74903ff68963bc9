#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use libfuzzer_sys::fuzz_target;
use nix::sys::memfd::{MFdFlags, memfd_create};
use virtio::blk::Block;

/// Sectors of the disk.
const SECTORS: u64 = 256;

/// One disk for all inputs: creating an io_uring takes longer than most inputs.
static DISK: Mutex<Option<(Block, File)>> = Mutex::new(None);

fn disk() -> (Block, File) {
    let fd: OwnedFd = memfd_create("disk", MFdFlags::empty()).expect("memfd");
    let file = File::from(fd);
    file.set_len(SECTORS * 512).expect("memory");
    (Block::new(file.try_clone().expect("dup"), "fuzz", false).expect("disk"), file)
}

fuzz_target!(|data: &[u8]| {
    let mut kept = DISK.lock().expect("one thread");
    let (block, file) = kept.get_or_insert_with(disk);
    nacelle_fuzz::play(data, block, |guest, u| {
        // Mostly valid headers.
        let kind = *u.choose(&[0u32, 1, 4, 8, 11, 13, 99])?;
        let sector = match u.int_in_range(0..=3u8)? {
            0 => u.arbitrary::<u64>()?,
            _ => u.arbitrary::<u64>()? % (SECTORS + 2),
        };
        let at = guest.address(u)?;
        let mut header = [0; 16];
        header[..4].copy_from_slice(&kind.to_le_bytes());
        header[8..].copy_from_slice(&sector.to_le_bytes());
        guest.write(at, &header);
        guest.chain(u, &[(at, 16)])
    });
    assert_eq!(file.metadata().expect("memfd").len(), SECTORS * 512, "the disk changed its size");
});
