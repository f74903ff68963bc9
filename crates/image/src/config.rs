//! Settings of the image service, as they stand in the daemon's configuration file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::layer::Limits;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Holds `content/` and `images/`.
    pub root: PathBuf,
    /// Folders with how to reach registries, with colons between them: in each, a folder a
    /// registry with a `hosts.toml` or certificates, as containerd reads them. Looked at anew for
    /// each pull.
    pub config_path: String,
    /// References of images that a kubelet must not remove to make room.
    pub pinned: Vec<String>,
    /// Keep compressed layers after an image is made. Off: a pull of an image that shares layers
    /// with another fetches them again, but the disk holds every file once instead of twice.
    pub keep_layers: bool,
    /// Layers of one image that are fetched at the same time.
    pub parallel_layers: usize,
    pub connect_timeout_seconds: u64,
    /// A registry that sends nothing for this long has failed.
    pub stall_timeout_seconds: u64,
    /// Attempts in a row without a byte of progress before a transfer fails.
    pub attempts: u32,
    /// Of a manifest, index or image configuration: they are held in memory.
    pub max_manifest_bytes: u64,
    pub max_layers: usize,
    /// Of all layers of an image as the registry stores them.
    pub max_compressed_bytes: u64,
    /// Of layers that came in part, kept so that a later pull goes on with them; the oldest go
    /// first.
    pub max_partial_bytes: u64,
    /// Of all files of an image with their holes, and of all its uncompressed layers: a small blob
    /// can expand a thousandfold.
    pub max_unpacked_bytes: u64,
    /// Files and directories of an image, those hidden by later layers included.
    pub max_files: u64,
    /// Memory for names, symlinks and attributes while an image is made.
    pub max_metadata_bytes: u64,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            root: PathBuf::from("/var/lib/nacelle"),
            config_path: "/etc/nacelle/certs.d:/etc/containerd/certs.d".into(),
            pinned: Vec::new(),
            keep_layers: false,
            parallel_layers: 3,
            connect_timeout_seconds: 15,
            stall_timeout_seconds: 30,
            attempts: 5,
            max_manifest_bytes: 4 << 20,
            max_layers: 256,
            max_compressed_bytes: 64 << 30,
            max_partial_bytes: 8 << 30,
            max_unpacked_bytes: 128 << 30,
            max_files: 1_000_000,
            max_metadata_bytes: 512 << 20,
        }
    }
}

impl Config {
    pub(crate) fn limits(&self) -> Limits {
        Limits {
            nodes: self.max_files,
            metadata: self.max_metadata_bytes,
            unpacked: self.max_unpacked_bytes,
        }
    }
}
