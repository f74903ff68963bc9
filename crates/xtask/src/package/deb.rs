//! Debian packages (deb(5), deb-control(5), Debian Policy 4.6).

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail};

use super::{Package, Release, files, gzip};
use crate::{install, paths, run};

const ARCHITECTURE: &str = "amd64";
const SCRIPTS: [&str; 4] = ["preinst", "postinst", "prerm", "postrm"];

pub(super) fn pack(package: &Package, release: &Release, root: &Path) -> Result<PathBuf> {
    let packaging = paths::repo().join("packaging");
    let documents = root.join("usr/share/doc").join(package.name);
    install::put(&packaging.join("copyright"), &documents.join("copyright"), 0o644)?;
    let log = documents.join("changelog");
    install::write(&log, changelog(package, release)?.as_bytes())?;
    gzip(&[log])?;
    let overrides = packaging.join("lintian").join(package.name);
    install::put(&overrides, &root.join("usr/share/lintian/overrides").join(package.name), 0o644)?;

    let shipped = files(root)?;
    let (conffiles, others): (Vec<PathBuf>, Vec<PathBuf>) =
        shipped.into_iter().partition(|file| file.starts_with("etc"));
    let sums = run::output(Command::new("md5sum").arg("--").args(&others).current_dir(root))?;
    let mut bytes = 0;
    for file in conffiles.iter().chain(&others) {
        bytes += fs::metadata(root.join(file))?.len().next_multiple_of(1024);
    }

    let control = root.join("DEBIAN");
    install::write(&control.join("control"), control_file(package, release, bytes).as_bytes())?;
    install::write(&control.join("md5sums"), sums.as_bytes())?;
    let list: String = conffiles.iter().map(|file| format!("/{}\n", file.display())).collect();
    install::write(&control.join("conffiles"), list.as_bytes())?;
    for script in SCRIPTS {
        let source = packaging.join("deb").join(format!("{}.{script}", package.name));
        if source.exists() {
            install::put(&source, &control.join(script), 0o755)?;
        }
    }
    // Folders below DEBIAN, too.
    files(root)?;

    let file = release.out.join(format!("{}_{}_{ARCHITECTURE}.deb", package.name, release.version));
    let level = if release.fast { "-z0" } else { "-z6" };
    run::quiet(
        Command::new("dpkg-deb")
            .args(["--root-owner-group", "-Zxz", level, "--build"])
            .arg(root)
            .arg(&file)
            .env("SOURCE_DATE_EPOCH", &release.time),
    )?;
    Ok(file)
}

fn control_file(package: &Package, release: &Release, bytes: u64) -> String {
    let depends = package.depends.iter().map(|name| match name.strip_suffix(" =") {
        Some(name) => format!("{name} (= {})", release.version),
        None => (*name).to_owned(),
    });
    let mut text = format!(
        "Package: {}\nVersion: {}\nArchitecture: {ARCHITECTURE}\nMaintainer: {}\n\
         Installed-Size: {}\nDepends: {}\nRecommends: {}\nSection: admin\nPriority: optional\n\
         Description: {}\n",
        package.name,
        release.version,
        release.maintainer,
        bytes.div_ceil(1024),
        depends.collect::<Vec<_>>().join(", "),
        package.recommends.join(", "),
        package.summary,
    );
    for line in package.description.lines() {
        let _ = writeln!(text, " {line}");
    }
    text
}

/// In the format of Policy 4.4. What changed is in CHANGELOG.md.
fn changelog(package: &Package, release: &Release) -> Result<String> {
    let time = format!("@{}", release.time);
    let date = run::output(Command::new("date").args(["--utc", "-R", "-d", &time]))?;
    Ok(format!(
        "{} ({}) unstable; urgency=medium\n\n  * See /usr/share/doc/nacelle/CHANGELOG.md.\n\n \
         -- {}  {}\n",
        package.name,
        release.version,
        release.maintainer,
        date.trim(),
    ))
}

/// lintian's errors and warnings fail the build; the overrides have reasons.
pub(super) fn lint(packages: &[PathBuf]) -> Result<()> {
    let output = Command::new("lintian")
        .args(["--fail-on", "error,warning", "--allow-root", "--tag-display-limit", "0"])
        .args(packages)
        .output()
        .context("starting lintian ('crates/xtask/host/deps.sh packaging' installs it)")?;
    let text = String::from_utf8_lossy(&output.stdout);
    if !output.status.success() {
        bail!("lintian:\n{text}{}", String::from_utf8_lossy(&output.stderr));
    }
    println!("lintian: no errors and no warnings");
    Ok(())
}
