//! Debian's own cloud kernel: it runs the lab's outer machine, and a test boots it in our VMM to
//! prove that a stock distribution kernel works there. The package is unpacked, never installed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::{debs, paths, run};

/// What our devices and root file systems need of the stock kernel, most basic first.
const GUEST_MODULES: &[&str] = &[
    "virtio_pci",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "virtio-rng",
    "vsock",
    "vmw_vsock_virtio_transport",
    "ext4",
    // The format of ext4's project quotas, which `prjquota` asks for by request_module().
    "quota_v2",
    "erofs",
    "overlay",
    "virtiofs",
];

/// An unpacked kernel package.
pub(crate) struct DebianKernel {
    pub(crate) version: String,
    root: PathBuf,
}

impl DebianKernel {
    pub(crate) fn vmlinuz(&self) -> PathBuf {
        self.root.join("boot").join(format!("vmlinuz-{}", self.version))
    }

    /// The folder that `modprobe` knows as `/lib/modules/VERSION`.
    pub(crate) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules").join(&self.version)
    }

    /// The files of `names` and of all they depend on, in an order in which they load.
    pub(crate) fn module_files(&self, names: &[&str]) -> Result<Vec<PathBuf>> {
        let dir = self.modules();
        let dep = fs::read_to_string(dir.join("modules.dep"))?;
        let builtin = fs::read_to_string(dir.join("modules.builtin"))?;
        let is = |path: &str, name: &str| {
            let file = path.rsplit('/').next().unwrap_or(path);
            file.strip_suffix(".ko").is_some_and(|s| s.replace('-', "_") == name.replace('-', "_"))
        };
        let mut files: Vec<&str> = Vec::new();
        for name in names {
            let Some((file, needs)) = dep
                .lines()
                .filter_map(|line| line.split_once(':'))
                .find(|(file, _)| is(file, name))
            else {
                ensure!(
                    builtin.lines().any(|line| is(line, name)),
                    "no module {name} in {}",
                    self.version
                );
                continue;
            };
            // modules.dep lists what a module needs with the most basic last.
            for file in needs.split_whitespace().rev().chain([file]) {
                if !files.contains(&file) {
                    files.push(file);
                }
            }
        }
        Ok(files.into_iter().map(|file| dir.join(file)).collect())
    }
}

/// The kernel that linux-image-cloud-amd64 stands for.
pub(crate) fn ensure_unpacked() -> Result<DebianKernel> {
    let parent = paths::cache()?.join("debian-kernel");
    // Once chosen it stays, as in `debs::fetch`: asking apt takes longer than starting the lab.
    let chosen = parent.join("package");
    let package = match fs::read_to_string(&chosen) {
        Ok(package) => package.trim().to_owned(),
        Err(_) => {
            let package = debs::behind("linux-image-cloud-amd64")?;
            fs::create_dir_all(&parent)?;
            fs::write(&chosen, &package)?;
            package
        }
    };
    let version = package.trim_start_matches("linux-image-").to_owned();
    let root = paths::cached("debian-kernel", &version, |dir| {
        debs::unpack(&debs::fetch(&package)?, dir)?;
        run::quiet(Command::new("depmod").arg("-b").arg(dir).arg(&version))
    })?;
    Ok(DebianKernel { version, root })
}

/// `cargo xtask debian-kernel`: vmlinuz, the ELF image inside it, modules and their order.
pub(crate) fn run() -> Result<i32> {
    let kernel = ensure_unpacked()?;
    let out = paths::guest().join("debian");
    fs::create_dir_all(out.join("modules"))?;
    fs::copy(kernel.vmlinuz(), out.join("vmlinuz"))?;
    fs::write(out.join("vmlinux"), elf_inside(&kernel.vmlinuz())?)?;
    let mut list = String::new();
    for file in kernel.module_files(GUEST_MODULES)? {
        let name = file.file_name().context("a module has a name")?;
        fs::copy(&file, out.join("modules").join(name))?;
        list.push_str(&format!("{}\n", name.to_string_lossy()));
    }
    fs::write(out.join("modules.list"), list)?;
    fs::write(out.join("version"), format!("{}\n", kernel.version))?;
    Ok(0)
}

/// The ELF kernel that a bzImage carries compressed. Boot protocol 2.08 and later give its place
/// (`Documentation/x86/boot.rst`: setup_sects, payload_offset, payload_length).
fn elf_inside(bzimage: &Path) -> Result<Vec<u8>> {
    const SETUP_SECTS: usize = 0x1f1;
    const PAYLOAD_OFFSET: usize = 0x248;
    const PAYLOAD_LENGTH: usize = 0x24c;
    let image = fs::read(bzimage)?;
    let word = |at: usize| -> Result<usize> {
        let bytes = image.get(at..at + 4).context("the kernel image is truncated")?;
        Ok(u32::from_le_bytes(bytes.try_into()?) as usize)
    };
    let sectors = usize::from(*image.get(SETUP_SECTS).context("the kernel image is truncated")?);
    let start = (sectors + 1) * 512 + word(PAYLOAD_OFFSET)?;
    let payload =
        image.get(start..start + word(PAYLOAD_LENGTH)?).context("the payload lies outside")?;
    let unpacker: &[&str] = match payload {
        [0xfd, b'7', b'z', b'X', ..] => &["xz", "-dc"],
        [0x1f, 0x8b, ..] => &["gzip", "-dc"],
        [0x02, 0x21, 0x4c, 0x18, ..] => &["lz4", "-dcq"],
        [0x28, 0xb5, 0x2f, 0xfd, ..] => &["zstd", "-dcq"],
        other => {
            bail!("unknown packing {:02x?} of {}", &other[..4.min(other.len())], bzimage.display())
        }
    };
    // Through a file, so that no pipe can fill up while nobody reads the other one. The payload
    // ends with its unpacked length, which the programs report as trailing garbage.
    let packed = tempfile::NamedTempFile::new()?;
    fs::write(packed.path(), payload)?;
    let out = Command::new(unpacker[0])
        .args(&unpacker[1..])
        .stdin(fs::File::open(packed.path())?)
        .stderr(Stdio::null())
        .output()
        .with_context(|| format!("starting {}", unpacker[0]))?;
    ensure!(out.stdout.starts_with(b"\x7fELF"), "no ELF image inside {}", bzimage.display());
    Ok(out.stdout)
}
