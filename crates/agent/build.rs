//! Link options of the guest's agent.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    // A static-pie program relocates itself at its start: some 31,000 relative relocations, which
    // write 190 pages, in each helper (one for every container and every exec). Linked for a fixed
    // address it has none. The cost is that its code is not at a random address; heap, stack and
    // mappings still are. Accepted for the only program of a guest, which is memory-safe code and
    // alone in its VM; `nacelle-agent`, which runs on a host, is not linked this way.
    for option in ["-static", "-no-pie"] {
        println!("cargo::rustc-link-arg-bin=nacelle-guest-agent={option}");
    }
}
