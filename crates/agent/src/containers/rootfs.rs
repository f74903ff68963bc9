//! A container's root file system: the image's EROFS disk below (or a folder of the host, shared by
//! virtio-fs), a writable layer above, joined by overlayfs at `<base>/containers/<id>/rootfs`. In the
//! layer:
//! ```text
//! data, work     overlayfs' own
//! volumes/<n>    the image's VOLUMEs, mounts of their own
//! ```

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use agent_api::v1;
use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};

use super::images::{self, Image};
use super::volumes::open_share;
use crate::agent::Agent;
use crate::error::{Doing, Error, Result};
use crate::guest::devices;
use crate::guest::host_mounts::HostMounts;
use crate::guest::quota::Limits;
use crate::guest::scratch::{Folder, Purpose};
use crate::guest::tree::{Reach, Tree};
use crate::guest::volumes::open_dir;
use crate::lanes::{Lane, MOUNT, in_time};
use crate::oci::userns::UserNamespace;

/// A container's mount namespace goes away a moment after its last process.
const BUSY_DEADLINE: Duration = Duration::from_secs(5);

/// Of a disk that is one container's: nothing on it has to survive a crash, so no barriers; what is
/// deleted is given back to the host.
const EXT4_OPTIONS: &str = "discard,nobarrier";

/// Folder of a layer in which the image's VOLUMEs are.
pub const VOLUMES: &str = "volumes";

/// Where what a container writes comes from, if it is mounted for it.
enum Source {
    Tmpfs,
    /// A virtio-blk disk of its own, as hosts of former releases give it.
    Disk(PathBuf),
    /// Of the host, for a pod without a VM.
    Folder {
        mounts: Arc<HostMounts>,
        folder: PathBuf,
    },
}

/// What a container writes goes here.
#[derive(Debug, Clone)]
pub enum Layer {
    /// A file system of its own.
    Own(PathBuf),
    /// A folder of the host, beside other files.
    Host(PathBuf),
    /// A folder of the pod's scratch disk.
    Scratch(Folder),
}

impl Layer {
    pub fn path(&self) -> &Path {
        match self {
            Self::Own(path) | Self::Host(path) => path,
            Self::Scratch(folder) => folder.path(),
        }
    }
}

impl Source {
    fn of(agent: &Agent, serial: &str) -> Result<Self> {
        if serial.is_empty() {
            return Ok(Self::Tmpfs);
        }
        if let Some(folder) = serial.strip_prefix(agent_api::host_pod::FOLDER) {
            let mounts = agent.config.host()?.mounts.clone();
            return Ok(Self::Folder { mounts, folder: folder.into() });
        }
        agent.config.has_devices()?;
        devices::disk_node(serial).map(Self::Disk)
    }

    fn mount(&self, target: &Path) -> Result<()> {
        let flags = MsFlags::MS_NODEV | MsFlags::MS_NOATIME;
        match self {
            Self::Tmpfs => {
                let flags = flags | MsFlags::MS_NOSUID;
                mount_at(Path::new("upper"), target, "tmpfs", flags, "mode=0755")
            }
            Self::Disk(node) => mount_at(node, target, "ext4", flags, EXT4_OPTIONS),
            Self::Folder { mounts, folder } => {
                let what = || format!("mount {} at {}", folder.display(), target.display());
                let (tree, _) = mounts.copy(folder)?;
                tree.propagation(MsFlags::MS_PRIVATE).doing(what)?;
                fs::create_dir_all(target).doing(what)?;
                tree.attach(target).doing(what)
            }
        }
    }
}

#[derive(Debug)]
pub struct Rootfs {
    lane: Lane,
    removal: Lane,
    dir: PathBuf,
    layer: Option<Layer>,
    image: Option<Image>,
    /// What is mounted, in order.
    mounted: Vec<PathBuf>,
}

/// Undoes a mount that was made after its deadline, when nobody knows of it any more.
pub(super) fn detach(target: &Path) {
    let flags = MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW;
    if let Err(error) = umount2(target, flags) {
        tracing::warn!(target = %target.display(), %error, "mount made too late is left behind");
    }
}

pub(super) fn mount_at(
    source: &Path,
    target: &Path,
    kind: &str,
    flags: MsFlags,
    data: &str,
) -> Result<()> {
    let what = || format!("mount {} ({kind}) at {}", source.display(), target.display());
    fs::create_dir_all(target).doing(what)?;
    mount(Some(source), target, Some(kind), flags, Some(data)).doing(what)
}

pub(super) async fn unmount(lane: &Lane, target: &Path) -> Result<()> {
    let deadline = tokio::time::Instant::now() + BUSY_DEADLINE;
    let mut pause = Duration::from_millis(1);
    loop {
        let path = target.to_owned();
        let work = move || Ok(umount2(&path, MntFlags::UMOUNT_NOFOLLOW));
        let result = lane.run(&format!("unmount {}", target.display()), MOUNT, work).await?;
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
    /// With a user namespace the image's files belong to its ids, and so does what is written.
    pub async fn mount(
        agent: &Agent,
        id: &str,
        wanted: &v1::RootFs,
        userns: Option<&Arc<UserNamespace>>,
    ) -> Result<Self> {
        let mut rootfs = Self {
            lane: agent.lanes.of_container(id),
            removal: agent.lanes.of_removal(id),
            dir: agent.config.base.join("containers").join(id),
            layer: None,
            image: None,
            mounted: Vec::new(),
        };
        match rootfs.build(agent, wanted, userns).await {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                if let Err(second) = rootfs.unmount(agent).await {
                    tracing::error!(container = id, error = %second.chain(), "left behind");
                }
                Err(error)
            }
        }
    }

    async fn build(
        &mut self,
        agent: &Agent,
        wanted: &v1::RootFs,
        userns: Option<&Arc<UserNamespace>>,
    ) -> Result<()> {
        let mut lower = if wanted.lower_share.is_empty() {
            let image = images::take(agent, &self.lane, &wanted.lower_serial).await?;
            self.image.insert(image).path().clone()
        } else {
            if userns.is_some() && !wanted.lower_ids_mapped {
                let why = "virtio-fs does not map ids into the pod's user namespace";
                return Err(Error::invalid("rootfs.lower_share", why));
            }
            self.mount_share(agent, wanted).await?
        };
        if let Some(userns) = userns.filter(|_| wanted.lower_share.is_empty()) {
            let (image, userns) = (lower, Arc::clone(userns));
            lower = self.dir.join("lower");
            let (at, late) = (lower.clone(), lower.clone());
            self.mounted.push(lower.clone());
            let work = move || mount_mapped(&image, &at, &userns);
            self.lane.run_or_undo("mount the image", MOUNT, work, move |()| detach(&late)).await?;
        }
        let (uid, gid) = userns.map_or((0, 0), |userns| userns.mapping.root());
        let upper = self.make_layer(agent, wanted).await?;
        let target = self.path();
        let (at, late) = (target.clone(), target.clone());
        self.mounted.push(target);
        let join = move || {
            let (data, work) = (upper.join("data"), upper.join("work"));
            // A disk that was used before carries the mark of a volatile mount, which overlayfs
            // refuses; within one boot what was written is there all the same.
            let _ = fs::remove_dir_all(&work);
            for dir in [&data, &work] {
                fs::create_dir_all(dir).doing(|| format!("make {}", dir.display()))?;
            }
            // Overlayfs shows it as the container's `/`.
            chown(&data, Some(uid), Some(gid)).doing(|| "give the root to its user".to_owned())?;
            // metacopy off: a file's metadata must not depend on the image staying attached.
            // volatile: the layer dies with the pod, so syncing it is of no use to anybody.
            let data = format!(
                "lowerdir={},upperdir={},workdir={},metacopy=off,volatile",
                lower.display(),
                data.display(),
                work.display()
            );
            mount_at(Path::new("overlay"), &at, "overlay", MsFlags::empty(), &data)
        };
        self.lane.run_or_undo("mount the root", MOUNT, join, move |()| detach(&late)).await
    }

    /// Mounts the lower layer that is a folder of the host; answers where.
    async fn mount_share(&mut self, agent: &Agent, wanted: &v1::RootFs) -> Result<PathBuf> {
        if !wanted.lower_serial.is_empty() {
            return Err(Error::invalid("rootfs.lower_serial", "given with a share"));
        }
        let (id, sub_path) = (&wanted.lower_share, &wanted.lower_sub_path);
        let doing = "open the lower layer".to_owned();
        let place = open_share(agent, &self.lane, doing, id, sub_path).await?;
        let lower = self.dir.join("lower");
        let (at, late) = (lower.clone(), lower.clone());
        self.mounted.push(lower.clone());
        let work = move || mount_read_only(&place, &at);
        self.lane
            .run_or_undo("mount the lower layer", MOUNT, work, move |()| detach(&late))
            .await?;
        Ok(lower)
    }

    /// Answers where it is.
    async fn make_layer(&mut self, agent: &Agent, wanted: &v1::RootFs) -> Result<PathBuf> {
        let layer = if let Some(scratch) = &wanted.scratch {
            agent.config.has_devices()?;
            if !wanted.upper_serial.is_empty() {
                let why = "given with a scratch folder";
                return Err(Error::invalid("rootfs.upper_serial", why));
            }
            let limits = Limits { bytes: scratch.bytes, inodes: scratch.inodes };
            let wait = Arc::clone(&agent.scratch).lock_owned();
            let mut disk = in_time("wait for the scratch disk", MOUNT, wait).await?;
            let work = move || disk.make(Purpose::Container, limits);
            Layer::Scratch(self.lane.run("make the writable layer", MOUNT, work).await?)
        } else {
            let source = Source::of(agent, &wanted.upper_serial)?;
            let is_folder = matches!(source, Source::Folder { .. });
            let upper = self.dir.join("upper");
            let (target, late) = (upper.clone(), upper.clone());
            self.mounted.push(upper.clone());
            let work = move || source.mount(&target);
            let undo = move |()| detach(&late);
            self.lane.run_or_undo("mount the writable layer", MOUNT, work, undo).await?;
            if is_folder { Layer::Host(upper) } else { Layer::Own(upper) }
        };
        Ok(self.layer.insert(layer).path().to_owned())
    }

    /// The joined root.
    pub fn path(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    pub fn layer(&self) -> Option<&Layer> {
        self.layer.as_ref()
    }

    /// Takes everything down; goes on past failures, may be repeated after one. What is to be deleted
    /// then is in the scratch disk's trash.
    pub async fn unmount(&mut self, agent: &Agent) -> Result<()> {
        let mut result = Ok(());
        let mut left = Vec::new();
        for target in std::mem::take(&mut self.mounted).into_iter().rev() {
            match unmount(&self.removal, &target).await {
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
            if let Some(image) = self.image.take() {
                result = images::release(agent, &self.removal, image).await;
            }
            if let Some(Layer::Scratch(folder)) = self.layer.take() {
                let wait = Arc::clone(&agent.scratch).lock_owned();
                let discarded = match in_time("wait for the scratch disk", MOUNT, wait).await {
                    Ok(mut disk) => {
                        let work = move || disk.discard(&folder);
                        self.removal.run("discard the writable layer", MOUNT, work).await
                    }
                    Err(error) => Err(error),
                };
                result = result.and(discarded);
            }
            let _ = fs::remove_dir(self.dir.join("upper"));
            let _ = fs::remove_dir(&self.dir);
        }
        result
    }
}

fn mount_read_only(place: &OwnedFd, at: &Path) -> Result<()> {
    let what = || format!("mount the lower layer at {}", at.display());
    fs::create_dir_all(at).doing(what)?;
    let tree = Tree::copy(place.as_fd()).doing(what)?;
    tree.propagation(MsFlags::MS_PRIVATE).doing(what)?;
    tree.read_only(Reach::All).doing(what)?;
    tree.attach(at).doing(what)
}

/// The image as the user namespace sees it.
fn mount_mapped(image: &Path, at: &Path, userns: &UserNamespace) -> Result<()> {
    let what = || format!("map the ids of image {}", image.display());
    fs::create_dir_all(at).doing(what)?;
    let tree = Tree::copy(open_dir(image)?.as_fd()).doing(what)?;
    tree.map_ids(userns.as_fd()).doing(what)?;
    tree.attach(at).doing(what)
}
