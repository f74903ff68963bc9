//! Binary `nacelle-agent`: the agent of pods without a VM, and of tests.

fn main() {
    agent::main();
}
