//! `make deb` and `make rpm`: two packages, each from one list of files.
//!
//! `nacelle` has the daemon and everything that a pod needs. `nacelle-containerd` has only the shim and
//! depends on the same version of `nacelle`, as a shim starts that package's VMM with its guest kernel and
//! its initramfs, and their protocols are versioned together. A node that runs pods through containerd
//! alone disables nacelled.
//!
//! The files are staged by the code of `make install`, and packed by dpkg-deb and rpmbuild. cargo-deb and
//! cargo-generate-rpm were considered: both would have to be compiled first, which takes minutes, describe
//! the package of one crate while these files come from five crates and the guest's build, and need the
//! list of files twice.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::install::{self, Places};
use crate::{paths, run};

mod deb;
mod lab;
mod rpm;

pub(crate) use lab::{Args as TestArgs, run as test};

/// A distributor has an address of its own.
const MAINTAINER_VARIABLE: &str = "NACELLE_MAINTAINER";
const MAINTAINER: &str = "nacelle maintainers <maintainers@nacelle.dev>";

#[derive(clap::Args)]
pub(crate) struct Args {
    /// Version of the packages, for tests of upgrades
    #[arg(long, default_value = env!("CARGO_PKG_VERSION"))]
    version: String,
    /// Where the packages are written; by default build/deb or build/rpm
    #[arg(long)]
    out: Option<PathBuf>,
    /// Compress less and do not run lintian, for tests
    #[arg(long)]
    fast: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Deb,
    Rpm,
}

impl Kind {
    fn name(self) -> &'static str {
        match self {
            Self::Deb => "deb",
            Self::Rpm => "rpm",
        }
    }

    fn units(self) -> &'static str {
        match self {
            // Debian 12 expects units of packages there.
            Self::Deb => "lib/systemd/system",
            Self::Rpm => "usr/lib/systemd/system",
        }
    }
}

struct Package {
    name: &'static str,
    summary: &'static str,
    description: &'static str,
    /// Names are the same on Debian and Fedora. `=` stands for this version.
    depends: &'static [&'static str],
    recommends: &'static [&'static str],
    stage: fn(&Path, Kind) -> Result<()>,
}

const PACKAGES: [Package; 2] = [
    Package {
        name: "nacelle",
        summary: "Kubernetes container runtime that runs every pod in its own microVM",
        description: "nacelle implements the Container Runtime Interface (CRI) for a kubelet or\n\
            crictl. Every pod runs in its own KVM virtual machine. This package has the\n\
            daemon (nacelled), the command line client (nacelle), the virtual machine\n\
            monitor, the file server of shared volumes, the guest's kernel and its\n\
            initramfs with the guest agent.",
        // CNI plugins and what they call, and mkfs.ext4.
        depends: &["containernetworking-plugins", "e2fsprogs", "iptables"],
        // Certificate authorities for registries; `ip` is used by people and by the removal.
        recommends: &["ca-certificates", "iproute2"],
        stage: stage_nacelle,
    },
    Package {
        name: "nacelle-containerd",
        summary: "Runtime of containerd that runs pods in microVMs",
        description: "containerd-shim-nacelle-v2 runs the pods of a Kubernetes RuntimeClass in\n\
            virtual machines of nacelle, beside other pods that use runc.",
        depends: &["nacelle ="],
        // A containerd of another origin is as good.
        recommends: &["containerd"],
        stage: stage_shim,
    },
];

/// Documents of the package `nacelle`, at the same relative places, so that their links work.
const DOCUMENTS: &[&str] =
    &["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];

pub(crate) fn deb(args: &Args) -> Result<i32> {
    build(args, Kind::Deb)
}

pub(crate) fn rpm(args: &Args) -> Result<i32> {
    build(args, Kind::Rpm)
}

/// What is common to the packages of one build.
struct Release {
    version: String,
    maintainer: String,
    /// Seconds since the epoch: all time stamps in the packages are at most this.
    time: String,
    fast: bool,
    out: PathBuf,
}

fn build(args: &Args, kind: Kind) -> Result<i32> {
    let out = args.out.clone().unwrap_or_else(|| paths::repo().join("build").join(kind.name()));
    fs::create_dir_all(&out).with_context(|| format!("creating {}", out.display()))?;
    let release = Release {
        version: package_version(&args.version)?,
        maintainer: std::env::var(MAINTAINER_VARIABLE).unwrap_or_else(|_| MAINTAINER.to_owned()),
        time: source_time()?,
        fast: args.fast,
        out: out.canonicalize()?,
    };
    let mut files = Vec::new();
    for package in &PACKAGES {
        let scratch = tempfile::tempdir()?;
        let root = scratch.path().join("root");
        (package.stage)(&root, kind)?;
        let file = match kind {
            Kind::Deb => deb::pack(package, &release, &root)?,
            Kind::Rpm => rpm::pack(package, &release, &root, scratch.path())?,
        };
        println!("{}", file.display());
        files.push(file);
    }
    if kind == Kind::Deb && !args.fast {
        deb::lint(&files)?;
    }
    Ok(0)
}

/// A pre-release sorts before its release: `1.0.0-rc.1` becomes `1.0.0~rc.1`.
fn package_version(version: &str) -> Result<String> {
    let version = version.replacen('-', "~", 1);
    ensure!(
        version.starts_with(|c: char| c.is_ascii_digit())
            && version.chars().all(|c| c.is_ascii_alphanumeric() || ".+~".contains(c)),
        "{version:?} is not a version of packages: a digit, then letters, digits, '.', '+' and '~'"
    );
    Ok(version)
}

/// The time of the commit, so that the same source gives the same package
/// (<https://reproducible-builds.org/specs/source-date-epoch/>).
fn source_time() -> Result<String> {
    if let Ok(time) = std::env::var("SOURCE_DATE_EPOCH") {
        return Ok(time);
    }
    let repo = paths::repo();
    let commit =
        run::output(Command::new("git").arg("-C").arg(&repo).args(["log", "-1", "--format=%ct"]));
    match commit {
        Ok(time) => Ok(time.trim().to_owned()),
        // Not a clone.
        Err(_) => run::output(Command::new("stat").args(["-c", "%Y"]).arg(repo.join("Cargo.toml")))
            .map(|time| time.trim().to_owned()),
    }
}

fn stage_nacelle(root: &Path, kind: Kind) -> Result<()> {
    let places = Places::new(root, &root.join("usr"), kind.units());
    places.programs(install::COMMANDS)?;
    places.helpers()?;
    places.unit()?;
    places.documentation()?;
    gzip(&places.man_pages()?)?;
    let repo = paths::repo();
    let packaging = repo.join("packaging");
    install::put(
        &packaging.join("before-removal"),
        &root.join("usr/lib/nacelle/before-removal"),
        0o755,
    )?;
    let defaults = run::output(
        Command::new(paths::binaries("release").join("nacelled")).args(["config", "default"]),
    )?;
    install::write(&root.join("etc/nacelle/config.toml"), commented(&defaults).as_bytes())?;
    let documents = root.join("usr/share/doc/nacelle");
    for name in DOCUMENTS {
        install::put(&repo.join(name), &documents.join(name), 0o644)?;
    }
    for entry in fs::read_dir(repo.join("docs"))? {
        let path = entry?.path();
        let name = path.file_name().context("a file has a name")?;
        install::put(&path, &documents.join("docs").join(name), 0o644)?;
    }
    Ok(())
}

fn stage_shim(root: &Path, kind: Kind) -> Result<()> {
    let places = Places::new(root, &root.join("usr"), kind.units());
    places.programs(&[install::SHIM])?;
    let repo = paths::repo();
    let defaults = fs::read_to_string(repo.join("crates/shim/dist/shim.toml"))?;
    install::write(&root.join("etc/nacelle/shim.toml"), commented(&defaults).as_bytes())?;
    let to = root.join("usr/share/doc/nacelle-containerd/containerd.md");
    install::put(&repo.join("docs/containerd.md"), &to, 0o644)
}

/// A configuration with every setting commented out: a default that a later release changes then
/// applies, also where the administrator has changed other settings.
fn commented(defaults: &str) -> String {
    let mut text = String::new();
    for line in defaults.lines() {
        if !line.is_empty() && !line.starts_with(['#', '[']) {
            text.push('#');
        }
        text.push_str(line);
        text.push('\n');
    }
    text
}

fn gzip(files: &[PathBuf]) -> Result<()> {
    // Without name and time: the same input gives the same output.
    run::quiet(Command::new("gzip").args(["-9", "-n"]).args(files))
}

/// Every file below `root`, relative to it, sorted. Folders get mode 0755 whatever the umask is; files must
/// not depend on it either.
fn files(root: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut folders = vec![root.to_owned()];
    while let Some(folder) = folders.pop() {
        fs::set_permissions(&folder, fs::Permissions::from_mode(0o755))?;
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                folders.push(entry.path());
                continue;
            }
            let (path, mode) = (entry.path(), entry.metadata()?.permissions().mode() & 0o7777);
            ensure!([0o644, 0o755].contains(&mode), "{} has mode {mode:04o}", path.display());
            found.push(path.strip_prefix(root)?.to_owned());
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prerelease_has_a_version_that_packages_sort_before_the_release() {
        assert_eq!(package_version("1.2.3").unwrap(), "1.2.3");
        assert_eq!(package_version("1.2.3-rc.1").unwrap(), "1.2.3~rc.1");
        for bad in ["", "v1", "1.2 3", "1_2", "1-a-b"] {
            assert!(package_version(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_commented_configuration_has_sections_only() {
        let text = commented("# Data.\nroot = \"/r\"\n\n[log]\n# Level.\nlevel = \"info\"\n");
        assert_eq!(text, "# Data.\n#root = \"/r\"\n\n[log]\n# Level.\n#level = \"info\"\n");
    }

    #[test]
    fn a_file_that_only_root_can_read_is_not_packed() {
        let dir = tempfile::tempdir().unwrap();
        let (public, private) = (dir.path().join("a/public"), dir.path().join("b/private"));
        install::write(&public, b"").unwrap();
        assert_eq!(files(dir.path()).unwrap(), [Path::new("a/public")]);
        install::write(&private, b"").unwrap();
        fs::set_permissions(&private, fs::Permissions::from_mode(0o600)).unwrap();
        let error = files(dir.path()).unwrap_err().to_string();
        assert!(error.contains("b/private has mode 0600"), "{error}");
    }

    #[test]
    fn no_setting_of_the_shipped_configurations_stays_active() {
        for name in ["crates/nacelle/src/settings.toml", "crates/shim/dist/shim.toml"] {
            let text = fs::read_to_string(paths::repo().join(name)).unwrap();
            let shipped = commented(&text);
            let active = shipped.lines().filter(|line| !line.is_empty() && !line.starts_with('#'));
            let sections = text.lines().filter(|line| line.starts_with('['));
            assert_eq!(active.collect::<Vec<_>>(), sections.collect::<Vec<_>>(), "{name}");
        }
    }

    #[test]
    fn every_maintainer_script_is_one_that_its_packager_runs_and_is_valid_shell() {
        for (kind, known) in [
            (Kind::Deb, &["preinst", "postinst", "prerm", "postrm"][..]),
            (Kind::Rpm, &["pre", "post", "preun", "postun"]),
        ] {
            let folder = paths::repo().join("packaging").join(kind.name());
            for entry in fs::read_dir(&folder).unwrap() {
                let path = entry.unwrap().path();
                let (stem, extension) = (path.file_stem().unwrap(), path.extension().unwrap());
                assert!(PACKAGES.iter().any(|package| *package.name == *stem), "{path:?}");
                assert!(known.iter().any(|name| **name == *extension), "{path:?}");
                run::quiet(Command::new("sh").arg("-n").arg(&path)).unwrap();
            }
        }
        run::quiet(
            Command::new("sh").arg("-n").arg(paths::repo().join("packaging/before-removal")),
        )
        .unwrap();
    }
}
