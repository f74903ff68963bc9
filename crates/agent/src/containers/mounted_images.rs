//! The images that are mounted, and references to them.

use std::collections::HashMap;
use std::path::PathBuf;

/// Mounted images by serial.
#[derive(Debug, Default)]
pub struct Images(pub(super) HashMap<String, Mounted>);

#[derive(Debug)]
pub(super) struct Mounted {
    pub(super) users: usize,
    pub(super) path: PathBuf,
}

/// A reference to a mounted image; returned with [`super::images::release`].
#[derive(Debug)]
pub struct Image {
    /// None: a directory instead of a disk, in tests.
    pub(super) serial: Option<String>,
    pub(super) path: PathBuf,
}

impl Image {
    /// The mount point.
    pub fn path(&self) -> &PathBuf {
        &self.path
    }
}
