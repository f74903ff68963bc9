#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio::rng::Rng;

fuzz_target!(|data: &[u8]| {
    let mut rng = Rng::new().expect("rng");
    nacelle_fuzz::play(data, &mut rng, |_, _| Ok(()));
});
