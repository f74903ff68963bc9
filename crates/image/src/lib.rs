//! Images: pulled from registries or imported from files, flattened into one read-only EROFS file
//! per image, which all pods of that image share.
//!
//! ```text
//! registry/   HTTP: authentication, mirrors, retries, resumed transfers
//! content     blobs by digest, reference-counted by leases
//! layer/      decompression, tar, whiteouts: applies layer blobs to the tree
//! tree        the file tree in memory, without host paths
//! erofs/      writes the tree and the files' contents as an EROFS image
//! store       records and names of the images, durable
//! damaged     damaged files of the store
//! pull        one pull; images.rs shares it between callers
//! import      OCI layouts and docker archives
//! ```
//!
//! Data from a registry or an archive is untrusted: its digest is verified, and its sizes, counts
//! and depths are limited. The crate knows neither sandboxes nor the CRI.

mod config;
mod content;
mod damaged;
mod digest;
mod erofs;
mod error;
mod files;
mod flatten;
mod images;
mod import;
mod layer;
mod manifest;
pub mod observe;
mod path;
mod progress;
mod pull;
mod record;
mod reference;
mod registry;
mod shared_pulls;
mod space;
mod state;
mod store;
mod tree;

pub use config::Config;
pub use damaged::Damaged;
pub use digest::{BadDigest, Digest};
pub use erofs::DataError;
pub use error::{Error, ErrorKind};
pub use images::{FsInfo, Garbage, Hold, ImageId, ImageInfo, Images};
pub use layer::{LayerError, TarError};
pub use path::PathError;
pub use progress::{LayerProgress, Phase, Progress, ProgressSender};
pub use reference::{Reference, Target};
pub use registry::Auth;
pub use tree::TreeError;
