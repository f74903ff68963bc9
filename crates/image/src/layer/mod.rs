//! Applies layer blobs to a file tree: decompression, tar, and the layer format's rules.

mod apply;
mod archive;
mod compression;
mod error;
mod header;
mod pax;

pub use apply::{Applied, LayerError, Limits, apply};
pub use archive::{EntryKind, TarReader};
pub use error::TarError;

#[cfg(test)]
mod tests;
