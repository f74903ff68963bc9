//! `make install`: binaries, the guest's files, the systemd unit, man pages and shell completions at
//! their usual places.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::{paths, run};

/// What people run, and containerd.
const COMMANDS: &[&str] = &["nacelle", "nacelled", "containerd-shim-nacelle-v2"];
/// What nacelled starts, where its configuration looks for it; the agent of VMs is inside the
/// initramfs, this one is that of pods without.
const HELPERS: &[&str] = &["nacelle-vmm", "nacelle-fs", "nacelle-agent"];
const GUEST_FILES: &[&str] = &["vmlinux", "vmlinux.version", "initramfs.cpio"];

/// Shell, and where it looks for completions, below share/.
const COMPLETIONS: [(&str, &str); 3] = [
    ("bash", "bash-completion/completions/nacelle"),
    ("zsh", "zsh/site-functions/_nacelle"),
    ("fish", "fish/vendor_completions.d/nacelle.fish"),
];

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Where bin/ and share/ are
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
        let prefix = args.prefix.strip_prefix(&args.root).unwrap_or(&args.prefix);
        let text = fs::read_to_string(&unit)?;
        let text =
            text.replace("/usr/local/", &format!("{}/", Path::new("/").join(prefix).display()));
        let own = tempfile::NamedTempFile::new()?;
        fs::write(own.path(), text)?;
        put(own.path(), &args.root.join("etc/systemd/system/nacelled.service"), 0o644)?;
    }
    documentation(&args.prefix.join("share"))?;
    Ok(0)
}

/// Man pages and completions, which the program writes itself.
fn documentation(share: &Path) -> Result<()> {
    let program = paths::binaries("release").join("nacelle");
    let pages = share.join("man/man1");
    run::quiet(Command::new(&program).arg("man").arg(&pages))?;
    println!("{}", pages.join("nacelle.1").display());
    for (shell, place) in COMPLETIONS {
        let output = Command::new(&program)
            .args(["completions", shell])
            .output()
            .with_context(|| format!("running {}", program.display()))?;
        ensure!(output.status.success(), "nacelle completions {shell}: {}", output.status);
        let script = tempfile::NamedTempFile::new()?;
        fs::write(script.path(), &output.stdout)?;
        put(script.path(), &share.join(place), 0o644)?;
    }
    Ok(())
}

/// Copies to a temporary file and renames it: a running binary is replaced, not overwritten.
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
