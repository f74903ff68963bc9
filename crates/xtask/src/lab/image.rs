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

pub(super) fn ensure() -> Result<Image> {
    let kernel = debian_kernel::ensure_unpacked()?;
    let packages: Vec<_> = PACKAGES.iter().chain(QEMU_PACKAGES).copied().collect();
    let key =
        run::key([RECIPE.as_bytes(), kernel.version.as_bytes(), packages.join(",").as_bytes()]);
    let root = paths::cached("lab", &key, |dir| {
        run::stage("making the lab's root file system", || make_root(dir, &kernel))
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

fn make_root(dir: &Path, kernel: &DebianKernel) -> Result<()> {
    let sources = debs::sources()?;
    let backports = fs::read_to_string(&sources)?.contains("bookworm-backports");
    let mut include: Vec<_> = PACKAGES.iter().map(|&package| package.to_owned()).collect();
    include.extend(QEMU_PACKAGES.iter().map(|package| match backports {
        true => format!("{package}/bookworm-backports"),
        false => (*package).to_owned(),
    }));
    let tree = dir.join("tree");
    bootstrap(&tree, &include, &sources)?;
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
pub(crate) fn bootstrap(tree: &Path, include: &[String], sources: &Path) -> Result<()> {
    run::quiet(
        Command::new("mmdebstrap")
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
            .arg("bookworm")
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
