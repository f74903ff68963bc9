//! Volumes of a container. Each is staged as a mount at `<base>/binds/<container>/<n>`, with its
//! propagation, read-only flag and id mapping; libcontainer then bind-mounts it into the container.
//!
//! ```text
//! written  <base>/volumes/<id>  (tmpfs)     \
//! share    <base>/shares/<id>   (virtio-fs)  > sub_path, resolved beneath -> copy of the tree -> stage
//! image    <base>/images/<serial> (EROFS)   /
//! huge     <base>/hugepages/<id> (hugetlbfs) -> copy of the tree -> stage
//! empty    <base>/empty-dirs/<id> (scratch disk, tmpfs), sub_path -> copy of the tree -> stage
//! host     a path of the host, in a pod without a VM -> copy of the tree -> stage
//! VOLUME of the image   a directory of the container's layer, beside the overlayfs -> stage
//! ```

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::v1;
use nix::errno::Errno;
use nix::fcntl::{OFlag, OpenHow, ResolveFlag, openat2};
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sys::statvfs::{FsFlags, fstatvfs};

use super::images::{self, Image};
use super::rootfs::{Layer, VOLUMES, detach};
use super::shares::open_share;
use crate::agent::Agent;
use crate::blocking::{COPY_TIMEOUT, LOOKUP_TIMEOUT, MOUNT_TIMEOUT, Pool, with_timeout};
use crate::error::{Context, Error, Result};
use crate::guest::copy::{self, Copied, Limits};
use crate::guest::empty_dirs::{self, Ownership};
use crate::guest::inroot::Root;
use crate::guest::tree::{Scope, Tree};
use crate::guest::volumes::{open_dir, relative};
use crate::guest::{huge_pages, remove};
use crate::oci::spec::Bind;
use crate::oci::userns::UserNamespace;

/// Maximum volumes of one container.
const MAX_VOLUMES: usize = 512;

/// Maximum mounts of the host below one volume; the host chooses the list.
const MAX_SUBMOUNTS: usize = 256;
/// Limits of the content copied from an image into its VOLUMEs, for all VOLUMEs of a container
/// together: the copy delays CreateContainer. A VOLUME with more content stays in the root file
/// system.
const MAX_COPIED: Limits = Limits { bytes: 512 << 20, entries: 65536 };

/// The staged volumes of a container.
#[derive(Debug)]
pub struct StagedVolumes {
    pool: Pool,
    removal: Pool,
    dir: PathBuf,
    mounted: Vec<PathBuf>,
    images: Vec<Image>,
}

/// Source of a mount.
enum MountSource {
    /// An O_PATH descriptor.
    Path(OwnedFd),
    /// A tree cloned from the host's mount namespace; whether it is a directory.
    Tree(Tree, bool),
}

/// Validated fields of a volume.
struct Kind {
    source: v1::VolumeSource,
    propagation: v1::Propagation,
}

fn kind(volume: &v1::VolumeMount, in_user_namespace: bool) -> Result<Kind> {
    let source = v1::VolumeSource::try_from(volume.source)
        .map_err(|_| Error::invalid("volumes.source", format!("{} is unknown", volume.source)))?;
    let propagation = v1::Propagation::try_from(volume.propagation).map_err(|_| {
        Error::invalid("volumes.propagation", format!("{} is unknown", volume.propagation))
    })?;
    let at = &volume.destination;
    if volume.recursive_read_only && !volume.read_only {
        let reason = format!("{at}: recursive read-only needs a read-only volume");
        return Err(Error::invalid("volumes.recursive_read_only", reason));
    }
    if volume.recursive_read_only && propagation != v1::Propagation::Private {
        let reason = format!("{at}: later mounts would be writable; needs private propagation");
        return Err(Error::invalid("volumes.recursive_read_only", reason));
    }
    if propagation == v1::Propagation::Shared && in_user_namespace {
        let reason = format!("{at}: mounts of a user namespace cannot propagate to the pod");
        return Err(Error::invalid("volumes.propagation", reason));
    }
    Ok(Kind { source, propagation })
}

impl StagedVolumes {
    pub fn new(agent: &Agent, container: &str) -> Self {
        let dir = agent.config.base.join("binds").join(container);
        let pool = agent.pools.for_container(container);
        let removal = agent.pools.for_removal(container);
        Self { pool, removal, dir, mounted: Vec::new(), images: Vec::new() }
    }

    /// Whether a volume has shared (bidirectional) propagation.
    pub fn is_shared(volumes: &[v1::VolumeMount]) -> bool {
        volumes.iter().any(|volume| volume.propagation == v1::Propagation::Shared as i32)
    }

    /// Stages all volumes. After a failure `unstage` removes those already staged.
    pub async fn stage(
        &mut self,
        agent: &Agent,
        volumes: &[v1::VolumeMount],
        userns: Option<&Arc<UserNamespace>>,
    ) -> Result<Vec<Bind>> {
        if volumes.len() > MAX_VOLUMES {
            return Err(Error::Exhausted {
                what: "volumes of a container",
                limit: MAX_VOLUMES as u64,
            });
        }
        let mut binds = Vec::new();
        let mut written = Vec::new();
        for (n, volume) in volumes.iter().enumerate() {
            let kind = kind(volume, userns.is_some())?;
            let source = self.open(agent, volume, kind.source).await?;
            let target = self.dir.join(n.to_string());
            let at = target.clone();
            let wanted = volume.clone();
            // Older kernels cannot map ids of tmpfs and hugetlbfs: their files are owned by the
            // mapped ids.
            let in_memory =
                matches!(kind.source, v1::VolumeSource::Written | v1::VolumeSource::HugePages);
            let mapped = in_memory || volume.ids_mapped;
            let userns = userns.filter(|_| !mapped).cloned();
            let is_written = kind.source == v1::VolumeSource::Written;
            let work = move || attach(source, &wanted, &kind, userns.as_deref(), &at);
            let directory = if is_written {
                written.push((n, work));
                false
            } else {
                self.mount(volume, target.clone(), work).await?
            };
            binds.push(Bind {
                source: target,
                destination: PathBuf::from(&volume.destination),
                directory,
            });
        }
        self.mount_written(written, &mut binds).await?;
        Ok(binds)
    }

    /// Runs the work of written volumes in one call, which a pod has several of for each container:
    /// each call takes a thread and two wake-ups. They are in a tmpfs of the agent, so none of them
    /// can hang by itself.
    async fn mount_written(
        &mut self,
        written: Vec<(usize, impl FnOnce() -> Result<bool> + Send + 'static)>,
        binds: &mut [Bind],
    ) -> Result<()> {
        if written.is_empty() {
            return Ok(());
        }
        let targets: Vec<PathBuf> = written.iter().map(|(n, _)| binds[*n].source.clone()).collect();
        self.mounted.extend(targets.iter().cloned());
        let work = move || {
            let run = written.into_iter().map(|(n, work)| Ok((n, work()?)));
            run.collect::<Result<Vec<_>>>()
        };
        let undo = move |_| targets.iter().for_each(|target| detach(target));
        let operation = "prepare the pod's own files";
        let kinds = self.pool.run_or_undo(operation, MOUNT_TIMEOUT, work, undo).await?;
        for (n, directory) in kinds {
            binds[n].directory = directory;
        }
        Ok(())
    }

    /// Runs `work`, which mounts at `target`; the mount is recorded first, so `unstage` removes it
    /// in any case.
    async fn mount(
        &mut self,
        volume: &v1::VolumeMount,
        target: PathBuf,
        work: impl FnOnce() -> Result<bool> + Send + 'static,
    ) -> Result<bool> {
        let late = target.clone();
        self.mounted.push(target);
        let operation = format!("prepare the volume for {}", volume.destination);
        self.pool.run_or_undo(&operation, MOUNT_TIMEOUT, work, move |_| detach(&late)).await
    }

    /// Stages the image's VOLUMEs: directories of the container's layer beside the overlayfs,
    /// filled with the image's content. They are writable also if the root is read-only, and
    /// overlayfs can be mounted on them (docker-in-docker).
    pub async fn stage_image_volumes(
        &mut self,
        root: &Arc<Root>,
        layer: &Layer,
        volumes: &[String],
    ) -> Result<Vec<Bind>> {
        if volumes.len() + self.mounted.len() > MAX_VOLUMES {
            return Err(Error::Exhausted {
                what: "volumes of a container",
                limit: MAX_VOLUMES as u64,
            });
        }
        let mut binds = Vec::new();
        let mut left = MAX_COPIED;
        for (n, destination) in volumes.iter().enumerate() {
            let path = PathBuf::from(destination);
            let (root, at) = (Arc::clone(root), path.clone());
            let own = layer.path().join(VOLUMES).join(n.to_string());
            let work = move || {
                root.make_target(&at, true)?;
                fill(root.open_path(&at)?, &own, left)
            };
            let operation = format!("fill the volume for {destination}");
            let (place, copied) = self.pool.run(&operation, COPY_TIMEOUT, work).await?;
            match copied {
                Some(copied) => left = copied,
                None => tracing::info!(
                    path = destination,
                    "VOLUME exceeds the copy limits and stays in the root file system"
                ),
            }
            let place = MountSource::Path(place);
            let kind =
                Kind { source: v1::VolumeSource::Written, propagation: v1::Propagation::Private };
            let volume = v1::VolumeMount { destination: destination.clone(), ..Default::default() };
            let target = self.dir.join(self.mounted.len().to_string());
            let (wanted, at) = (volume.clone(), target.clone());
            let work = move || attach(place, &wanted, &kind, None, &at);
            let directory = self.mount(&volume, target.clone(), work).await?;
            binds.push(Bind { source: target, destination: path, directory });
        }
        Ok(binds)
    }

    async fn open(
        &mut self,
        agent: &Agent,
        volume: &v1::VolumeMount,
        source: v1::VolumeSource,
    ) -> Result<MountSource> {
        let (id, sub_path) = (&volume.volume_id, &volume.sub_path);
        let operation = format!("open the volume for {}", volume.destination);
        match source {
            v1::VolumeSource::Host => {
                let mounts = agent.config.host()?.mounts.clone();
                let path = PathBuf::from(id);
                let (tree, directory) =
                    self.pool.run(&operation, LOOKUP_TIMEOUT, move || mounts.copy(&path)).await?;
                return Ok(MountSource::Tree(tree, directory));
            }
            // A tmpfs in which only the agent mounts.
            v1::VolumeSource::Written => agent.lock().volumes.open(id, sub_path),
            v1::VolumeSource::Share => open_share(agent, &self.pool, operation, id, sub_path).await,
            v1::VolumeSource::HugePages => {
                agent.config.require_vm()?;
                let (base, id) = (agent.config.base.join("hugepages"), id.clone());
                let work = move || open_dir(&huge_pages::volume(&base, &id)?);
                self.pool.run(&operation, LOOKUP_TIMEOUT, work).await
            }
            v1::VolumeSource::EmptyDir => {
                agent.config.require_vm()?;
                // The lock is not held for the lookup: a container may have mounted something in
                // it.
                let wait = agent.empty_dirs.lock();
                let root =
                    with_timeout("lock the emptyDirs", MOUNT_TIMEOUT, wait).await?.ready(id)?;
                let sub_path = sub_path.clone();
                let made = Ownership { uid: volume.uid, gid: volume.gid, mode: volume.mode };
                let work = move || empty_dirs::open(&root, &sub_path, made);
                self.pool.run(&operation, LOOKUP_TIMEOUT, work).await
            }
            v1::VolumeSource::Image => {
                let image = images::acquire(agent, &self.pool, id).await?;
                let path = image.path().clone();
                self.images.push(image);
                let (id, sub_path) = (id.clone(), sub_path.clone());
                let work = move || open_in_image(&path, &id, &sub_path);
                self.pool.run(&operation, LOOKUP_TIMEOUT, work).await
            }
        }
        .map(MountSource::Path)
    }

    /// Unmounts everything; continues after a failure and may be called again.
    pub async fn unstage(&mut self, agent: &Agent) -> Result<()> {
        let mounted = self.mounted.clone();
        let work = move || Ok(unmount_all(mounted));
        let (left, mut result) =
            self.removal.run("unmount the volumes", MOUNT_TIMEOUT, work).await?;
        self.mounted = left;
        if self.mounted.is_empty() {
            remove_mount_points(&self.dir);
            for image in std::mem::take(&mut self.images) {
                if let Err(error) = images::release(agent, &self.removal, image).await {
                    result = Err(error);
                }
            }
        }
        result
    }
}

/// Returns what is still mounted, and the last error.
fn unmount_all(mounted: Vec<PathBuf>) -> (Vec<PathBuf>, Result<()>) {
    let mut result = Ok(());
    let mut left = Vec::new();
    for target in mounted.into_iter().rev() {
        // Slave first, so that unmounts inside do not propagate to peers.
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        let _ = mount(None::<&str>, &target, None::<&str>, slave, None::<&str>);
        // MNT_DETACH also unmounts what was mounted inside; an ending mount namespace may still
        // hold a copy.
        match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => {
                result = Err(error).context(|| format!("unmount {}", target.display()));
                left.insert(0, target);
            }
        }
    }
    (left, result)
}

/// Copies a directory of the image to `own`. Returns the directory to mount and the remaining
/// limits; None if the content exceeds them, and the image's directory itself is to be mounted.
fn fill(place: OwnedFd, own: &Path, mut left: Limits) -> Result<(OwnedFd, Option<Limits>)> {
    let what = || format!("fill {}", own.display());
    let is_dir = open_dir(Path::new(&format!("/proc/self/fd/{}", place.as_raw_fd()))).is_ok();
    if !is_dir {
        return Ok((place, Some(left)));
    }
    fs::create_dir_all(own).context(what)?;
    match copy::tree(&place, own, &mut left).context(what)? {
        Copied::All => Ok((open_dir(own)?, Some(left))),
        Copied::LimitExceeded => {
            remove::remove_contents(own).context(what)?;
            fs::remove_dir(own).context(what)?;
            Ok((place, None))
        }
    }
}

/// Removes the mount points. Not recursive: something still mounted there holds data.
fn remove_mount_points(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path()).or_else(|_| fs::remove_file(entry.path()));
    }
    let _ = fs::remove_dir(dir);
}

/// Opens a path in an image; symlinks resolve inside the image.
fn open_in_image(root: &Path, id: &str, sub_path: &str) -> Result<OwnedFd> {
    let dir = open_dir(root)?;
    if sub_path.is_empty() {
        return Ok(dir);
    }
    let how = OpenHow::new()
        .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    match openat2(dir.as_fd(), relative(sub_path)?, how) {
        Err(Errno::ENOENT | Errno::ENOTDIR) => {
            let id = sub_path.to_owned();
            Err(Error::NotFound { what: "path in the image of the volume", id })
        }
        result => result.context(|| format!("open {sub_path:?} in image {id}")),
    }
}

/// Clones `source` and attaches it to a new mount point `target`. Returns whether it is a
/// directory.
fn attach(
    source: MountSource,
    volume: &v1::VolumeMount,
    kind: &Kind,
    userns: Option<&UserNamespace>,
    target: &Path,
) -> Result<bool> {
    let what = || format!("prepare the volume for {}", volume.destination);
    let (tree, directory) = match source {
        MountSource::Tree(tree, directory) => (tree, directory),
        MountSource::Path(place) => {
            let path = format!("/proc/self/fd/{}", place.as_raw_fd());
            let directory = fs::metadata(path).context(what)?.is_dir();
            (Tree::copy(place.as_fd()).context(what)?, directory)
        }
    };
    if let Some(userns) = userns {
        match tree.map_ids(userns.as_fd()) {
            Err(error) if error.raw_os_error() == Some(Errno::EINVAL as i32) => {
                return Err(Error::Precondition(format!(
                    "{}: this guest kernel cannot map the ids of the volume's file system into \
                     the pod's user namespace",
                    volume.destination
                )));
            }
            result => result.context(what)?,
        }
    }
    tree.propagation(match kind.propagation {
        v1::Propagation::Private => MsFlags::MS_PRIVATE,
        v1::Propagation::Slave => MsFlags::MS_SLAVE,
        v1::Propagation::Shared => MsFlags::MS_SHARED,
    })
    .context(what)?;
    if volume.recursive_read_only {
        tree.read_only(Scope::All).context(what)?;
    } else if volume.read_only || kind.source == v1::VolumeSource::Image {
        tree.read_only(Scope::Top).context(what)?;
    }
    let parent = target.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).context(what)?;
    if directory {
        fs::create_dir(target).context(what)?;
    } else {
        fs::File::create_new(target).context(what)?;
    }
    tree.attach(target).context(what)?;
    if volume.read_only && !volume.recursive_read_only {
        make_submounts_writable(target, &volume.submounts)?;
    }
    Ok(directory)
}

/// Makes the host's mounts below a read-only volume writable: in the share they are part of one
/// mount, while read-only on the host applies to the top mount only.
fn make_submounts_writable(target: &Path, submounts: &[String]) -> Result<()> {
    if submounts.len() > MAX_SUBMOUNTS {
        return Err(Error::Exhausted { what: "submounts", limit: MAX_SUBMOUNTS as u64 });
    }
    if submounts.is_empty() {
        return Ok(());
    }
    let root = open_dir(target)?;
    for submount in submounts {
        // Another container may write to the volume: symlinks must not lead to protected files.
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let place = match openat2(root.as_fd(), relative(submount)?, how) {
            Ok(place) => place,
            // Unmounted on the host meanwhile.
            Err(error) => {
                tracing::info!(submount, %error, "submount does not exist");
                continue;
            }
        };
        let what = || format!("let {submount:?} be written to");
        if !fstatvfs(&place).context(what)?.flags().contains(FsFlags::ST_RDONLY) {
            continue;
        }
        let tree = Tree::copy(place.as_fd()).context(what)?;
        tree.writable().context(what)?;
        tree.attach_at(place.as_fd()).context(what)?;
    }
    Ok(())
}
