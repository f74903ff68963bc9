//! Manifests and indexes (OCI image-spec v1.1, manifest.md and image-index.md; Docker image
//! manifest version 2, schema 2), as far as a pull needs them.

use std::collections::BTreeMap;

use oci_spec::image::ImageConfiguration;
use serde::{Deserialize, Serialize};

use crate::config::Config;
use crate::digest::Digest;
use crate::error::Error;

pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// For the Accept header.
pub const ACCEPT: &str = "application/vnd.oci.image.index.v1+json, \
     application/vnd.docker.distribution.manifest.list.v2+json, \
     application/vnd.oci.image.manifest.v1+json, \
     application/vnd.docker.distribution.manifest.v2+json";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub annotations: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    pub architecture: String,
    pub os: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub variant: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Manifest {
    pub config: Descriptor,
    pub layers: Vec<Descriptor>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub struct Index {
    pub manifests: Vec<Descriptor>,
}

/// What a manifest endpoint can answer with.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    Manifest(Manifest),
    Index(Index),
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: Option<u64>,
    media_type: Option<String>,
    manifests: Option<serde::de::IgnoredAny>,
}

impl Document {
    /// `what` is for messages; `content_type` decides where the document does not say itself.
    pub fn parse(bytes: &[u8], content_type: &str, what: &str) -> Result<Self, Error> {
        let invalid = |reason: String| Error::InvalidImage { what: what.into(), reason };
        let json = |e: serde_json::Error| invalid(e.to_string());
        let probe: Probe = serde_json::from_slice(bytes).map_err(json)?;
        if probe.schema_version != Some(2) {
            return Err(invalid(match probe.schema_version {
                Some(1) => "it is a schema 1 manifest, which no current registry makes; push the \
                            image again"
                    .into(),
                _ => "it is no manifest of schema version 2".into(),
            }));
        }
        let media_type = probe.media_type.as_deref().unwrap_or(content_type);
        match media_type {
            OCI_INDEX | DOCKER_LIST => {
                Ok(Self::Index(serde_json::from_slice(bytes).map_err(json)?))
            }
            OCI_MANIFEST | DOCKER_MANIFEST => {
                Ok(Self::Manifest(serde_json::from_slice(bytes).map_err(json)?))
            }
            // Servers of plain files know no better type.
            _ if probe.manifests.is_some() => {
                Ok(Self::Index(serde_json::from_slice(bytes).map_err(json)?))
            }
            _ => Ok(Self::Manifest(serde_json::from_slice(bytes).map_err(json)?)),
        }
    }
}

impl Index {
    /// The entry for this machine. Entries without a platform are taken last.
    pub fn select(&self, reference: &str) -> Result<&Descriptor, Error> {
        let fits = |descriptor: &&Descriptor| {
            descriptor
                .platform
                .as_ref()
                .is_some_and(|p| p.os == "linux" && p.architecture == "amd64")
        };
        // x86-64-v2 and later variants may need instructions that the machine lacks.
        let plain = |descriptor: &&Descriptor| {
            let variant = descriptor.platform.as_ref().and_then(|p| p.variant.as_deref());
            matches!(variant, None | Some("" | "v1"))
        };
        let fitting = || self.manifests.iter().filter(fits);
        fitting()
            .find(plain)
            .or_else(|| fitting().next())
            .or_else(|| self.manifests.iter().find(|descriptor| descriptor.platform.is_none()))
            .ok_or_else(|| Error::NoPlatform {
                reference: reference.into(),
                offered: self.offered(),
            })
    }

    fn offered(&self) -> String {
        let mut platforms: Vec<_> = self
            .manifests
            .iter()
            .filter_map(|d| d.platform.as_ref())
            .map(|p| format!("{:.20}/{:.20}", p.os, p.architecture))
            .collect();
        platforms.sort();
        platforms.dedup();
        platforms.truncate(16);
        if platforms.is_empty() { "nothing".into() } else { platforms.join(", ") }
    }
}

impl Manifest {
    /// Checks what can be told before anything is fetched.
    pub fn check(&self, what: &str, config: &Config) -> Result<(), Error> {
        let invalid = |reason: String| Error::InvalidImage { what: what.into(), reason };
        let too_large = |name: &str, got: u64, limit: u64, setting| Error::TooLarge {
            what: format!("{name} of {what}"),
            got,
            limit,
            setting,
        };
        if !CONFIGS.contains(&&self.config.media_type[..]) {
            let media_type: String = self.config.media_type.chars().take(100).collect();
            return Err(invalid(format!(
                "its config is {media_type:?}, so it is no container image"
            )));
        }
        let layers = self.layers.len();
        if layers > config.max_layers {
            let limit = config.max_layers as u64;
            return Err(too_large("the number of layers", layers as u64, limit, "max_layers"));
        }
        let limit = config.max_manifest_bytes;
        if self.config.size > limit {
            return Err(too_large(
                "the configuration",
                self.config.size,
                limit,
                "max_manifest_bytes",
            ));
        }
        let total = self.layers.iter().try_fold(0u64, |sum, layer| sum.checked_add(layer.size));
        let total = total.unwrap_or(u64::MAX);
        let limit = config.max_compressed_bytes;
        if total > limit {
            return Err(too_large("the layers' size", total, limit, "max_compressed_bytes"));
        }
        if let Some(layer) = self.layers.iter().find(|l| l.media_type.contains("+encrypted")) {
            return Err(invalid(format!("its layer {} is encrypted", layer.digest)));
        }
        Ok(())
    }
}

/// Parses an image's configuration; gives the digests of its uncompressed layers, which must be
/// `layers` many.
pub fn parse_config(
    bytes: &[u8],
    layers: usize,
    what: &str,
) -> Result<(ImageConfiguration, Vec<Digest>), Error> {
    let invalid = |reason: String| Error::InvalidImage { what: what.into(), reason };
    let config: ImageConfiguration =
        serde_json::from_slice(bytes).map_err(|e| invalid(format!("its configuration: {e}")))?;
    let platform = (config.os().to_string(), config.architecture().to_string());
    if platform != ("linux".into(), "amd64".into()) {
        return Err(Error::NoPlatform {
            reference: what.into(),
            offered: format!("{:.20}/{:.20}", platform.0, platform.1),
        });
    }
    let diff_ids: Vec<Digest> = config
        .rootfs()
        .diff_ids()
        .iter()
        .map(|id| id.parse())
        .collect::<Result<_, _>>()
        .map_err(|e| invalid(format!("its configuration: {e}")))?;
    if diff_ids.len() != layers {
        return Err(invalid(format!(
            "its manifest lists {layers} layers and its configuration {}",
            diff_ids.len()
        )));
    }
    Ok((config, diff_ids))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(os: &str, arch: &str, variant: Option<&str>, tag: u8) -> Descriptor {
        Descriptor {
            media_type: OCI_MANIFEST.into(),
            digest: Digest::of(&[tag]),
            size: 1,
            platform: Some(Platform {
                os: os.into(),
                architecture: arch.into(),
                variant: variant.map(Into::into),
            }),
            annotations: None,
        }
    }

    #[test]
    fn the_index_entry_of_this_machine_is_taken() {
        let manifests = vec![
            entry("linux", "arm64", None, 0),
            entry("windows", "amd64", None, 1),
            entry("linux", "amd64", Some("v3"), 2),
            entry("linux", "amd64", None, 3),
        ];
        assert_eq!(Index { manifests }.select("x").unwrap().digest, Digest::of(&[3]));
        let manifests =
            vec![entry("linux", "s390x", None, 0), entry("unknown", "unknown", None, 1)];
        let error = Index { manifests }.select("x").unwrap_err().to_string();
        assert!(error.contains("linux/s390x, unknown/unknown"), "{error}");
    }

    #[test]
    fn schema_1_is_refused_with_advice() {
        let error = Document::parse(br#"{"schemaVersion":1}"#, "", "x").unwrap_err().to_string();
        assert!(error.contains("schema 1") && error.contains("push"), "{error}");
    }

    #[test]
    fn digests_in_manifests_are_checked_when_parsed() {
        let bad = br#"{"schemaVersion":2,"config":{"mediaType":"x","digest":"sha256:../../x","size":1},"layers":[]}"#;
        assert!(Document::parse(bad, OCI_MANIFEST, "x").is_err());
    }
}
