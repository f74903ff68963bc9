//! Writes an OCI image layout (image-spec 1.1, "OCI Image Layout") of one image.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

/// A layer of a layout.
#[derive(Clone)]
pub struct Layer {
    pub media_type: &'static str,
    /// Compressed according to the media type.
    pub blob: Vec<u8>,
    /// Digest of the uncompressed tar archive, for the image configuration.
    pub diff_id: String,
}

pub const TAR_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
pub const TAR_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";

/// `sha256:<hex>` of some bytes.
pub fn digest(bytes: &[u8]) -> String {
    let hex: String = Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// Writes `blobs`, `index.json` and `oci-layout` into `folder`. `config` is the `config` member of
/// the image configuration.
pub fn write(folder: &Path, layers: &[Layer], config: &Value) -> Result<PathBuf> {
    let blobs = folder.join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let put = |bytes: &[u8], media_type: &str| -> Result<Value> {
        let digest = digest(bytes);
        fs::write(blobs.join(digest.trim_start_matches("sha256:")), bytes)?;
        Ok(json!({"mediaType": media_type, "digest": digest, "size": bytes.len()}))
    };
    let mut described = Vec::new();
    for layer in layers {
        described.push(put(&layer.blob, layer.media_type)?);
    }
    let diff_ids: Vec<&str> = layers.iter().map(|layer| layer.diff_id.as_str()).collect();
    // Builders reject an image whose history has fewer entries than layers.
    let history = vec![json!({"created_by": "nacelle-tests"}); layers.len()];
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": config,
        "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": history,
    });
    let config = put(config.to_string().as_bytes(), "application/vnd.oci.image.config.v1+json")?;
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest =
        json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": described});
    let manifest = put(manifest.to_string().as_bytes(), kind)?;
    let index = json!({"schemaVersion": 2, "manifests": [manifest]});
    fs::write(folder.join("index.json"), index.to_string())?;
    fs::write(folder.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#)?;
    Ok(folder.to_owned())
}

/// Copies an image to a directory in the format of skopeo's `dir` transport: the manifest, and each
/// blob with its digest as name.
pub fn as_dir(layout: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    let index: Value = serde_json::from_slice(&fs::read(layout.join("index.json"))?)?;
    let digest = index["manifests"][0]["digest"].as_str().context("the index names no manifest")?;
    for blob in fs::read_dir(layout.join("blobs/sha256"))? {
        let blob = blob?;
        let is_manifest = blob.file_name() == digest.trim_start_matches("sha256:");
        let name = if is_manifest { "manifest.json".into() } else { blob.file_name() };
        fs::copy(blob.path(), folder.join(name))?;
    }
    fs::write(folder.join("version"), "Directory Transport Version: 1.1\n")?;
    Ok(())
}

/// The layers of an image, and the `config` member of its configuration.
pub fn read(folder: &Path) -> Result<(Vec<Layer>, Value)> {
    let blob = |digest: &Value| -> Result<Vec<u8>> {
        let digest = digest.as_str().context("a digest")?;
        Ok(fs::read(folder.join("blobs/sha256").join(digest.trim_start_matches("sha256:")))?)
    };
    let json = |bytes: Vec<u8>| serde_json::from_slice::<Value>(&bytes);
    let index = json(fs::read(folder.join("index.json"))?)?;
    let manifest = json(blob(&index["manifests"][0]["digest"])?)?;
    let config = json(blob(&manifest["config"]["digest"])?)?;
    let layers = manifest["layers"].as_array().context("layers")?;
    let diff_ids = config["rootfs"]["diff_ids"].as_array().context("diff_ids")?;
    let layer = |(layer, diff_id): (&Value, &Value)| {
        let known = [TAR_GZIP, TAR_ZSTD].into_iter().find(|kind| layer["mediaType"] == *kind);
        let media_type = known.with_context(|| format!("{layer}"))?;
        let diff_id = diff_id.as_str().context("a diff_id")?.to_owned();
        Ok(Layer { media_type, blob: blob(&layer["digest"])?, diff_id })
    };
    let layers = layers.iter().zip(diff_ids).map(layer).collect::<Result<_>>()?;
    Ok((layers, config["config"].clone()))
}
