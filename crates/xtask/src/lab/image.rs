//! What the outer machine boots: Debian's cloud kernel, a small initramfs that finds the root
//! disk, the root disk itself, and an empty scratch disk. All cached by what they are made of.
//!
//! The image is made without loop devices: mmdebstrap fills a folder, `mke2fs -d` turns it into
//! an ext4 file.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use crate::cpio::Archive;
use crate::debian_kernel::{self, DebianKernel};
use crate::{debs, paths, run};

const INITRD_SCRIPT: &str = include_str!("../../lab/initrd.sh");
const INIT_SCRIPT: &str = include_str!("../../lab/init.sh");

/// Raised when the recipe changes in a way that the package list does not show.
const RECIPE: &str = "2";

/// What the host of a container runtime has, what the tests call, and QEMU as the benches' peer.
const PACKAGES: &[&str] = &[
    "iproute2",
    "iptables",
    "nftables",
    "ethtool",
    "conntrack",
    "iputils-ping",
    "tcpdump",
    "netcat-openbsd",
    "socat",
    "curl",
    "openssl",
    "apparmor",
    "ca-certificates",
    "containernetworking-plugins",
    "containerd",
    "runc",
    "docker-registry",
    "skopeo",
    "kmod",
    "mount",
    "util-linux",
    "procps",
    "psmisc",
    "busybox-static",
    "strace",
    "jq",
    "e2fsprogs",
    "erofs-utils",
    "xz-utils",
    "zstd",
];

/// What a bare Debian 12 with systemd has, and what the tests of packages call besides.
const SYSTEMD_PACKAGES: &[&str] =
    &["systemd-sysv", "udev", "dbus", "iproute2", "kmod", "procps", "mount"];

/// What the packages depend on, and what is tested with them: in apt's cache, not installed.
const SYSTEMD_CACHED: &[&str] =
    &["containernetworking-plugins", "e2fsprogs", "iptables", "containerd", "runc"];

/// Starts the command of the lab where systemd is PID 1.
const SYSTEMD_UNIT: &str = "[Unit]\nDescription=The command of the lab\n\
    After=basic.target dbus.service\n\
    [Service]\nExecStart=/lab/init\nTasksMax=infinity\nLimitNOFILE=1048576\n\
    [Install]\nWantedBy=multi-user.target\n";

/// From backports where there is one, like the QEMU that runs the lab itself.
const QEMU_PACKAGES: &[&str] =
    &["qemu-system-x86", "qemu-system-common", "qemu-system-data", "seabios"];

/// What must be loaded before there is a root disk and a way to report.
const INITRD_MODULES: &[&str] = &["virtio_pci", "virtio_blk", "virtio_console", "ext4"];

/// Debian release of the lab's root file system. The kernel is always bookworm's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Release {
    /// containerd 1.6
    Bookworm,
    /// containerd 1.7
    Trixie,
    /// containerd 2.x
    Sid,
}

impl Release {
    fn name(self) -> &'static str {
        match self {
            Self::Bookworm => "bookworm",
            Self::Trixie => "trixie",
            Self::Sid => "sid",
        }
    }

    /// Name of its root file system in the cache. Without a name of the release for bookworm.
    fn key(self, kernel: &DebianKernel) -> String {
        let packages = self.packages().join(",");
        let parts = [RECIPE.as_bytes(), kernel.version.as_bytes(), packages.as_bytes()];
        match self {
            Self::Bookworm => run::key(parts),
            Self::Trixie | Self::Sid => run::key(parts.into_iter().chain([self.name().as_bytes()])),
        }
    }

    /// QEMU is for the benchmarks, which run on bookworm.
    fn packages(self) -> Vec<&'static str> {
        let qemu = if self == Self::Bookworm { QEMU_PACKAGES } else { &[] };
        PACKAGES.iter().chain(qemu).copied().collect()
    }

    /// apt sources of this release, from the same mirrors as bookworm's.
    fn sources(self, bookworm: &str) -> String {
        let lines = bookworm.lines().filter(|line| !line.contains("-backports"));
        match self {
            Self::Bookworm => bookworm.to_owned(),
            Self::Trixie => lines.map(|line| line.replace(" bookworm", " trixie") + "\n").collect(),
            // It has neither updates nor security updates.
            Self::Sid => lines
                .filter(|line| line.ends_with(" bookworm main"))
                .map(|line| line.replace(" bookworm", " sid") + "\n")
                .collect(),
        }
    }
}

/// Virtual size of the scratch disk; the file is sparse, and a run's writes go to its snapshot.
const SCRATCH_SIZE: &str = "24G";

/// Files to start an outer machine from.
pub(super) struct Image {
    pub(super) kernel: PathBuf,
    pub(super) initrd: PathBuf,
    pub(super) root: PathBuf,
    pub(super) scratch: PathBuf,
    /// More of the kernel's command line.
    pub(super) cmdline: &'static str,
}

/// With systemd as PID 1 and nothing that nacelle needs installed.
pub(super) fn ensure_systemd() -> Result<Image> {
    let kernel = debian_kernel::ensure_unpacked()?;
    let packages = [SYSTEMD_PACKAGES.join(","), SYSTEMD_CACHED.join(",")].join(";");
    let key = run::key([
        RECIPE.as_bytes(),
        kernel.version.as_bytes(),
        packages.as_bytes(),
        SYSTEMD_UNIT.as_bytes(),
    ]);
    let root = paths::cached("lab", &key, |dir| {
        run::stage("making the lab's root file system with systemd", || {
            make_systemd_root(dir, &kernel)
        })
    })?;
    with_initrd(kernel, root, &key, "lab.systemd")
}

pub(super) fn ensure(release: Release) -> Result<Image> {
    let kernel = debian_kernel::ensure_unpacked()?;
    let key = release.key(&kernel);
    let root = paths::cached("lab", &key, |dir| {
        let what = format!("making the lab's root file system ({})", release.name());
        run::stage(&what, || make_root(dir, release, &kernel))
    })?;
    with_initrd(kernel, root, &key, "")
}

fn with_initrd(
    kernel: DebianKernel,
    root: PathBuf,
    key: &str,
    cmdline: &'static str,
) -> Result<Image> {
    let key = run::key([
        key.as_bytes(),
        INITRD_SCRIPT.as_bytes(),
        INIT_SCRIPT.as_bytes(),
        INITRD_MODULES.join(",").as_bytes(),
    ]);
    let initrd = paths::cached("lab-initrd", &key, |dir| make_initrd(dir, &root, &kernel))?;
    Ok(Image {
        kernel: kernel.vmlinuz(),
        initrd: initrd.join("initrd.cpio"),
        root: root.join("root.ext4"),
        scratch: root.join("scratch.ext4"),
        cmdline,
    })
}

fn make_root(dir: &Path, release: Release, kernel: &DebianKernel) -> Result<()> {
    let text = release.sources(&fs::read_to_string(debs::sources()?)?);
    let backports = text.contains("bookworm-backports");
    let include: Vec<_> = release
        .packages()
        .into_iter()
        .map(|package| match backports && QEMU_PACKAGES.contains(&package) {
            true => format!("{package}/bookworm-backports"),
            false => package.to_owned(),
        })
        .collect();
    let tree = dir.join("tree");
    let sources = dir.join("sources.list");
    fs::write(&sources, text)?;
    bootstrap(&tree, release, &include, &sources)?;
    fs::remove_file(&sources)?;
    add_modules(&tree, kernel)?;
    for folder in ["lab", "nacelle", "root", "etc/cni/net.d", "opt/cni", "var/lib/nacelle"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    // Debian's place of the CNI plugins, under the name that everybody else uses.
    std::os::unix::fs::symlink("/usr/lib/cni", tree.join("opt/cni/bin"))?;
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost lab\n::1 localhost\n")?;
    fs::write(tree.join("etc/hostname"), "lab\n")?;
    fs::write(tree.join("etc/resolv.conf"), "nameserver 127.0.0.1\n")?;
    fs::copy(tree.join("bin/busybox"), dir.join("busybox"))?;

    make_ext4(&dir.join("root.ext4"), "8G", Some(&tree))?;
    fs::remove_dir_all(&tree)?;
    make_ext4(&dir.join("scratch.ext4"), SCRATCH_SIZE, None)
}

fn make_systemd_root(dir: &Path, kernel: &DebianKernel) -> Result<()> {
    let tree = dir.join("tree");
    let download = format!(
        "APT_CONFIG=\"$MMDEBSTRAP_APT_CONFIG\" apt-get --yes --download-only install {}",
        SYSTEMD_CACHED.join(" ")
    );
    run::quiet(
        Command::new("mmdebstrap")
            .args(["--quiet", "--variant=minbase", "--skip=cleanup/apt"])
            .arg(format!("--include={}", SYSTEMD_PACKAGES.join(",")))
            .args(["--aptopt=APT::Install-Recommends \"false\"", "--dpkgopt=force-unsafe-io"])
            .arg(format!("--customize-hook={download}"))
            .arg("bookworm")
            .arg(&tree)
            .arg(debs::sources()?),
    )?;
    add_modules(&tree, kernel)?;
    for folder in ["lab", "nacelle"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::write(tree.join("etc/hosts"), "127.0.0.1 localhost lab\n::1 localhost\n")?;
    fs::write(tree.join("etc/hostname"), "lab\n")?;
    fs::write(tree.join("etc/resolv.conf"), "nameserver 127.0.0.1\n")?;
    // Not the first boot, in which systemd asks questions and applies presets.
    fs::write(tree.join("etc/machine-id"), "6e6163656c6c65206c61622073797374\n")?;
    let units = tree.join("etc/systemd/system");
    fs::write(units.join("lab.service"), SYSTEMD_UNIT)?;
    let wants = units.join("multi-user.target.wants");
    fs::create_dir_all(&wants)?;
    std::os::unix::fs::symlink("../lab.service", wants.join("lab.service"))?;
    let busybox = dir.join("unpacked");
    debs::unpack(&debs::fetch("busybox-static")?, &busybox)?;
    fs::copy(busybox.join("bin/busybox"), dir.join("busybox"))?;
    fs::remove_dir_all(&busybox)?;

    make_ext4(&dir.join("root.ext4"), "8G", Some(&tree))?;
    fs::remove_dir_all(&tree)?;
    make_ext4(&dir.join("scratch.ext4"), SCRATCH_SIZE, None)
}

fn add_modules(tree: &Path, kernel: &DebianKernel) -> Result<()> {
    let modules = tree.join("usr/lib/modules");
    fs::create_dir_all(&modules)?;
    run::quiet(Command::new("cp").arg("-a").arg(kernel.modules()).arg(&modules))
}

/// A Debian tree without documentation, made by mmdebstrap.
fn bootstrap(tree: &Path, release: Release, include: &[String], sources: &Path) -> Result<()> {
    let mut command = Command::new("mmdebstrap");
    if release == Release::Sid {
        // Its Release file is valid for a week; a mirror may be older.
        command.arg("--aptopt=Acquire::Check-Valid-Until \"false\"");
    }
    run::quiet(
        command
            .args(["--quiet", "--variant=essential"])
            .arg(format!("--include={}", include.join(",")))
            .args([
                "--aptopt=APT::Install-Recommends \"false\"",
                "--dpkgopt=force-unsafe-io",
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/info/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
            ])
            .arg(release.name())
            .arg(tree)
            .arg(sources),
    )
}

fn make_ext4(file: &Path, size: &str, content: Option<&Path>) -> Result<()> {
    let mut command = Command::new("mke2fs");
    // Without a journal: the disk is a snapshot that no run keeps.
    command.args(["-q", "-t", "ext4", "-m", "0", "-O", "^has_journal"]);
    command.args(["-E", "lazy_itable_init=1,nodiscard"]);
    if let Some(tree) = content {
        command.arg("-d").arg(tree);
    }
    run::quiet(command.arg(file).arg(size))
}

fn make_initrd(dir: &Path, root: &Path, kernel: &DebianKernel) -> Result<()> {
    let mut archive = Archive::default();
    for folder in ["proc", "sys", "dev", "root", "modules"] {
        archive.directory(folder);
    }
    archive.character_device("dev/console", 0o600, 5, 1);
    archive.file("bin/busybox", 0o755, &fs::read(root.join("busybox"))?);
    archive.file("init", 0o755, INITRD_SCRIPT.as_bytes());
    archive.file("lab-init", 0o755, INIT_SCRIPT.as_bytes());
    let mut order = String::new();
    for file in kernel.module_files(INITRD_MODULES)? {
        let name = file.file_name().context("a module has a name")?.to_string_lossy().into_owned();
        archive.file(&format!("modules/{name}"), 0o644, &fs::read(&file)?);
        order.push_str(&format!("/modules/{name}\n"));
    }
    archive.file("modules.order", 0o644, order.as_bytes());
    fs::write(dir.join("initrd.cpio"), archive.finish())?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_apt_sources_of_other_releases_are_on_bookworms_mirrors() {
        let bookworm = "deb [signed-by=/k] http://a/debian-security/ bookworm-security main\n\
            deb [signed-by=/k] http://a/debian/ bookworm main\n\
            deb [signed-by=/k] http://a/debian/ bookworm-backports main\n\
            deb [signed-by=/k] http://a/debian/ bookworm-updates main\n";
        assert_eq!(Release::Bookworm.sources(bookworm), bookworm);
        let trixie = "deb [signed-by=/k] http://a/debian-security/ trixie-security main\n\
            deb [signed-by=/k] http://a/debian/ trixie main\n\
            deb [signed-by=/k] http://a/debian/ trixie-updates main\n";
        assert_eq!(Release::Trixie.sources(bookworm), trixie);
        let sid = "deb [signed-by=/k] http://a/debian/ sid main\n";
        assert_eq!(Release::Sid.sources(bookworm), sid);
    }
}
