//! The images that stories, demo and benches run. They are built by `nacelle-tests`;
//! this only calls it, on this host, because the lab has no way to a Debian mirror.

use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::paths;

/// `cargo xtask images`: OCI layouts in `build/images`, from the cache where they are there.
pub(crate) fn run() -> Result<i32> {
    let program = paths::newest_binary("nacelle-tests").context("nacelle-tests is not built")?;
    let folder = paths::images();
    let status = Command::new(&program).arg("images").arg(&folder).status()?;
    if !status.success() {
        bail!("{} images {} failed ({status})", program.display(), folder.display());
    }
    Ok(0)
}
