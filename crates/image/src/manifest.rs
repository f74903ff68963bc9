//! Manifests and indexes (OCI image-spec v1.1, manifest.md and image-index.md; Docker image
//! manifest version 2, schema 2), limited to the fields that a pull uses.

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
/// Maximum depth of nested indexes.
pub const MAX_NESTING: usize = 4;
const CONFIGS: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];

/// Value of the Accept header.
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
    #[serde(default)]
    pub architecture: String,
    #[serde(default)]
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

/// A response of the manifest endpoint.
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
    /// `what` is used in messages; `content_type` applies if the document has no mediaType.
    pub fn parse(bytes: &[u8], content_type: &str, what: &str) -> Result<Self, Error> {
        let invalid = |reason: String| Error::InvalidImage { what: what.into(), reason };
        let json = |e: serde_json::Error| invalid(e.to_string());
        let probe: Probe = serde_json::from_slice(bytes).map_err(json)?;
        if probe.schema_version != Some(2) {
            return Err(invalid(match probe.schema_version {
                Some(1) => {
                    "it is a schema 1 manifest, which current registries do not make; push the \
                            image again"
                        .into()
                }
                _ => "it is not a manifest of schema version 2".into(),
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
            // Plain file servers send a generic content type.
            _ if probe.manifests.is_some() => {
                Ok(Self::Index(serde_json::from_slice(bytes).map_err(json)?))
            }
            _ => Ok(Self::Manifest(serde_json::from_slice(bytes).map_err(json)?)),
        }
    }
}

impl Index {
    /// The entry for this machine's platform. Entries without a platform have the lowest rank.
    pub fn select(&self, reference: &str) -> Result<&Descriptor, Error> {
        let rank = |d: &Descriptor| match &d.platform {
            Some(p) => rank(&p.os, &p.architecture, p.variant.as_deref().unwrap_or_default()),
            None => Some(u32::MAX),
        };
        // min_by_key returns the first of equal entries.
        let best =
            self.manifests.iter().filter_map(|d| Some((rank(d)?, d))).min_by_key(|(r, _)| *r);
        best.map(|(_, descriptor)| descriptor).ok_or_else(|| Error::NoPlatform {
            reference: reference.into(),
            offered: self.offered(),
        })
    }

    fn offered(&self) -> String {
        let mut platforms: Vec<_> = self
            .manifests
            .iter()
            .filter_map(|d| d.platform.as_ref())
            .map(|p| {
                let variant = p.variant.as_deref().filter(|variant| !variant.is_empty());
                let variant = variant.map(|variant| format!("/{variant:.20}")).unwrap_or_default();
                format!("{:.20}/{:.20}{variant}", p.os, p.architecture)
            })
            .collect();
        platforms.sort();
        platforms.dedup();
        platforms.truncate(16);
        if platforms.is_empty() { "nothing".into() } else { platforms.join(", ") }
    }
}

/// Rank of a platform on this machine, lowest best, as containerd's platform matcher on amd64:
/// variants up to the CPU's level, then i386 images.
fn rank(os: &str, architecture: &str, variant: &str) -> Option<u32> {
    if !matches!(os, "linux" | "") {
        return None;
    }
    match (architecture, variant) {
        ("amd64" | "x86_64" | "x86-64" | "", "" | "v1") => Some(0),
        ("amd64" | "x86_64" | "x86-64", variant) => {
            let level: u32 = variant.strip_prefix('v')?.parse().ok()?;
            (level <= cpu_level()).then_some(level)
        }
        ("386" | "i386", _) => Some(10),
        _ => None,
    }
}

/// Microarchitecture level of the x86-64 psABI (1 to 4).
fn cpu_level() -> u32 {
    use std::arch::is_x86_feature_detected as has;
    if !(has!("sse4.2") && has!("ssse3") && has!("popcnt") && has!("cmpxchg16b")) {
        1
    } else if !(has!("avx2") && has!("bmi1") && has!("bmi2") && has!("fma") && has!("movbe")) {
        2
    } else if !(has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl")) {
        3
    } else {
        4
    }
}

impl Manifest {
    /// Whether the configuration is not an image configuration. An artifact has none or an empty
    /// one, so its id is the digest of its manifest, and there are no diff_ids to verify its
    /// layers.
    pub fn is_artifact(&self) -> bool {
        !CONFIGS.contains(&&self.config.media_type[..]) || self.config.digest == Digest::of(b"{}")
    }

    /// The image's id; `bytes` is the manifest's encoding.
    pub fn id(&self, bytes: &[u8]) -> Digest {
        if self.is_artifact() { Digest::of(bytes) } else { self.config.digest }
    }

    /// Checks everything that is known before the blobs are fetched.
    pub fn check(&self, what: &str, config: &Config) -> Result<(), Error> {
        let invalid = |reason: String| Error::InvalidImage { what: what.into(), reason };
        let too_large = |name: &str, got: u64, limit: u64, setting| Error::TooLarge {
            what: format!("{name} of {what}"),
            got,
            limit,
            setting,
        };
        if self.is_artifact()
            && let Some(layer) = self.layers.iter().find(|layer| !is_tar(&layer.media_type))
        {
            let config: String = self.config.media_type.chars().take(100).collect();
            let layer: String = layer.media_type.chars().take(100).collect();
            return Err(invalid(format!(
                "its config is {config:?} with a layer of type {layer:?}, so it holds no files"
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

/// Artifact layers are classified by media type only; image layers are detected by content.
fn is_tar(media_type: &str) -> bool {
    [".tar", ".tar+gzip", ".tar.gzip", ".tar+zstd", ".tar.zstd"]
        .iter()
        .any(|end| media_type.ends_with(end))
}

/// Configuration of an artifact.
pub fn empty_config() -> ImageConfiguration {
    read_config(b"{}").expect("defaults are complete")
}

/// Reads an image's configuration. Required fields that are often missing get defaults.
pub fn read_config(bytes: &[u8]) -> Result<ImageConfiguration, serde_json::Error> {
    let mut fields: serde_json::Map<String, serde_json::Value> = serde_json::from_slice(bytes)?;
    for (field, default) in [
        ("os", "linux".into()),
        ("architecture", "amd64".into()),
        ("rootfs", serde_json::json!({"type": "layers", "diff_ids": []})),
    ] {
        let value = fields.entry(field).or_insert(serde_json::Value::Null);
        if value.is_null() || *value == "" {
            *value = default;
        }
    }
    serde_json::from_value(fields.into())
}

/// Parses an image's configuration; returns the diff_ids, of which there must be `layers`.
pub fn parse_config(
    bytes: &[u8],
    layers: usize,
    what: &str,
) -> Result<(ImageConfiguration, Vec<Digest>), Error> {
    let invalid = |reason: String| Error::InvalidImage { what: what.into(), reason };
    let config = read_config(bytes).map_err(|e| invalid(format!("its configuration: {e}")))?;
    let platform = (config.os().to_string(), config.architecture().to_string());
    let variant = config.variant().as_deref().unwrap_or_default();
    if rank(&platform.0, &platform.1, variant).is_none() {
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

/// ChainID of the layers (OCI image-spec v1.1, config.md, "Layer ChainID").
pub fn chain_id(config: &ImageConfiguration) -> String {
    let mut ids = config.rootfs().diff_ids().iter();
    let lowest = ids.next().cloned().unwrap_or_default();
    ids.fold(lowest, |chain, id| Digest::of(format!("{chain} {id}").as_bytes()).to_string())
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
    fn the_index_entry_for_this_machine_is_selected() {
        let manifests = vec![
            entry("linux", "arm64", None, 0),
            entry("windows", "amd64", None, 1),
            entry("linux", "amd64", Some("v3"), 2),
            entry("linux", "amd64", None, 3),
        ];
        assert_eq!(Index { manifests }.select("x").unwrap().digest, Digest::of(&[3]));
        let manifests = vec![
            Descriptor { platform: None, ..entry("", "", None, 9) },
            entry("linux", "386", None, 0),
            entry("linux", "amd64", Some("v1"), 1),
        ];
        assert_eq!(Index { manifests }.select("x").unwrap().digest, Digest::of(&[1]));
        let manifests = vec![
            Descriptor { platform: None, ..entry("", "", None, 9) },
            entry("linux", "amd64", Some("v9"), 2),
            entry("linux", "386", None, 0),
        ];
        assert_eq!(Index { manifests }.select("x").unwrap().digest, Digest::of(&[0]));
        let manifests = vec![
            entry("unknown", "unknown", None, 1),
            Descriptor { platform: None, ..entry("", "", None, 9) },
        ];
        assert_eq!(Index { manifests }.select("x").unwrap().digest, Digest::of(&[9]));
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

    #[test]
    fn a_configuration_may_lack_required_fields() {
        for text in ["{}", r#"{"os":"","architecture":null,"rootfs":null}"#] {
            let (config, ids) = parse_config(text.as_bytes(), 0, "x").unwrap();
            assert_eq!((config.architecture().to_string(), ids.len()), ("amd64".into(), 0));
        }
        assert!(parse_config(br#"{"architecture":"386","os":"linux"}"#, 0, "x").is_ok());
        assert!(parse_config(br#"{"architecture":"arm64"}"#, 0, "x").is_err());
        assert!(parse_config(b"[]", 0, "x").is_err());
        assert!(parse_config(b"{}", 1, "x").is_err());
    }

    #[test]
    fn the_chain_id_follows_the_specification() {
        let ids = [Digest::of(b"a"), Digest::of(b"b")].map(|id| id.to_string());
        let json = serde_json::json!({"rootfs": {"type": "layers", "diff_ids": ids}}).to_string();
        let config = read_config(json.as_bytes()).unwrap();
        let expected = Digest::of(format!("{} {}", ids[0], ids[1]).as_bytes()).to_string();
        assert_eq!(chain_id(&config), expected);
        assert_eq!(chain_id(&empty_config()), "");
    }
}
