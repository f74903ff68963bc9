//! The guest's initramfs: the agent as `/init`, the folders it mounts on, and nothing else. The
//! same agent gives the same bytes. A second one carries modules, for Debian's own kernel.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::{debian_kernel, paths, run};

/// Folders that the agent mounts on before it can make any.
const FOLDERS: &[&str] = &["dev", "proc", "sys", "run", "tmp", "etc"];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// The agent's binary; by default the release build's
    #[arg(long)]
    agent: Option<PathBuf>,
    /// Only our own kernel's initramfs, not the one with Debian's modules
    #[arg(long)]
    only_ours: bool,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    let built = args
        .agent
        .clone()
        .unwrap_or_else(|| paths::binaries("release").join("nacelle-guest-agent"));
    let out = paths::guest();
    fs::create_dir_all(&out)?;
    let scratch = tempfile::tempdir()?;
    let lean = scratch.path().join("init");
    run::quiet(Command::new("strip").arg("-s").arg("-o").arg(&lean).arg(&built))
        .with_context(|| format!("the agent {} (built by 'make build')", built.display()))?;
    let agent = fs::read(lean)?;

    replace(&out.join("initramfs.cpio"), base(&agent).finish())?;
    if args.only_ours {
        return Ok(0);
    }
    debian_kernel::run()?;
    let debian = out.join("debian");
    let list = fs::read_to_string(debian.join("modules.list"))?;
    let mut archive = base(&agent);
    for name in list.lines() {
        let module = fs::read(debian.join("modules").join(name))?;
        archive.file(&format!("lib/modules/{name}"), 0o644, &module);
    }
    archive.file("modules.list", 0o644, list.as_bytes());
    replace(&out.join("initramfs-debian.cpio"), archive.finish())?;
    Ok(0)
}

fn base(agent: &[u8]) -> Archive {
    let mut archive = Archive::default();
    for folder in FOLDERS {
        archive.directory(folder);
    }
    // The kernel opens the console for /init before anything is mounted; where there is none, the
    // Rust runtime fills the three descriptors with /dev/null, and aborts if that is missing too.
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.character_device("dev/null", 0o666, 1, 3);
    archive.file("init", 0o755, agent);
    archive
}

/// Writes a temporary file and renames it, so that a VM that boots meanwhile reads one of the versions.
fn replace(path: &PathBuf, bytes: Vec<u8>) -> Result<()> {
    let fresh = path.with_extension("new");
    fs::write(&fresh, bytes)?;
    fs::rename(&fresh, path).with_context(|| format!("writing {}", path.display()))
}
