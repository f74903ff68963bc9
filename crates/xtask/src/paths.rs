//! Where things are: the repository, what cargo built, and the cache that outlives checkouts.

use std::env;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// The target named in `.cargo/config.toml`, which is a folder below cargo's target directory.
const TRIPLE: &str = "x86_64-unknown-linux-gnu";

/// The repository's root: from Cargo at run time, else the directory of the build.
pub(crate) fn repo() -> PathBuf {
    let manifest = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest.join("../..").canonicalize().unwrap_or(manifest)
}

/// Folder for guest assets: kernels and initramfs images.
pub(crate) fn guest() -> PathBuf {
    repo().join("build/guest")
}

/// Folder for the images of tests and demo: an OCI layout each.
pub(crate) fn images() -> PathBuf {
    repo().join("build/images")
}

/// Where cargo puts the binaries of `profile` ("release" or "debug").
pub(crate) fn binaries(profile: &str) -> PathBuf {
    let target =
        env::var_os("CARGO_TARGET_DIR").map_or_else(|| repo().join("target"), PathBuf::from);
    repo().join(target).join(TRIPLE).join(profile)
}

/// The build of a binary that is newest, release or debug.
pub(crate) fn newest_binary(name: &str) -> Option<PathBuf> {
    ["release", "debug"]
        .iter()
        .map(|profile| binaries(profile).join(name))
        .filter(|path| path.is_file())
        .max_by_key(|path| fs::metadata(path).and_then(|meta| meta.modified()).ok())
}

/// The cache: everything that is slow to make and does not depend on the checkout.
pub(crate) fn cache() -> Result<PathBuf> {
    let dir = match (env::var_os("NACELLE_CACHE"), env::var_os("XDG_CACHE_HOME")) {
        (Some(own), _) => PathBuf::from(own),
        (None, Some(xdg)) => PathBuf::from(xdg).join("nacelle"),
        (None, None) => {
            PathBuf::from(env::var_os("HOME").context("neither HOME nor NACELLE_CACHE is set")?)
                .join(".cache/nacelle")
        }
    };
    fs::create_dir_all(&dir).with_context(|| format!("creating {}", dir.display()))?;
    Ok(dir)
}

/// Makes `cache()/kind/key` with `build` unless it is there. `build` fills an empty folder, which
/// is renamed into place, so that a half-made entry is never seen; a lock file makes two callers
/// at once build it once.
pub(crate) fn cached(
    kind: &str,
    key: &str,
    build: impl FnOnce(&Path) -> Result<()>,
) -> Result<PathBuf> {
    let parent = cache()?.join(kind);
    let entry = parent.join(key);
    if entry.is_dir() {
        return Ok(entry);
    }
    fs::create_dir_all(&parent)?;
    let lock_path = parent.join("lock");
    let lock = File::create(&lock_path)
        .with_context(|| format!("creating the lock {}", lock_path.display()))?;
    lock.lock().with_context(|| format!("locking {}", lock_path.display()))?;
    if entry.is_dir() {
        return Ok(entry);
    }
    let fresh = tempfile::Builder::new().prefix("new-").tempdir_in(&parent)?;
    build(fresh.path())?;
    let fresh = fresh.keep();
    fs::rename(&fresh, &entry)
        .with_context(|| format!("renaming {} to {}", fresh.display(), entry.display()))?;
    Ok(entry)
}
