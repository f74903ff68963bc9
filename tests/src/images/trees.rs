//! Root file systems from Debian packages, and the files of them that are in layers.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// To be increased when trees change in a way that is not part of the images' recipes.
pub const RECIPE: &str = "2";

/// Directories that are kept without their contents.
const EMPTIED: &[&str] = &["dev", "proc", "sys", "tmp", "var/cache", "var/lib/apt", "var/lib/dpkg"];
/// Paths that no story needs: documentation, encodings, and PostgreSQL's JIT compiler.
const DROPPED: &[&str] = &[
    "usr/share/doc",
    "usr/share/man",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/i18n",
    "usr/share/lintian",
    "usr/share/bug",
    "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/libLLVM",
    "usr/lib/x86_64-linux-gnu/libz3",
    "usr/lib/llvm",
    "usr/lib/x86_64-linux-gnu/perl/",
    "usr/lib/x86_64-linux-gnu/libperl",
    "usr/share/perl/",
    "usr/lib/postgresql/15/lib/bitcode",
    "usr/lib/postgresql/15/lib/llvmjit",
    "var/log/apt",
    "var/log/dpkg",
    "var/log/alternatives",
    "var/log/bootstrap",
    "etc/machine-id",
];

/// Installs packages on top of the essential ones.
pub fn debian(tree: &Path, packages: &[&str], finish: &str, sources: Option<&Path>) -> Result<()> {
    let mut options = vec![
        "--variant=essential".to_owned(),
        // No database cluster of Debian's package.
        r#"--essential-hook=mkdir -p "$1/etc/postgresql-common"
           echo "create_main_cluster = false" > "$1/etc/postgresql-common/createcluster.conf""#
            .to_owned(),
    ];
    if !packages.is_empty() {
        options.push(format!("--include={}", packages.join(",")));
    }
    if !finish.is_empty() {
        options.push(format!("--customize-hook=set -e\n{finish}"));
    }
    mmdebstrap(tree, &options, sources)
}

/// Paths of the first layer (C library, /etc) and of the second (busybox with its applets). A few
/// MB, since most stories pull it.
pub fn busybox(tree: &Path, sources: Option<&Path>) -> Result<(Vec<PathBuf>, Vec<PathBuf>)> {
    let options =
        ["--variant=extract".to_owned(), "--include=busybox,base-passwd,libc6".to_owned()];
    let extracted = tree.with_extension("extracted");
    mmdebstrap(&extracted, &options, sources)?;
    for folder in [
        "bin",
        "dev",
        "etc",
        "lib64",
        "proc",
        "root",
        "run",
        "sbin",
        "srv",
        "sys",
        "tmp",
        "usr/bin",
        "usr/sbin",
        "var",
        "lib/x86_64-linux-gnu",
    ] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::set_permissions(tree.join("tmp"), PermissionsExt::from_mode(0o1777))?;
    fs::set_permissions(tree.join("root"), PermissionsExt::from_mode(0o700))?;
    let take = |from: &str, to: &str| -> Result<()> {
        fs::copy(extracted.join(from), tree.join(to)).with_context(|| format!("copying {from}"))?;
        Ok(())
    };
    take("usr/share/base-passwd/passwd.master", "etc/passwd")?;
    take("usr/share/base-passwd/group.master", "etc/group")?;
    let loader = "lib64/ld-linux-x86-64.so.2";
    take(loader, loader)?;
    for library in
        ["libc.so.6", "libm.so.6", "libresolv.so.2", "libnss_files.so.2", "libnss_dns.so.2"]
    {
        let path = format!("lib/x86_64-linux-gnu/{library}");
        take(&path, &path)?;
    }
    fs::write(tree.join("etc/nsswitch.conf"), "passwd: files\ngroup: files\nhosts: files dns\n")?;
    let library = walk(tree, &|_| true)?;
    take("bin/busybox", "bin/busybox")?;
    fs::set_permissions(tree.join("bin/busybox"), PermissionsExt::from_mode(0o755))?;
    let listed = Command::new("chroot").arg(tree).args(["/bin/busybox", "--list-full"]).output()?;
    ensure!(listed.status.success(), "busybox --list-full: {listed:?}");
    let applets = String::from_utf8(listed.stdout)?;
    for applet in applets.lines().chain(["bin/taken-away"]) {
        let path = tree.join(applet);
        fs::create_dir_all(path.parent().context("an applet is in a folder")?)?;
        if !path.exists() {
            fs::hard_link(tree.join("bin/busybox"), path)?;
        }
    }
    let all = walk(tree, &|_| true)?;
    let program = all.into_iter().filter(|path| !library.contains(path)).collect();
    Ok((library, program))
}

fn mmdebstrap(tree: &Path, options: &[String], sources: Option<&Path>) -> Result<()> {
    fs::create_dir_all(tree)?;
    let output = Command::new("mmdebstrap")
        .args(["--quiet", "--mode=root", "--aptopt=APT::Install-Recommends \"false\""])
        .arg("--dpkgopt=force-unsafe-io")
        .args(options)
        .arg("bookworm")
        .arg(tree)
        .args(sources)
        .stdin(Stdio::null())
        .env("LC_ALL", "C.UTF-8")
        .output()
        .context("running mmdebstrap (Debian package mmdebstrap)")?;
    ensure!(
        output.status.success(),
        "mmdebstrap for {} failed: {}",
        tree.display(),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

/// Creates a directory that is owned by a user of the tree.
pub fn folder(tree: &Path, path: &str, owner: &str) -> Result<()> {
    let status = Command::new("chroot")
        .arg(tree)
        .args(["install", "-d", "-o", owner, "-g", owner, path])
        .status()
        .context("running chroot")?;
    ensure!(status.success(), "making {path} in {} failed", tree.display());
    Ok(())
}

/// Paths for a layer, parents first.
pub fn files(tree: &Path) -> Result<Vec<PathBuf>> {
    walk(tree, &is_included)
}

/// Paths that are new or different in a tree compared with another.
pub fn changed(tree: &Path, base: &Path) -> Result<Vec<PathBuf>> {
    let mut list = Vec::new();
    for path in files(tree)? {
        if !same(&tree.join(&path), &base.join(&path))? {
            list.push(path);
        }
    }
    Ok(list)
}

fn is_included(path: &Path) -> bool {
    let text = path.to_string_lossy();
    let inside = |folder: &&str| text.starts_with(*folder) && text[folder.len()..].starts_with('/');
    !EMPTIED.iter().any(inside) && !DROPPED.iter().any(|p| text.starts_with(p))
}

fn walk(tree: &Path, included: &dyn Fn(&Path) -> bool) -> Result<Vec<PathBuf>> {
    let mut list = Vec::new();
    let mut folders = vec![PathBuf::new()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(tree.join(&folder))? {
            let entry = entry?;
            let path = folder.join(entry.file_name());
            if included(&path) {
                if entry.file_type()?.is_dir() {
                    folders.push(path.clone());
                }
                list.push(path);
            }
        }
    }
    list.sort();
    Ok(list)
}

fn same(one: &Path, other: &Path) -> Result<bool> {
    let a = one.symlink_metadata()?;
    let Ok(b) = other.symlink_metadata() else { return Ok(false) };
    if a.mode() != b.mode() || a.uid() != b.uid() || a.gid() != b.gid() {
        return Ok(false);
    }
    if a.is_symlink() {
        return Ok(fs::read_link(one)? == fs::read_link(other)?);
    }
    Ok(!a.is_file() || (a.len() == b.len() && fs::read(one)? == fs::read(other)?))
}

/// A reproducible tar archive of the given paths.
pub fn tar(tree: &Path, paths: &[PathBuf]) -> Result<Vec<u8>> {
    let mut child = Command::new("tar")
        .args(["--create", "--format=pax", "--numeric-owner", "--xattrs", "--no-recursion"])
        .args(["--mtime=@1700000000", "--pax-option=delete=atime,delete=ctime"])
        .arg("--directory")
        .arg(tree)
        .args(["--null", "--files-from=-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .context("running tar")?;
    let mut stdin = child.stdin.take().context("tar's input is a pipe")?;
    let names: Vec<u8> = paths
        .iter()
        .flat_map(|path| [path.as_os_str().as_encoded_bytes(), b"\0"].concat())
        .collect();
    let writer = std::thread::spawn(move || stdin.write_all(&names));
    let output = child.wait_with_output()?;
    ensure!(output.status.success(), "tar of {} failed: {}", tree.display(), output.status);
    writer.join().map_err(|_| anyhow::anyhow!("the thread feeding tar panicked"))??;
    Ok(output.stdout)
}
