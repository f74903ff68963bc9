//! Directories and mounts that a story creates on the host; removed on drop.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// A folder on the host's disk.
pub fn folder() -> Result<tempfile::TempDir> {
    let top = Path::new("/var/lib/nacelle-stories");
    std::fs::create_dir_all(top)?;
    tempfile::tempdir_in(top).context("a folder on the host")
}

/// A tmpfs that is mounted on the host.
pub struct Tmpfs(PathBuf);

impl Tmpfs {
    /// Creates the mount point, too.
    pub fn mount(at: &Path, options: &str) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        run("mount", &["-t", "tmpfs", "-o", options, "tmpfs"], at)?;
        Ok(Self(at.to_owned()))
    }

    /// Huge pages, as a kubelet mounts them for an `emptyDir`.
    pub fn huge_pages(at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        run("mount", &["-t", "hugetlbfs", "-o", "pagesize=2M", "none"], at)?;
        Ok(Self(at.to_owned()))
    }

    /// With shared propagation.
    pub fn shared(at: &Path) -> Result<Self> {
        let tmpfs = Self::mount(at, "size=16m")?;
        run("mount", &["--make-shared"], at)?;
        Ok(tmpfs)
    }

    /// Fails if anything still uses it.
    pub fn unmount(self) -> Result<()> {
        run("umount", &[], &self.0)
    }
}

impl Drop for Tmpfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// A bind mount of a directory of the host.
pub struct Bind(PathBuf);

impl Bind {
    /// Creates the mount point, too.
    pub fn mount(from: &Path, at: &Path) -> Result<Self> {
        std::fs::create_dir_all(at)?;
        let from = from.to_str().context("the path of a bind mount")?;
        run("mount", &["--bind", from], at)?;
        Ok(Self(at.to_owned()))
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    /// Fails if anything still uses it.
    pub fn unmount(self) -> Result<()> {
        run("umount", &[], &self.0)
    }
}

impl Drop for Bind {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).output();
    }
}

/// Unmounts a mount of another process.
pub fn unmount(at: &Path) -> Result<()> {
    run("umount", &[], at)
}

fn run(program: &str, options: &[&str], path: &Path) -> Result<()> {
    let output = Command::new(program).args(options).arg(path).output()?;
    let stderr = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {options:?} {}: {stderr}", path.display());
    Ok(())
}
