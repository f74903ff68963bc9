//! Writer of EROFS images for Linux 6.1 and later.
//!
//! Own implementation, because it builds the image in one pass over the layers, without unpacking
//! them on the host (no host path is derived from an image path), without mkfs.erofs at run time,
//! and reproducibly to the byte.
//!
//! ```text
//! block 0        superblock at byte 1024
//! block 1..D     file contents in layer order                              (data.rs)
//! block D..M     directory blocks that do not fit after their inode        (dir.rs)
//! block M..      inodes, attributes, inline tails, chunk maps               (meta.rs)
//! ```
//!
//! Constants and encoders of the on-disk format: `format.rs`.

mod data;
mod dir;
mod format;
mod meta;

pub use data::{DataArea, DataError, FileData};
pub use format::{encode_device, split_xattr_name};
pub use meta::{Summary, uuid, write_metadata};
