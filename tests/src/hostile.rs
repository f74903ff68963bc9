//! Images that must be rejected: each is a valid OCI layout with one hostile layer.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Result;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde_json::json;

use crate::layout::{self, Layer, TAR_GZIP, digest};

/// Writes all of them below `folder`; returns a name of the fault and the layout of each.
pub fn make(folder: &Path) -> Result<Vec<(&'static str, PathBuf)>> {
    let mut made = Vec::new();
    let mut add = |name: &'static str, layer: Layer| -> Result<()> {
        let layout = layout::write(&folder.join(name), &[layer], &json!({}))?;
        made.push((name, layout));
        Ok(())
    };
    add("dot-dot", layer(&entry("../../var/lib/nacelle-stories/escaped", b'0', "", b"x"))?)?;
    add("link-out", layer(&entry("leak", b'1', "../../etc/shadow", b""))?)?;
    let mut both = entry("dir/../../x", b'0', "", b"x");
    both.extend(entry("fine", b'0', "", b"x"));
    add("dot-dot-inside", layer(&both)?)?;
    let mut wrong = layer(&entry("fine", b'0', "", b"x"))?;
    wrong.diff_id = digest(b"something else");
    add("wrong-diff-id", wrong)?;
    let mut cut = layer(&entry("fine", b'0', "", &vec![7; 100_000]))?;
    cut.blob.truncate(cut.blob.len() / 2);
    add("cut-gzip", cut)?;
    let noise: Vec<u8> =
        (0..4096u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
    add("not-a-tar", layer(&noise)?)?;
    add("bomb", bomb()?)?;
    Ok(made)
}

fn layer(tar: &[u8]) -> Result<Layer> {
    let mut tar = tar.to_vec();
    tar.extend([0; 1024]);
    let mut gzip = GzEncoder::new(Vec::new(), Compression::fast());
    gzip.write_all(&tar)?;
    Ok(Layer { media_type: TAR_GZIP, blob: gzip.finish()?, diff_id: digest(&tar) })
}

/// A ustar entry written by hand: libraries refuse to write such entries.
fn entry(path: &str, kind: u8, link: &str, content: &[u8]) -> Vec<u8> {
    let mut header = header(path, kind, link, content.len() as u64);
    header.extend_from_slice(content);
    header.resize(header.len().next_multiple_of(512), 0);
    header
}

fn header(path: &str, kind: u8, link: &str, size: u64) -> Vec<u8> {
    let mut block = vec![0u8; 512];
    let mut put =
        |at: usize, text: &str| block[at..at + text.len()].copy_from_slice(text.as_bytes());
    put(0, path);
    put(100, "0000644\0");
    put(108, "0000000\0");
    put(116, "0000000\0");
    // GNU base-256 is not needed below 8 GiB.
    put(124, &format!("{size:011o}\0"));
    put(136, "00000000000\0");
    put(148, "        ");
    put(157, link);
    put(257, "ustar\x0000");
    block[156] = kind;
    let sum: u32 = block.iter().map(|&byte| u32::from(byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
    block
}

/// A layer of few bytes that unpacks to 64 files of 7 GiB of zeros each.
fn bomb() -> Result<Layer> {
    // gzip members may follow each other: one of 7 GiB (7 MiB compressed, too much to repeat in
    // full) is replaced by many members of 16 MiB of zeros.
    const SIZE: u64 = 7 << 30;
    const PIECE: usize = 16 << 20;
    let zeros = compress(&vec![0; PIECE])?;
    let mut blob = Vec::new();
    for file in 0..64 {
        blob.extend(compress(&header(&format!("zeros{file}"), b'0', "", SIZE))?);
        for _ in 0..SIZE / PIECE as u64 {
            blob.extend_from_slice(&zeros);
        }
        if blob.len() > 32 << 20 {
            break;
        }
    }
    Ok(Layer { media_type: TAR_GZIP, blob, diff_id: digest(b"never reached") })
}

fn compress(bytes: &[u8]) -> Result<Vec<u8>> {
    let mut gzip = GzEncoder::new(Vec::new(), Compression::best());
    gzip.write_all(bytes)?;
    Ok(gzip.finish()?)
}
