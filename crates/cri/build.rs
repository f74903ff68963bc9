//! Generates the CRI's types, servers and clients.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let proto = "../../proto/cri/v1/api.proto";
    println!("cargo:rerun-if-changed={proto}");
    tonic_prost_build::configure()
        // Ordered maps: equal requests are stored and printed alike.
        .btree_map(".")
        // A request is kept as JSON with the pod or container, and given back in verbose status.
        .type_attribute(".", "#[derive(serde::Serialize, serde::Deserialize)]")
        .message_attribute(".", "#[serde(default)]")
        .field_attribute(
            ".runtime.v1.KeyValue.value",
            "#[serde(with = \"crate::convert::process::value\")]",
        )
        .compile_protos(&[proto], &["../../proto"])?;
    Ok(())
}
