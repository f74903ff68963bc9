//! RPM packages, built by rpmbuild from staged files (<https://rpm.org/docs/latest/manual/spec.html>).

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::{Package, Release, files};
use crate::{install, paths, run};

const ARCHITECTURE: &str = "x86_64";
const SCRIPTS: [&str; 4] = ["pre", "post", "preun", "postun"];

pub(super) fn pack(
    package: &Package,
    release: &Release,
    root: &Path,
    scratch: &Path,
) -> Result<PathBuf> {
    let license = format!("usr/share/licenses/{}/LICENSE", package.name);
    install::put(&paths::repo().join("LICENSE"), &root.join(license), 0o644)?;
    let shipped = files(root)?;
    let spec = scratch.join("package.spec");
    fs::write(&spec, spec_file(package, release, root, &shipped)?)?;
    run::quiet(
        Command::new("rpmbuild")
            .args(["-bb", "--nodeps", "--target", ARCHITECTURE, "--define"])
            .arg(format!("_topdir {}", scratch.join("topdir").display()))
            .arg("--define")
            .arg(format!("_rpmdir {}", release.out.display()))
            .args(["--define", "_build_name_fmt %%{NAME}-%%{VERSION}-%%{RELEASE}.%%{ARCH}.rpm"])
            .arg(&spec)
            .env("SOURCE_DATE_EPOCH", &release.time),
    )?;
    let file =
        release.out.join(format!("{}-{}-1.{ARCHITECTURE}.rpm", package.name, release.version));
    check(&file, &shipped)?;
    Ok(file)
}

/// The package lists exactly the staged files.
fn check(file: &Path, shipped: &[PathBuf]) -> Result<()> {
    let listed = run::output(Command::new("rpm").args(["-qlp", "--noartifact"]).arg(file))?;
    let listed: BTreeSet<PathBuf> = listed.lines().map(PathBuf::from).collect();
    let missing: Vec<_> =
        shipped.iter().filter(|path| !listed.contains(&Path::new("/").join(path))).collect();
    ensure!(missing.is_empty(), "{} lacks {missing:?}", file.display());
    let own = own_folders(shipped);
    let unknown: Vec<_> = listed
        .iter()
        .filter_map(|path| path.strip_prefix("/").ok())
        .filter(|path| !shipped.iter().any(|file| file == path) && !own.contains(*path))
        .collect();
    ensure!(unknown.is_empty(), "{} has {unknown:?} besides", file.display());
    Ok(())
}

/// Folders that belong to the packages alone, and are removed with them.
fn own_folders(shipped: &[PathBuf]) -> BTreeSet<PathBuf> {
    shipped
        .iter()
        .flat_map(|file| file.ancestors().skip(1))
        .filter(|folder| folder.components().any(|part| is_ours(part.as_os_str())))
        .map(Path::to_owned)
        .collect()
}

fn is_ours(name: &std::ffi::OsStr) -> bool {
    super::PACKAGES.iter().any(|package| *package.name == *name)
}

fn spec_file(
    package: &Package,
    release: &Release,
    root: &Path,
    shipped: &[PathBuf],
) -> Result<String> {
    let requires = package.depends.iter().map(|name| match name.strip_suffix(" =") {
        Some(name) => format!("Requires: {name} = {}-1\n", release.version),
        None => format!("Requires: {name}\n"),
    });
    let recommends = package.recommends.iter().map(|name| format!("Recommends: {name}\n"));
    let mut text = format!(
        "# Binaries are built, stripped and linked statically before.\n\
         %global __os_install_post %{{nil}}\n\
         %global debug_package %{{nil}}\n\
         %global _build_id_links none\n\
         %global use_source_date_epoch_as_buildtime 1\n\
         %global clamp_mtime_to_source_date_epoch 1\n\
         %global _buildhost reproducible\n\
         %global _binary_payload {}\n\
         Name: {}\nVersion: {}\nRelease: 1\nSummary: {}\nLicense: Apache-2.0 and GPLv2\n\
         Packager: {}\nAutoReqProv: no\n{}{}\n\
         %description\n{}\n\n\
         %install\nmkdir -p %{{buildroot}}\ncp -a {}/. %{{buildroot}}/\n\n",
        if release.fast { "w1.gzdio" } else { "w6.xzdio" },
        package.name,
        release.version,
        package.summary,
        release.maintainer,
        requires.collect::<String>(),
        recommends.collect::<String>(),
        package.description,
        root.display(),
    );
    for script in SCRIPTS {
        let source = paths::repo().join("packaging/rpm").join(format!("{}.{script}", package.name));
        if source.exists() {
            let body = fs::read_to_string(&source)
                .with_context(|| format!("reading {}", source.display()))?;
            // A percent sign would be a macro.
            text.push_str(&format!("%{script}\n{}\n", body.replace('%', "%%")));
        }
    }
    text.push_str("%files\n%defattr(-,root,root,0755)\n");
    for folder in own_folders(shipped) {
        text.push_str(&format!("%dir /{}\n", folder.display()));
    }
    for file in shipped {
        let kind = match file {
            file if file.starts_with("etc") => "%config(noreplace) ",
            file if file.starts_with("usr/share/licenses") => "%license ",
            file if file.starts_with("usr/share/doc") || file.starts_with("usr/share/man") => {
                "%doc "
            }
            _ => "",
        };
        text.push_str(&format!("{kind}/{}\n", file.display()));
    }
    Ok(text)
}
