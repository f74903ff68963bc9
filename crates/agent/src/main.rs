//! `nacelle-agent`, `/init` of a guest.

fn main() {
    agent::main();
}
