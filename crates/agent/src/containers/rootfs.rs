//! A container's root file system: the image's EROFS disk below, an ext4 scratch disk (or a tmpfs)
//! above, joined by overlayfs at `<base>/containers/<id>/rootfs`.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use agent_api::v1;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use crate::agent::Agent;
use crate::error::{Doing, Error, Result};
use crate::guest::devices;

/// A container's mount namespace goes away a moment after its last process.
const BUSY_DEADLINE: Duration = Duration::from_secs(5);

/// The scratch disk lives no longer than the pod: nothing on it has to survive a crash, so no
/// barriers; what is deleted is given back to the host.
const EXT4_OPTIONS: &str = "discard,nobarrier";

/// Mounted EROFS images and how many containers stand on each, by serial.
#[derive(Debug, Default)]
pub struct Disks(HashMap<String, usize>);

#[derive(Debug)]
pub struct Rootfs {
    dir: PathBuf,
    /// Serial of the image whose count this container raises.
    image: Option<String>,
    /// What is mounted, in order.
    mounted: Vec<PathBuf>,
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    // Disks are read and written while mounting: not on the thread that serves streams.
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Helper { doing: "mount", why: error.to_string() })?
}

fn mount_at(source: &Path, target: &Path, kind: &str, flags: MsFlags, data: &str) -> Result<()> {
    let what = || format!("mount {} ({kind}) at {}", source.display(), target.display());
    fs::create_dir_all(target).doing(what)?;
    mount(Some(source), target, Some(kind), flags, Some(data)).doing(what)
}

async fn unmount(target: &Path) -> Result<()> {
    let deadline = tokio::time::Instant::now() + BUSY_DEADLINE;
    let mut pause = Duration::from_millis(1);
    loop {
        let path = target.to_owned();
        let result = blocking(move || Ok(umount2(&path, MntFlags::UMOUNT_NOFOLLOW))).await?;
        match result {
            // EINVAL: not a mount point (any more).
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => return Ok(()),
            Err(Errno::EBUSY) if tokio::time::Instant::now() < deadline => {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(Duration::from_millis(100));
            }
            Err(error) => {
                return Err(error).doing(|| format!("unmount {}", target.display()));
            }
        }
    }
}

impl Rootfs {
    pub async fn mount(agent: &Agent, id: &str, wanted: &v1::RootFs) -> Result<Self> {
        let mut rootfs = Self {
            dir: agent.config.base.join("containers").join(id),
            image: None,
            mounted: Vec::new(),
        };
        match rootfs.build(agent, wanted).await {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                if let Err(second) = rootfs.unmount(agent).await {
                    tracing::error!(container = id, error = %second.chain(), "left behind");
                }
                Err(error)
            }
        }
    }

    async fn build(&mut self, agent: &Agent, wanted: &v1::RootFs) -> Result<()> {
        let lower = self.lower(agent, &wanted.lower_serial).await?;
        let upper = self.dir.join("upper");
        let source = wanted.upper_serial.clone();
        let target = upper.clone();
        blocking(move || {
            let flags = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
            if source.is_empty() {
                let flags = flags | MsFlags::MS_NOSUID;
                return mount_at(Path::new("upper"), &target, "tmpfs", flags, "mode=0755");
            }
            mount_at(&devices::disk_node(&source)?, &target, "ext4", flags, EXT4_OPTIONS)
        })
        .await?;
        self.mounted.push(upper.clone());
        let target = self.path();
        let at = target.clone();
        blocking(move || {
            let (data, work) = (upper.join("data"), upper.join("work"));
            // A disk that was used before carries the mark of a volatile mount, which overlayfs
            // refuses; within one boot what was written is there all the same.
            let _ = fs::remove_dir_all(&work);
            for dir in [&data, &work] {
                fs::create_dir_all(dir).doing(|| format!("make {}", dir.display()))?;
            }
            // metacopy off: a file's metadata must not depend on the image staying attached.
            // volatile: the layer dies with the pod, so syncing it is of no use to anybody.
            let data = format!(
                "lowerdir={},upperdir={},workdir={},metacopy=off,volatile",
                lower.display(),
                data.display(),
                work.display()
            );
            mount_at(Path::new("overlay"), &at, "overlay", MsFlags::empty(), &data)
        })
        .await?;
        self.mounted.push(target);
        Ok(())
    }

    /// Folder with the image's content.
    async fn lower(&mut self, agent: &Agent, serial: &str) -> Result<PathBuf> {
        if let Some(folder) = serial.strip_prefix("dir:") {
            if !agent.config.folders_as_disks {
                return Err(Error::invalid("lower_serial", "names a folder, not a disk"));
            }
            return Ok(PathBuf::from(folder));
        }
        let node = devices::disk_node(serial)?;
        let target = agent.config.base.join("images").join(serial);
        let mut disks = agent.disks.lock().await;
        let users = disks.0.entry(serial.to_owned()).or_insert(0);
        if *users == 0 {
            let at = target.clone();
            let flags = MsFlags::MS_RDONLY | MsFlags::MS_NODEV;
            let result = blocking(move || mount_at(&node, &at, "erofs", flags, "")).await;
            if let Err(error) = result {
                disks.0.remove(serial);
                let _ = fs::remove_dir(&target);
                return Err(error);
            }
        }
        *users += 1;
        self.image = Some(serial.to_owned());
        Ok(target)
    }

    /// The joined root.
    pub fn path(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    /// Used bytes and inodes of the writable layer.
    pub fn usage(&self) -> v1::FsUsage {
        let Ok(stat) = nix::sys::statvfs::statvfs(&self.dir.join("upper")) else {
            return v1::FsUsage::default();
        };
        v1::FsUsage {
            used_bytes: (stat.blocks() - stat.blocks_free()) * stat.fragment_size(),
            inodes_used: stat.files() - stat.files_free(),
            capacity: stat.blocks() * stat.fragment_size(),
            inodes: stat.files(),
        }
    }

    /// Takes everything down; goes on past failures, may be repeated after one.
    pub async fn unmount(&mut self, agent: &Agent) -> Result<()> {
        let mut result = Ok(());
        let mut left = Vec::new();
        for target in std::mem::take(&mut self.mounted).into_iter().rev() {
            match unmount(&target).await {
                Ok(()) => {
                    let _ = fs::remove_dir(&target);
                }
                Err(error) => {
                    left.insert(0, target);
                    result = Err(error);
                }
            }
        }
        self.mounted = left;
        if self.mounted.is_empty() {
            if let Some(serial) = self.image.take() {
                result = release_image(agent, &serial).await;
            }
            let _ = fs::remove_dir(self.dir.join("upper"));
            let _ = fs::remove_dir(&self.dir);
        }
        result
    }
}

async fn release_image(agent: &Agent, serial: &str) -> Result<()> {
    let mut disks = agent.disks.lock().await;
    let Some(users) = disks.0.get_mut(serial) else { return Ok(()) };
    *users -= 1;
    if *users > 0 {
        return Ok(());
    }
    disks.0.remove(serial);
    let target = agent.config.base.join("images").join(serial);
    unmount(&target).await?;
    let _ = fs::remove_dir(&target);
    Ok(())
}
