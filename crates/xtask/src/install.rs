//! `make install`: binaries, the guest's files, the systemd unit, man pages and shell completions at
//! their usual places; `make uninstall` removes them. Packages are made of the same files (`package`).

use std::ffi::OsStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{paths, run};

/// What people run.
pub(crate) const COMMANDS: &[&str] = &["nacelle", "nacelled"];
/// What containerd runs; it searches in its PATH.
pub(crate) const SHIM: &str = "containerd-shim-nacelle-v2";
/// What nacelled starts, where its configuration looks for it; the agent of VMs is inside the
/// initramfs, this one is that of pods without.
pub(crate) const HELPERS: &[&str] = &["nacelle-vmm", "nacelle-fs", "nacelle-agent"];
const GUEST_FILES: &[&str] = &["vmlinux", "vmlinux.version", "initramfs.cpio"];
/// The folder of helpers and guest files, below the root.
const LIB: &str = "usr/lib/nacelle";

const UNIT: &str = "nacelled.service";
/// The folder of the programs in the unit of the repository.
const UNIT_BIN: &str = "/usr/local/bin/";

/// Shell, and where it looks for completions, below share/.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "bash-completion/completions/nacelle"),
    ("zsh", "zsh/site-functions/_nacelle"),
    ("fish", "fish/vendor_completions.d/nacelle.fish"),
];
const MAN: &str = "man/man1";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where bin/ and share/ are
    #[arg(long, default_value = "/usr/local")]
    prefix: PathBuf,
    /// The root below which usr/lib/nacelle and the unit go
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Remove what was installed there
    #[arg(long)]
    remove: bool,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    let places = Places::new(&args.root, &args.prefix, "etc/systemd/system");
    let list = |files: Vec<PathBuf>| files.iter().for_each(|file| println!("{}", file.display()));
    if args.remove {
        list(places.remove()?);
        return Ok(0);
    }
    list(places.programs(COMMANDS)?);
    list(places.programs(&[SHIM])?);
    list(places.helpers()?);
    list(vec![places.unit()?]);
    list(places.documentation()?);
    Ok(0)
}

/// Folders to install into.
pub(crate) struct Places {
    bin: PathBuf,
    lib: PathBuf,
    share: PathBuf,
    units: PathBuf,
    /// `bin` as the installed system sees it, with a slash at the end.
    bin_there: String,
}

impl Places {
    /// `prefix` is below `root`; `units` is relative to it.
    pub(crate) fn new(root: &Path, prefix: &Path, units: &str) -> Self {
        let below = prefix.strip_prefix(root).unwrap_or(prefix);
        Self {
            bin: prefix.join("bin"),
            lib: root.join(LIB),
            share: prefix.join("share"),
            units: root.join(units),
            bin_there: format!("{}/", Path::new("/").join(below).join("bin").display()),
        }
    }

    pub(crate) fn programs(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        names.iter().map(|name| program(name, &self.bin)).collect()
    }

    /// What nacelled and the shim start, and what guests boot.
    pub(crate) fn helpers(&self) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for name in HELPERS {
            files.push(program(name, &self.lib)?);
        }
        for name in GUEST_FILES {
            let to = self.lib.join(name);
            put(&paths::guest().join(name), &to, 0o644)?;
            files.push(to);
        }
        Ok(files)
    }

    pub(crate) fn unit(&self) -> Result<PathBuf> {
        let source = paths::repo().join("crates/nacelle/dist").join(UNIT);
        let text =
            fs::read_to_string(&source).with_context(|| format!("reading {}", source.display()))?;
        ensure!(text.contains(UNIT_BIN), "{} does not start {UNIT_BIN}*", source.display());
        let to = self.units.join(UNIT);
        write(&to, text.replace(UNIT_BIN, &self.bin_there).as_bytes())?;
        Ok(to)
    }

    /// Man pages and completions, which the program writes itself.
    pub(crate) fn documentation(&self) -> Result<Vec<PathBuf>> {
        let program = paths::binaries("release").join("nacelle");
        let scratch = tempfile::tempdir()?;
        run::quiet(Command::new(&program).arg("man").arg(scratch.path()))?;
        let mut files = Vec::new();
        for entry in fs::read_dir(scratch.path())? {
            let entry = entry?;
            let to = self.share.join(MAN).join(entry.file_name());
            put(&entry.path(), &to, 0o644)?;
            files.push(to);
        }
        files.sort();
        for (shell, place) in COMPLETIONS {
            let output = Command::new(&program)
                .args(["completions", shell])
                .output()
                .with_context(|| format!("running {}", program.display()))?;
            ensure!(output.status.success(), "nacelle completions {shell}: {}", output.status);
            let to = self.share.join(place);
            write(&to, &output.stdout)?;
            files.push(to);
        }
        Ok(files)
    }

    /// The installed man pages: `nacelle.1`, `nacelle-run.1`, `nacelled.1` and so on.
    pub(crate) fn man_pages(&self) -> Result<Vec<PathBuf>> {
        let folder = self.share.join(MAN);
        let mut pages = Vec::new();
        for entry in fs::read_dir(&folder).into_iter().flatten() {
            let path = entry.with_context(|| folder.display().to_string())?.path();
            let stem = path.file_stem().and_then(OsStr::to_str).unwrap_or_default();
            let program = stem.split('-').next().unwrap_or_default();
            if COMMANDS.contains(&program) && path.extension() == Some(OsStr::new("1")) {
                pages.push(path);
            }
        }
        pages.sort();
        Ok(pages)
    }

    fn remove(&self) -> Result<Vec<PathBuf>> {
        let mut files: Vec<PathBuf> =
            COMMANDS.iter().chain([&SHIM]).map(|name| self.bin.join(name)).collect();
        files.extend(HELPERS.iter().chain(GUEST_FILES).map(|name| self.lib.join(name)));
        files.push(self.units.join(UNIT));
        files.extend(self.man_pages()?);
        files.extend(COMPLETIONS.iter().map(|(_, place)| self.share.join(place)));
        files.retain(|file| file.symlink_metadata().is_ok());
        for file in &files {
            fs::remove_file(file).with_context(|| format!("removing {}", file.display()))?;
        }
        match fs::remove_dir(&self.lib) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                eprintln!("xtask: {} is kept: {error}", self.lib.display());
            }
            _ => {}
        }
        Ok(files)
    }
}

/// Installs a binary without its line tables; names of functions stay, for backtraces.
fn program(name: &str, folder: &Path) -> Result<PathBuf> {
    let built = paths::binaries("release").join(name);
    let lean = tempfile::NamedTempFile::new()?;
    run::quiet(Command::new("strip").arg("--strip-debug").arg("-o").arg(lean.path()).arg(&built))?;
    let to = folder.join(name);
    put(lean.path(), &to, 0o755)?;
    Ok(to)
}

pub(crate) fn write(to: &Path, content: &[u8]) -> Result<()> {
    let file = tempfile::NamedTempFile::new()?;
    fs::write(file.path(), content)?;
    put(file.path(), to, 0o644)
}

/// Copies to a temporary file and renames it: a running binary is replaced, not overwritten.
pub(crate) fn put(from: &Path, to: &Path, mode: u32) -> Result<()> {
    let folder = to.parent().context("a file lies in a folder")?;
    fs::create_dir_all(folder).with_context(|| format!("creating {}", folder.display()))?;
    let mut fresh = to.to_owned().into_os_string();
    fresh.push(".new");
    fs::copy(from, &fresh).with_context(|| format!("copying {}", from.display()))?;
    fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
    fs::rename(&fresh, to).with_context(|| format!("writing {}", to.display()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_unit_starts_the_program_of_the_prefix_and_removal_takes_only_our_files() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path();
        let places = Places::new(root, &root.join("opt/n"), "lib/systemd/system");
        let unit = places.unit().unwrap();
        assert_eq!(unit, root.join("lib/systemd/system/nacelled.service"));
        let text = fs::read_to_string(&unit).unwrap();
        assert!(text.contains("ExecStart=/opt/n/bin/nacelled\n"), "{text}");

        let pages = root.join("opt/n/share/man/man1");
        let (ours, other) = (pages.join("nacelle-run.1"), pages.join("nacellex.1"));
        let kept = root.join("usr/lib/nacelle/own");
        for file in [&ours, &other, &kept, &root.join("usr/lib/nacelle/vmlinux")] {
            write(file, b"").unwrap();
        }
        let removed = places.remove().unwrap();
        assert_eq!(removed.len(), 3, "{removed:?}");
        assert!(!ours.exists() && !unit.exists());
        assert!(other.exists() && kept.exists());
    }
}
