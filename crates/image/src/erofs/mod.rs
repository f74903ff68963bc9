//! Writer of EROFS images for Linux 6.1 and later.
//!
//! Written here because nothing else fits: the image is made in one pass over the layers, without
//! unpacking them on the host (no host path is ever derived from an image's), without mkfs.erofs
//! at run time, and byte for byte reproducible.
//!
//! ```text
//! block 0        superblock at byte 1024
//! block 1..D     file contents in the order in which the layers bring them  (data.rs)
//! block D..M     directory blocks that do not fit beside their inode        (dir.rs)
//! block M..      inodes, attributes, inline tails, chunk maps               (meta.rs)
//! ```
//!
//! The format's details stand in `format.rs`.

mod data;
mod dir;
mod format;
mod meta;

pub use data::{DataArea, DataError, FileData};
pub use format::{encode_device, split_xattr_name};
pub use meta::{Summary, uuid, write_metadata};
