#![no_main]

use libfuzzer_sys::fuzz_target;
use virtio::console::Console;

fuzz_target!(|data: &[u8]| {
    let mut console =
        Console::new(Box::new(|bytes| assert!(bytes.len() <= 4096))).expect("console");
    nacelle_fuzz::play(data, &mut console, |_, _| Ok(()));
});
