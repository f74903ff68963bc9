//! Images: pulled from registries or imported from files, flattened into one read-only EROFS file
//! an image, which every pod that runs it shares.
//!
//! ```text
//! registry/   HTTP: authentication, mirrors, retries, resumed transfers
//! content     blobs by digest, kept while somebody holds a lease
//! layer/      decompression, tar, whiteouts and all: from layer blobs to ...
//! tree        ... a file tree that has never heard of host paths
//! erofs/      writes the tree and the files' contents as an EROFS image
//! store       records and names of the images, durable
//! aside       what of these is damaged
//! pull        one pull; images.rs shares it between its callers
//! import      OCI layouts and docker archives
//! ```
//!
//! Everything that comes from a registry or an archive is hostile until its digest is checked, and
//! its shape (sizes, counts, depths) afterwards too. This crate knows no sandboxes and no CRI.

mod aside;
mod config;
mod content;
mod digest;
mod erofs;
mod error;
mod files;
mod flatten;
mod images;
mod import;
mod layer;
mod manifest;
mod path;
mod progress;
mod pull;
mod record;
mod reference;
mod registry;
mod store;
mod tree;

pub use aside::Damaged;
pub use config::Config;
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
