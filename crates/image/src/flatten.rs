//! Builds one EROFS file from an image's layers. Blocking; runs on its own thread.

use std::io::BufRead;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use crate::digest::Digest;
use crate::erofs::{DataArea, DataError, FileData, Summary, uuid, write_metadata};
use crate::layer::{Applied, LayerError, Limits, apply};
use crate::tree::Tree;

/// An image file being built; deleted if dropped before [`Flattener::finish`].
pub struct Flattener {
    tree: Tree<FileData>,
    out: Option<DataArea>,
    path: PathBuf,
    limits: Limits,
    unpacked_left: u64,
    cancelled: Arc<AtomicBool>,
}

impl Flattener {
    pub fn create(
        path: &Path,
        limits: Limits,
        cancelled: Arc<AtomicBool>,
    ) -> Result<Self, DataError> {
        Ok(Self {
            tree: Tree::new(limits.nodes, limits.metadata),
            out: Some(DataArea::create(path)?),
            path: path.into(),
            limits,
            unpacked_left: limits.unpacked,
            cancelled,
        })
    }

    /// Applies the next layer, the lowest one first. Without a `diff_id` the caller has verified
    /// the blob's digest itself.
    pub fn layer(
        &mut self,
        blob: impl BufRead,
        diff_id: Option<&Digest>,
    ) -> Result<Applied, LayerError> {
        let out = self.out.as_mut().expect("present until the end");
        apply(
            blob,
            diff_id,
            &mut self.tree,
            out,
            &mut self.unpacked_left,
            &self.limits,
            &self.cancelled,
        )
    }

    /// Writes the metadata and syncs the file.
    pub fn finish(mut self, id: &Digest) -> Result<Summary, DataError> {
        let out = self.out.take().expect("present until the end");
        let written = write_metadata(&self.tree, out, uuid(id.as_bytes()));
        if written.is_err() {
            let _ = std::fs::remove_file(&self.path);
        }
        written
    }
}

impl Drop for Flattener {
    fn drop(&mut self) {
        if self.out.take().is_some() {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}
