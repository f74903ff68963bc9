//! Generates the service that nacelled offers to the `nacelle` command.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = "../../proto/nacelle/v1/nacelle.proto";
    println!("cargo:rerun-if-changed={proto}");
    tonic_prost_build::configure().btree_map(".").compile_protos(&[proto], &["../../proto"])?;
    Ok(())
}
