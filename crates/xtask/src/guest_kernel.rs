//! The guest kernel: Debian's `linux-source-6.12`, `tinyconfig`, and the fragments of
//! `guest-kernel/`, each of whose options has its reason beside it. What a fragment asks for and
//! Kconfig drops (an unmet dependency, a renamed option) fails the build.
//!
//! The result depends on fragments, source version and compiler only: they make its cache key,
//! and the build's time, user and host are fixed.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

use crate::{debs, paths, run};

const SOURCE_PACKAGE: &str = "linux-source-6.12";
const SOURCE_FOLDER: &str = "linux-source-6.12";

/// The parts of `make tinyconfig`, which start from allnoconfig.
const TINY: &[&str] = &[
    "kernel/configs/tiny-base.config",
    "kernel/configs/tiny.config",
    "arch/x86/configs/tiny.config",
];

/// Folders whose tracepoints are left out (`NOTRACE` of `include/linux/tracepoint.h`). They have more
/// than a thousand of them, and the kernel parses each one's format for the enumerations that it
/// names: 3.4 of 5.1 s of a boot in the lab, and 2.2 MiB of memory in each pod.
const WITHOUT_TRACEPOINTS: &[&str] = &["fs/nfs", "fs/smb/client", "fs/xfs", "net/sunrpc"];

/// Raised when this recipe changes the kernel without a fragment changing.
const RECIPE: &str = "2";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Print the configuration's path and stop before compiling
    #[arg(long)]
    config_only: bool,
}

/// One line of a fragment: `CONFIG_NAME=value   # reason`.
#[derive(Debug, PartialEq)]
struct KconfigOption {
    name: String,
    value: String,
}

pub(crate) fn run(args: &Args) -> Result<i32> {
    let fragments = read_fragments(&paths::repo().join("guest-kernel"))?;
    if args.config_only {
        let scratch = tempfile::tempdir()?;
        configure(scratch.path(), &debs::fetch(SOURCE_PACKAGE)?, &fragments)?;
        let kept = paths::repo().join("build/guest-kernel.config");
        fs::create_dir_all(kept.parent().context("build/ has a parent")?)?;
        fs::copy(scratch.path().join("out/.config"), &kept)?;
        println!("{}", kept.display());
        return Ok(0);
    }
    let source = debs::fetch(SOURCE_PACKAGE)?;
    let compiler = run::output(Command::new("gcc").arg("-v").arg("--version"))?;
    let options: Vec<_> = fragments.values().flatten().map(plain).collect();
    let version = debs::version(&source);
    let key = run::key([
        RECIPE.as_bytes(),
        version.as_bytes(),
        compiler.as_bytes(),
        options.join("\n").as_bytes(),
    ]);
    let built = paths::cached("guest-kernel", &key, |dir| {
        run::stage("building the guest kernel (10 minutes on two free cores)", || {
            build(dir, &source, &fragments, &version)
        })
    })?;
    let out = paths::guest();
    fs::create_dir_all(&out)?;
    for name in ["vmlinux", "vmlinux.version"] {
        let fresh = out.join(format!("{name}.new"));
        fs::copy(built.join(name), &fresh)?;
        fs::rename(&fresh, out.join(name))?;
    }
    Ok(0)
}

fn build(
    dir: &Path,
    source: &Path,
    fragments: &BTreeMap<String, Vec<KconfigOption>>,
    version: &str,
) -> Result<()> {
    let work = tempfile::Builder::new().prefix("nacelle-kernel-").tempdir()?;
    configure(work.path(), source, fragments)?;
    let jobs = thread::available_parallelism().map_or(2, usize::from);
    let log = fs::File::create(dir.join("build.log"))?;
    let status = make(work.path())
        .arg(format!("-j{jobs}"))
        .arg("vmlinux")
        .stdout(log.try_clone()?)
        .stderr(log)
        .status()?;
    if !status.success() {
        let text = fs::read_to_string(dir.join("build.log")).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        bail!("the compilation failed:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"));
    }
    let out = work.path().join("out");
    // Symbols are for a debugger; the kernel has its own table for the console.
    run::quiet(
        Command::new("strip").arg("-s").arg("-o").arg(dir.join("vmlinux")).arg(out.join("vmlinux")),
    )?;
    fs::copy(out.join(".config"), dir.join("config"))?;
    let release = fs::read_to_string(out.join("include/config/kernel.release"))?;
    fs::write(
        dir.join("vmlinux.version"),
        format!("{} from {SOURCE_PACKAGE} {version}\n", release.trim()),
    )?;
    Ok(())
}

/// Unpacks the source into `work` and leaves the merged configuration in `work/out/.config`.
fn configure(
    work: &Path,
    source: &Path,
    fragments: &BTreeMap<String, Vec<KconfigOption>>,
) -> Result<()> {
    debs::unpack(source, work)?;
    let archive = work.join("usr/src").join(format!("{SOURCE_FOLDER}.tar.xz"));
    run::quiet(Command::new("tar").arg("-C").arg(work).args(["-xf"]).arg(archive))?;
    fs::remove_dir_all(work.join("usr"))?;
    for folder in WITHOUT_TRACEPOINTS {
        let makefile = work.join(SOURCE_FOLDER).join(folder).join("Makefile");
        let text = fs::read_to_string(&makefile)
            .with_context(|| format!("reading {}", makefile.display()))?;
        fs::write(&makefile, text + "\nsubdir-ccflags-y += -DNOTRACE\n")?;
    }
    fs::create_dir_all(work.join("out"))?;
    fs::create_dir_all(work.join("fragments"))?;

    let mut command = Command::new("scripts/kconfig/merge_config.sh");
    command.current_dir(work.join(SOURCE_FOLDER));
    // Over allnoconfig: an option that no fragment names is off, whatever its default is.
    command.args(["-n", "-O", "../out"]).args(TINY);
    for (file, options) in fragments {
        let lines: Vec<_> = options.iter().map(plain).collect();
        let path = work.join("fragments").join(file);
        fs::write(&path, lines.join("\n") + "\n")?;
        command.arg(path);
    }
    run::quiet(&mut command)?;

    let config = fs::read_to_string(work.join("out/.config"))?;
    let dropped: Vec<_> = fragments
        .iter()
        .flat_map(|(file, options)| options.iter().map(move |option| (file, option)))
        .filter(|(_, option)| !is_set(option, &config))
        .map(|(file, option)| format!("  {file}: {}={}", option.name, option.value))
        .collect();
    ensure!(
        dropped.is_empty(),
        "Kconfig dropped what fragments ask for (a dependency is missing, or the name is not of this version):\n{}",
        dropped.join("\n")
    );
    Ok(())
}

fn make(work: &Path) -> Command {
    let mut command = Command::new("nice");
    command.args(["-n", "5", "make", "-C"]).arg(work.join(SOURCE_FOLDER)).arg("O=../out");
    // Nothing of this machine or moment gets into the image.
    for (name, value) in [
        ("KBUILD_BUILD_TIMESTAMP", "Thu Jan  1 00:00:00 UTC 1970"),
        ("KBUILD_BUILD_USER", "nacelle"),
        ("KBUILD_BUILD_HOST", "nacelle"),
        ("KBUILD_BUILD_VERSION", "1"),
        ("SOURCE_DATE_EPOCH", "0"),
    ] {
        command.env(name, value);
    }
    command.stdin(Stdio::null());
    command
}

/// The fragments by file name.
fn read_fragments(dir: &Path) -> Result<BTreeMap<String, Vec<KconfigOption>>> {
    let mut fragments = BTreeMap::new();
    let mut files: Vec<PathBuf> = fs::read_dir(dir)
        .with_context(|| format!("reading {}", dir.display()))?
        .map(|entry| Ok(entry?.path()))
        .collect::<Result<_>>()?;
    files.retain(|path| path.extension().is_some_and(|extension| extension == "config"));
    for path in files {
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let text = fs::read_to_string(&path)?;
        let options = parse(&text).with_context(|| format!("in {}", path.display()))?;
        fragments.insert(name, options);
    }
    ensure!(!fragments.is_empty(), "no fragments in {}", dir.display());
    Ok(fragments)
}

fn parse(text: &str) -> Result<Vec<KconfigOption>> {
    let mut options = Vec::new();
    for (number, line) in text.lines().enumerate() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let at = number + 1;
        let (setting, reason) = line
            .split_once(" #")
            .with_context(|| format!("line {at}: '{line}' gives no reason"))?;
        ensure!(!reason.trim().is_empty(), "line {at}: '{line}' gives no reason");
        let (name, value) = setting
            .trim()
            .split_once('=')
            .filter(|(name, _)| name.starts_with("CONFIG_"))
            .with_context(|| format!("line {at}: '{line}' is not CONFIG_NAME=value"))?;
        options.push(KconfigOption { name: name.to_owned(), value: value.to_owned() });
    }
    Ok(options)
}

/// An option as Kconfig writes it.
fn plain(option: &KconfigOption) -> String {
    match option.value.as_str() {
        "n" => format!("# {} is not set", option.name),
        value => format!("{}={value}", option.name),
    }
}

fn is_set(option: &KconfigOption, config: &str) -> bool {
    let set = format!("{}=", option.name);
    match option.value.as_str() {
        // An option whose menu is off is not mentioned at all.
        "n" => !config.lines().any(|line| line.starts_with(&set)),
        _ => config.lines().any(|line| line == plain(option)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_option_without_a_reason_is_refused() {
        assert!(parse("CONFIG_NET=y\n").is_err());
        assert!(parse("CONFIG_NET=y   #  \n").is_err());
        assert!(parse("NET=y # sockets\n").is_err());
    }

    #[test]
    fn an_option_that_kconfig_dropped_is_detected() {
        let options = parse("# head\n\nCONFIG_A=y   # one\nCONFIG_B=n # two\n").unwrap();
        assert_eq!(options.len(), 2);
        assert!(is_set(&options[0], "CONFIG_A=y\n# CONFIG_B is not set\n"));
        assert!(!is_set(&options[0], "# CONFIG_A is not set\n"));
        assert!(is_set(&options[1], "CONFIG_A=y\n"));
        assert!(!is_set(&options[1], "CONFIG_B=y\n"));
    }
}
