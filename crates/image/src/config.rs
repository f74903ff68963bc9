//! Settings of the image service: the `image` part of the daemon's configuration file.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::layer::Limits;

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Config {
    /// Root directory of the store: `content/`, `images/`, `damaged/`.
    pub root: PathBuf,
    /// Directories with registry host configuration, separated by colons. Each has one subdirectory
    /// per registry with a `hosts.toml` or certificates, in containerd's format. Read at each pull.
    pub config_path: String,
    /// References of images that the kubelet's image garbage collection must not remove.
    pub pinned: Vec<String>,
    /// Keep compressed layers after an image is built. Off: a pull of an image that shares layers
    /// with another fetches them again, but the disk holds each file once instead of twice.
    pub keep_layers: bool,
    /// Maximum number of layers of one image fetched concurrently.
    pub parallel_layers: usize,
    pub connect_timeout_seconds: u64,
    /// A transfer fails if the registry sends nothing for this many seconds.
    pub stall_timeout_seconds: u64,
    /// Consecutive attempts without progress before a transfer fails.
    pub attempts: u32,
    /// Maximum size of a manifest, index or image configuration; these are held in memory.
    pub max_manifest_bytes: u64,
    pub max_layers: usize,
    /// Maximum total size of an image's compressed layers.
    pub max_compressed_bytes: u64,
    /// Maximum total size of partial layers kept for resuming a later pull; the oldest are deleted
    /// first.
    pub max_partial_bytes: u64,
    /// Maximum total size of an image's files including holes, and of its uncompressed layers: a
    /// small blob can expand a thousandfold.
    pub max_unpacked_bytes: u64,
    /// Maximum number of files and directories, including those hidden by later layers.
    pub max_files: u64,
    /// Maximum memory for names, symlinks and attributes while an image is built.
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
