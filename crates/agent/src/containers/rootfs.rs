//! A container's root file system at `<base>/containers/<id>/rootfs`: overlayfs of a lower layer (the
//! image's EROFS disk, or a host directory shared by virtio-fs) and a writable layer. Content of the
//! writable layer:
//! ```text
//! data, work     upperdir and workdir of overlayfs
//! volumes/<n>    VOLUMEs of the image, mounted separately
//! ```

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::chown;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::v1;
use nix::mount::MsFlags;

use super::images::{self, Image};
pub(super) use super::mounting::detach;
use super::mounting::{mount_at, unmount};
use super::shares::open_share;
use crate::agent::Agent;
use crate::blocking::{MOUNT_TIMEOUT, Pool, with_timeout};
use crate::error::{Context, Error, Result};
use crate::guest::devices;
use crate::guest::host_mounts::HostMounts;
use crate::guest::quota::Limits;
use crate::guest::scratch::{Purpose, ScratchDir};
use crate::guest::tree::{Scope, Tree};
use crate::guest::volumes::open_dir;
use crate::oci::userns::UserNamespace;

/// Options of a disk for one container: no barriers, as nothing has to survive a crash; discard, to
/// free deleted blocks on the host.
const EXT4_OPTIONS: &str = "discard,nobarrier";

/// Directory of a layer for the image's VOLUMEs.
pub const VOLUMES: &str = "volumes";

/// Source of a writable layer that is mounted for the container.
enum Source {
    Tmpfs,
    /// A separate virtio-blk disk, as hosts of earlier releases attach it.
    Disk(PathBuf),
    /// A host directory, for a pod without a VM.
    Directory {
        mounts: Arc<HostMounts>,
        dir: PathBuf,
    },
}

/// Location of a writable layer.
#[derive(Debug, Clone)]
pub enum Layer {
    /// A separate file system.
    Own(PathBuf),
    /// A directory in a host file system.
    Host(PathBuf),
    /// A directory of the pod's scratch disk.
    Scratch(ScratchDir),
}

impl Layer {
    pub fn path(&self) -> &Path {
        match self {
            Self::Own(path) | Self::Host(path) => path,
            Self::Scratch(dir) => dir.path(),
        }
    }
}

impl Source {
    fn of(agent: &Agent, serial: &str) -> Result<Self> {
        if serial.is_empty() {
            return Ok(Self::Tmpfs);
        }
        if let Some(dir) = serial.strip_prefix(agent_api::host_pod::FOLDER) {
            let mounts = agent.config.host()?.mounts.clone();
            return Ok(Self::Directory { mounts, dir: dir.into() });
        }
        agent.config.require_vm()?;
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
            Self::Directory { mounts, dir } => {
                let what = || format!("mount {} at {}", dir.display(), target.display());
                let (tree, _) = mounts.copy(dir)?;
                tree.propagation(MsFlags::MS_PRIVATE).context(what)?;
                fs::create_dir_all(target).context(what)?;
                tree.attach(target).context(what)
            }
        }
    }
}

#[derive(Debug)]
pub struct Rootfs {
    pool: Pool,
    removal: Pool,
    dir: PathBuf,
    layer: Option<Layer>,
    image: Option<Image>,
    /// Mount points, in mount order.
    mounted: Vec<PathBuf>,
}

impl Rootfs {
    /// In a user namespace the files of the image and of the layer have its ids.
    pub async fn mount(
        agent: &Agent,
        id: &str,
        wanted: &v1::RootFs,
        userns: Option<&Arc<UserNamespace>>,
    ) -> Result<Self> {
        let mut rootfs = Self {
            pool: agent.pools.for_container(id),
            removal: agent.pools.for_removal(id),
            dir: agent.config.base.join("containers").join(id),
            layer: None,
            image: None,
            mounted: Vec::new(),
        };
        match rootfs.build(agent, wanted, userns).await {
            Ok(()) => Ok(rootfs),
            Err(error) => {
                if let Err(second) = rootfs.unmount(agent).await {
                    tracing::error!(container = id, error = %second.chain(), "cannot clean up");
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
            let image = images::acquire(agent, &self.pool, &wanted.lower_serial).await?;
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
            self.pool
                .run_or_undo("mount the image", MOUNT_TIMEOUT, work, move |()| detach(&late))
                .await?;
        }
        let (uid, gid) = userns.map_or((0, 0), |userns| userns.mapping.root());
        let target = self.path();
        let late = target.clone();
        let join = move |upper: &Path| {
            let (data, work) = (upper.join("data"), upper.join("work"));
            // A disk that was used before has the marker of a volatile mount, which overlayfs
            // refuses. Within one boot its data is complete.
            let _ = fs::remove_dir_all(&work);
            for dir in [&data, &work] {
                fs::create_dir_all(dir).context(|| format!("make {}", dir.display()))?;
            }
            // The root of the upperdir becomes `/` of the container.
            chown(&data, Some(uid), Some(gid)).context(|| "chown the root directory".to_owned())?;
            // metacopy=off: a file's metadata must not depend on the attached image.
            // volatile: the layer ends with the pod, so sync would have no effect.
            let data = format!(
                "lowerdir={},upperdir={},workdir={},metacopy=off,volatile",
                lower.display(),
                data.display(),
                work.display()
            );
            mount_at(Path::new("overlay"), &target, "overlay", MsFlags::empty(), &data)
        };
        let operation = "mount the root file system";
        let Some(scratch) = &wanted.scratch else {
            let upper = self.mount_layer(agent, wanted).await?;
            self.mounted.push(self.path());
            let (work, undo) = (move || join(&upper), move |()| detach(&late));
            return self.pool.run_or_undo(operation, MOUNT_TIMEOUT, work, undo).await;
        };
        agent.config.require_vm()?;
        if !wanted.upper_serial.is_empty() {
            let reason = "given with a scratch directory";
            return Err(Error::invalid("rootfs.upper_serial", reason));
        }
        let limits = Limits { bytes: scratch.bytes, inodes: scratch.inodes };
        let wait = Arc::clone(&agent.scratch).lock_owned();
        let mut disk = with_timeout("lock the scratch disk", MOUNT_TIMEOUT, wait).await?;
        // Layer and mount in one call: each call takes a thread and two wake-ups.
        let work = move || {
            let layer = disk.make(Purpose::Container, limits)?;
            drop(disk);
            let joined = join(layer.path());
            Ok((layer, joined))
        };
        self.mounted.push(self.path());
        let undo = move |(_, joined): (ScratchDir, Result<()>)| {
            if joined.is_ok() {
                detach(&late);
            }
        };
        let (layer, joined) = self.pool.run_or_undo(operation, MOUNT_TIMEOUT, work, undo).await?;
        self.layer = Some(Layer::Scratch(layer));
        joined
    }

    /// Mounts the lower layer that is a host directory, and returns its path.
    async fn mount_share(&mut self, agent: &Agent, wanted: &v1::RootFs) -> Result<PathBuf> {
        if !wanted.lower_serial.is_empty() {
            return Err(Error::invalid("rootfs.lower_serial", "given with a share"));
        }
        let (id, sub_path) = (&wanted.lower_share, &wanted.lower_sub_path);
        let operation = "open the lower layer".to_owned();
        let place = open_share(agent, &self.pool, operation, id, sub_path).await?;
        let lower = self.dir.join("lower");
        let (at, late) = (lower.clone(), lower.clone());
        self.mounted.push(lower.clone());
        let work = move || mount_read_only(&place, &at);
        self.pool
            .run_or_undo("mount the lower layer", MOUNT_TIMEOUT, work, move |()| detach(&late))
            .await?;
        Ok(lower)
    }

    /// Mounts the writable layer that is not on the scratch disk and returns its path.
    async fn mount_layer(&mut self, agent: &Agent, wanted: &v1::RootFs) -> Result<PathBuf> {
        let source = Source::of(agent, &wanted.upper_serial)?;
        let is_dir = matches!(source, Source::Directory { .. });
        let upper = self.dir.join("upper");
        let (target, late) = (upper.clone(), upper.clone());
        self.mounted.push(upper.clone());
        let work = move || source.mount(&target);
        let undo = move |()| detach(&late);
        self.pool.run_or_undo("mount the writable layer", MOUNT_TIMEOUT, work, undo).await?;
        let layer = if is_dir { Layer::Host(upper) } else { Layer::Own(upper) };
        Ok(self.layer.insert(layer).path().to_owned())
    }

    /// Mount point of the overlayfs.
    pub fn path(&self) -> PathBuf {
        self.dir.join("rootfs")
    }

    pub fn layer(&self) -> Option<&Layer> {
        self.layer.as_ref()
    }

    /// Unmounts everything; continues after a failure and may be called again. The layer's files
    /// are moved to the trash of the scratch disk.
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
            if let Some(Layer::Scratch(dir)) = self.layer.take() {
                let wait = Arc::clone(&agent.scratch).lock_owned();
                let discarded = match with_timeout("lock the scratch disk", MOUNT_TIMEOUT, wait)
                    .await
                {
                    Ok(mut disk) => {
                        let work = move || disk.discard(&dir);
                        self.removal.run("discard the writable layer", MOUNT_TIMEOUT, work).await
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

/// Mounts a copy of the tree at `place`, read-only.
fn mount_read_only(place: &OwnedFd, at: &Path) -> Result<()> {
    let what = || format!("mount the lower layer at {}", at.display());
    fs::create_dir_all(at).context(what)?;
    let tree = Tree::copy(place.as_fd()).context(what)?;
    tree.propagation(MsFlags::MS_PRIVATE).context(what)?;
    tree.read_only(Scope::All).context(what)?;
    tree.attach(at).context(what)
}

/// Mounts the image with ids mapped into the user namespace.
fn mount_mapped(image: &Path, at: &Path, userns: &UserNamespace) -> Result<()> {
    let what = || format!("map the ids of image {}", image.display());
    fs::create_dir_all(at).context(what)?;
    let tree = Tree::copy(open_dir(image)?.as_fd()).context(what)?;
    tree.map_ids(userns.as_fd()).context(what)?;
    tree.attach(at).context(what)
}
