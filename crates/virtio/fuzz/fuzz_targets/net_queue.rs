#![no_main]

use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixDatagram;

use libfuzzer_sys::fuzz_target;
use virtio::net::Net;

fuzz_target!(|data: &[u8]| {
    let (tap, wire) = UnixDatagram::pair().expect("socket pair");
    tap.set_nonblocking(true).expect("non-blocking");
    wire.set_nonblocking(true).expect("non-blocking");
    let file = File::from(OwnedFd::from(tap));
    let mut net = Net::over_packets(file, [2, 0, 0, 0, 0, 1], 1500).expect("net");
    let mut packet = vec![0; 70_000];
    nacelle_fuzz::play(data, &mut net, |_, u| {
        match u.int_in_range(0..=2u8)? {
            0 => {
                let _ = wire.recv(&mut packet);
            }
            _ => {
                let len = usize::from(u.arbitrary::<u16>()?);
                let _ = wire.send(&packet[..len]);
            }
        }
        Ok(())
    });
});
