//! Binary `nacelle-guest-agent`, `/init` of the guest's initramfs. As `nacelle-agent`, but linked for
//! a fixed address (`build.rs`).

fn main() {
    agent::main();
}
