//! Layers of an image: a tar, compressed.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::write::GzEncoder;

use super::trees;
use crate::layout::{self, Layer};

/// Images are copied to the lab in each run and built once, so size matters more than build time.
const GZIP_LEVEL: u32 = 7;
const ZSTD_LEVEL: i32 = 12;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    Gzip,
    Zstd,
}

pub fn pack(tree: &Path, paths: &[PathBuf], compression: Compression) -> Result<Layer> {
    let tar = trees::tar(tree, paths)?;
    let diff_id = layout::digest(&tar);
    let (media_type, blob) = match compression {
        Compression::Gzip => {
            let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(GZIP_LEVEL));
            encoder.write_all(&tar)?;
            (layout::TAR_GZIP, encoder.finish()?)
        }
        Compression::Zstd => (layout::TAR_ZSTD, zstd::encode_all(&tar[..], ZSTD_LEVEL)?),
    };
    Ok(Layer { media_type, blob, diff_id })
}

/// A layer that removes paths (image-spec, layer.md, "Whiteouts"): the last path by an opaque
/// whiteout of its directory, with a new file in it, the others by a whiteout.
pub fn whiteout_layer(folder: &Path, paths: &[&str]) -> Result<(PathBuf, Vec<PathBuf>)> {
    let mut entries: Vec<PathBuf> = Vec::new();
    for (n, path) in paths.iter().enumerate() {
        let path = Path::new(path.trim_start_matches('/'));
        let parent = path.parent().context("a path below the root")?;
        fs::create_dir_all(folder.join(parent))?;
        let ancestors = parent.ancestors().filter(|p| !p.as_os_str().is_empty());
        entries.extend(ancestors.map(Path::to_owned));
        let opaque = n > 0 && n + 1 == paths.len();
        let name = path.file_name().context("a path with a name")?.to_string_lossy();
        let marks = if opaque {
            vec![parent.join(".wh..wh..opq"), parent.join("from-the-last-layer")]
        } else {
            vec![parent.join(format!(".wh.{name}"))]
        };
        for mark in marks {
            fs::write(folder.join(&mark), "")?;
            entries.push(mark);
        }
    }
    entries.sort();
    entries.dedup();
    Ok((folder.to_owned(), entries))
}
