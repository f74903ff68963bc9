//! Debian packages as files: downloaded once through apt (with the set-up that `host/deps.sh`
//! leaves in the cache), unpacked without being installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::{paths, run};

/// The file of `package`, downloaded at its first use. The version then stays until the cache is
/// cleaned, so that builds repeat; the file's name tells it.
pub(crate) fn fetch(package: &str) -> Result<PathBuf> {
    let dir = paths::cache()?.join("debs");
    fs::create_dir_all(&dir)?;
    if let Some(file) = find(&dir, package)? {
        return Ok(file);
    }
    let scratch = tempfile::Builder::new().prefix("new-").tempdir_in(&dir)?;
    run::stage(&format!("downloading {package}"), || {
        run::quiet(apt("apt-get")?.args(["-q", "download", package]).current_dir(&scratch))
    })?;
    let file = find(scratch.path(), package)?
        .with_context(|| format!("apt-get download {package} left no file"))?;
    let kept = dir.join(file.file_name().context("a package file has a name")?);
    fs::rename(&file, &kept)?;
    Ok(kept)
}

/// The version in a package file's name: `name_version_arch.deb`.
pub(crate) fn version(file: &Path) -> String {
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    name.split('_').nth(1).unwrap_or("unknown").to_owned()
}

/// The name of the package that the metapackage `meta` stands for, by its first dependency.
pub(crate) fn behind(meta: &str) -> Result<String> {
    let text = run::output(apt("apt-cache")?.args(["depends", meta]))?;
    text.lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .map(str::to_owned)
        .with_context(|| format!("{meta} depends on nothing"))
}

pub(crate) fn unpack(file: &Path, to: &Path) -> Result<()> {
    run::quiet(Command::new("dpkg-deb").arg("-x").arg(file).arg(to))
}

/// The apt sources that mmdebstrap takes too.
pub(crate) fn sources() -> Result<PathBuf> {
    let file = paths::cache()?.join("apt/sources.list");
    anyhow::ensure!(file.exists(), "{} is missing: run 'make deps' first", file.display());
    Ok(file)
}

fn apt(program: &str) -> Result<Command> {
    sources()?;
    let mut command = Command::new(program);
    command.env("APT_CONFIG", paths::cache()?.join("apt/apt.conf"));
    Ok(command)
}

fn find(dir: &Path, package: &str) -> Result<Option<PathBuf>> {
    let prefix = format!("{package}_");
    let mut found: Vec<_> = fs::read_dir(dir)?
        .filter_map(|entry| entry.ok().map(|entry| entry.path()))
        .filter(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            name.starts_with(&prefix) && name.ends_with(".deb")
        })
        .collect();
    found.sort();
    Ok(found.pop())
}
