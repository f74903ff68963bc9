#![no_main]
//! Requests after the back end has exited, the only ones that the VMM parses itself.

use std::os::unix::net::UnixStream;

use libfuzzer_sys::fuzz_target;
use virtio::fs::Fs;

fuzz_target!(|data: &[u8]| {
    let (ours, theirs) = UnixStream::pair().expect("sockets");
    drop(theirs);
    let mut fs = Fs::new("fuzz", ours.into(), 2).expect("fs");
    nacelle_fuzz::play(data, &mut fs, |_, _| Ok(()));
});
