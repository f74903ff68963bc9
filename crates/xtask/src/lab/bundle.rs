//! Input and output of the outer machine: tar archives on a raw disk and over
//! virtio-serial ports.

use std::fs::{self, File};
use std::io::BufWriter;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, run};

/// Our programs, as far as they have been built.
const BINARIES: &[&str] = &[
    "nacelle",
    "nacelled",
    "nacelle-vmm",
    "nacelle-fs",
    "nacelle-agent",
    "containerd-shim-nacelle-v2",
    "nacelle-tests",
    "nacelle-agent-tests",
    "nacelle-bench",
    "nacelle-share-load",
];

/// The archive that the outer machine unpacks at its root.
pub(super) struct Bundle {
    tar: tar::Builder<BufWriter<File>>,
}

impl Bundle {
    pub(super) fn create(path: &Path) -> Result<Self> {
        let mut tar = tar::Builder::new(BufWriter::new(File::create(path)?));
        tar.follow_symlinks(false);
        Ok(Self { tar })
    }

    /// Adds `path`, a file or a folder with its content, as `dest`.
    pub(super) fn add(&mut self, path: &Path, dest: &str) -> Result<()> {
        let dest = dest.trim_start_matches('/');
        let meta =
            fs::metadata(path).with_context(|| format!("no {} to bring in", path.display()))?;
        if meta.is_dir() {
            self.tar.append_dir_all(dest, path)
        } else {
            self.tar.append_file(dest, &mut File::open(path)?)
        }
        .with_context(|| format!("packing {}", path.display()))
    }

    pub(super) fn add_text(&mut self, dest: &str, text: &str) -> Result<()> {
        let mut header = tar::Header::new_gnu();
        header.set_size(text.len() as u64);
        header.set_mode(0o644);
        Ok(self.tar.append_data(&mut header, dest, text.as_bytes())?)
    }

    /// Adds the binaries (of the profile that was built last) and the guest's kernel and
    /// initramfs, as far as they exist. Symbols stay; line tables do not, being most of the size.
    pub(super) fn add_checkout(&mut self, scratch: &Path) -> Result<()> {
        for name in BINARIES {
            let Some(built) = paths::newest_binary(name) else { continue };
            let lean = scratch.join(name);
            run::quiet(
                Command::new("strip").arg("--strip-debug").arg("-o").arg(&lean).arg(&built),
            )?;
            self.add(&lean, &format!("nacelle/bin/{name}"))?;
            fs::remove_file(&lean)?;
        }
        let guest = paths::guest();
        if guest.is_dir() {
            for entry in fs::read_dir(&guest)? {
                let path = entry?.path();
                let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
                self.add(&path, &format!("nacelle/guest/{name}"))?;
            }
        }
        Ok(())
    }

    pub(super) fn add_images(&mut self) -> Result<()> {
        self.add(&paths::images(), "nacelle/images")
    }

    pub(super) fn finish(self) -> Result<()> {
        self.tar.into_inner()?.into_inner().map_err(|error| error.into_error())?;
        Ok(())
    }
}

/// Unpacks what the outer machine sent; an empty file means that the path did not exist there.
pub(super) fn unpack_output(archive: &Path, to: &Path) -> Result<()> {
    if fs::metadata(archive).map_or(0, |meta| meta.len()) == 0 {
        return Ok(());
    }
    run::quiet(Command::new("tar").arg("-C").arg(to).arg("-xf").arg(archive))
}
