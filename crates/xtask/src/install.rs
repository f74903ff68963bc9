//! `make install`: binaries, the guest's files and the systemd unit at their usual places.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, run};

/// What people run, and containerd.
const COMMANDS: &[&str] = &["nacelle", "nacelled", "containerd-shim-nacelle-v2"];
/// What nacelled starts, where its configuration looks for it; the agent of VMs is inside the
/// initramfs, this one is that of pods without.
const HELPERS: &[&str] = &["nacelle-vmm", "nacelle-fs", "nacelle-agent"];
const GUEST_FILES: &[&str] = &["vmlinux", "vmlinux.version", "initramfs.cpio"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where bin/ is
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// The root below which usr/lib/nacelle and the unit go
    #[arg(long, default_value = "/")]
    root: PathBuf,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    let (bin, lib) = (args.prefix.join("bin"), args.root.join("usr/lib/nacelle"));
    let commands = COMMANDS.iter().map(|name| (name, &bin));
    for (name, folder) in commands.chain(HELPERS.iter().map(|name| (name, &lib))) {
        let built = paths::binaries("release").join(name);
        let lean = tempfile::NamedTempFile::new()?;
        run::quiet(
            Command::new("strip").arg("--strip-debug").arg("-o").arg(lean.path()).arg(&built),
        )?;
        put(lean.path(), &folder.join(name), 0o755)?;
    }
    for name in GUEST_FILES {
        put(&paths::guest().join(name), &lib.join(name), 0o644)?;
    }
    let unit = paths::repo().join("crates/nacelle/dist/nacelled.service");
    if unit.exists() {
        put(&unit, &args.root.join("etc/systemd/system/nacelled.service"), 0o644)?;
    }
    Ok(0)
}

/// Copies beside and renames: a running binary is replaced, not written into.
fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder)?;
    let fresh = to.with_extension("new");
    fs::copy(from, &fresh).with_context(|| format!("copying {}", from.display()))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
    fs::rename(&fresh, to).with_context(|| format!("writing {}", to.display()))?;
    println!("{}", to.display());
    Ok(())
}
