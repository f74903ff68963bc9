//! Binary `nacelle-agent`, `/init` of the guest's initramfs.

fn main() {
    agent::main();
}
