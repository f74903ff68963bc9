//! A container's volumes, each staged as a mount of its own at `<base>/binds/<container>/<n>`: with
//! its propagation, write protection and id mapping as they are to be in the container, where
//! libcontainer only has to bind it.
//!
//! ```text
//! written  <base>/volumes/<id>  (tmpfs)     \
//! share    <base>/shares/<id>   (virtio-fs)  > sub_path, resolved beneath -> copy of the tree -> stage
//! image    <base>/images/<serial> (EROFS)   /
//! huge     <base>/hugepages/<id> (hugetlbfs) -> copy of the tree -> stage
//! empty    <base>/empty-dirs/<id> (scratch disk, tmpfs), sub_path -> copy of the tree -> stage
//! host     a path of the host, in a pod without a VM -> copy of the tree -> stage
//! VOLUME of the image   a folder of the container's layer, beside overlayfs' -> stage
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
use crate::agent::Agent;
use crate::error::{Doing, Error, Result};
use crate::guest::copy::{self, Copied, Limits};
use crate::guest::empty_dirs::{self, Made};
use crate::guest::inroot::Root;
use crate::guest::tree::{Reach, Tree};
use crate::guest::volumes::{open_dir, relative};
use crate::guest::{huge_pages, remove, share};
use crate::lanes::{COPY, LOOK_UP, Lane, MOUNT, in_time};
use crate::oci::spec::Bind;
use crate::oci::userns::UserNamespace;

/// Volumes of one container.
const MAX_VOLUMES: usize = 512;

/// Folders of a volume on which the host has mounted something; the list is the host's.
const MAX_SUBMOUNTS: usize = 256;
/// What is copied of an image into its VOLUMEs, for all those of a container together: it has to be
/// there before CreateContainer answers, and somebody waits. A VOLUME with more content stays where it
/// is in the root file system.
const MOST_COPIED: Limits = Limits { bytes: 512 << 20, entries: 65536 };

/// What has to be taken down with the container.
#[derive(Debug)]
pub struct Staged {
    lane: Lane,
    removal: Lane,
    dir: PathBuf,
    mounted: Vec<PathBuf>,
    images: Vec<Image>,
}

/// What is to be mounted.
enum Place {
    /// An O_PATH descriptor.
    Here(OwnedFd),
    /// Of the host; whether it is a folder.
    Copied(Tree, bool),
}

/// Checked once, so that the rest may rely on it.
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
        let why = format!("{at}: recursive, but the volume itself is not read-only");
        return Err(Error::invalid("volumes.recursive_read_only", why));
    }
    if volume.recursive_read_only && propagation != v1::Propagation::Private {
        let why =
            format!("{at}: what is mounted later would be writable; wants private propagation");
        return Err(Error::invalid("volumes.recursive_read_only", why));
    }
    if propagation == v1::Propagation::Shared && in_user_namespace {
        let why = format!("{at}: mounts do not leave a user namespace, so they cannot be shared");
        return Err(Error::invalid("volumes.propagation", why));
    }
    Ok(Kind { source, propagation })
}

impl Staged {
    pub fn new(agent: &Agent, container: &str) -> Self {
        let dir = agent.config.base.join("binds").join(container);
        let lane = agent.lanes.of_container(container);
        let removal = agent.lanes.of_removal(container);
        Self { lane, removal, dir, mounted: Vec::new(), images: Vec::new() }
    }

    /// Whether any of these wants mounts of the container to be seen outside of it.
    pub fn is_shared(volumes: &[v1::VolumeMount]) -> bool {
        volumes.iter().any(|volume| volume.propagation == v1::Propagation::Shared as i32)
    }

    /// Stages all; what is done when one fails is left for `unstage`.
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
        for (n, volume) in volumes.iter().enumerate() {
            let kind = kind(volume, userns.is_some())?;
            let source = self.open(agent, volume, kind.source).await?;
            let target = self.dir.join(n.to_string());
            let at = target.clone();
            let wanted = volume.clone();
            // tmpfs and hugetlbfs of older kernels take no id mapping: their files belong to the
            // mapped ids.
            let in_memory =
                matches!(kind.source, v1::VolumeSource::Written | v1::VolumeSource::HugePages);
            let mapped = in_memory || volume.ids_mapped;
            let userns = userns.filter(|_| !mapped).cloned();
            let work = move || attach(source, &wanted, &kind, userns.as_deref(), &at);
            let directory = self.mount(volume, target.clone(), work).await?;
            binds.push(Bind {
                source: target,
                destination: PathBuf::from(&volume.destination),
                directory,
            });
        }
        Ok(binds)
    }

    /// Mounts something at `target`, which is taken down again whatever becomes of this.
    async fn mount(
        &mut self,
        volume: &v1::VolumeMount,
        target: PathBuf,
        work: impl FnOnce() -> Result<bool> + Send + 'static,
    ) -> Result<bool> {
        let late = target.clone();
        self.mounted.push(target);
        let doing = format!("prepare the volume for {}", volume.destination);
        self.lane.run_or_undo(&doing, MOUNT, work, move |_| detach(&late)).await
    }

    /// Stages the image's own volumes: folders beside overlayfs in the container's layer, with what
    /// the image holds there. They can be written to where the root cannot, and overlayfs can stand
    /// on them.
    pub async fn stage_of_image(
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
        let mut left = MOST_COPIED;
        for (n, destination) in volumes.iter().enumerate() {
            let path = PathBuf::from(destination);
            let (root, at) = (Arc::clone(root), path.clone());
            let own = layer.path().join(VOLUMES).join(n.to_string());
            let work = move || {
                root.make_target(&at, true)?;
                fill(root.place(&at)?, &own, left)
            };
            let doing = format!("fill the volume for {destination}");
            let (place, copied) = self.lane.run(&doing, COPY, work).await?;
            match copied {
                Some(copied) => left = copied,
                None => tracing::info!(
                    path = destination,
                    "VOLUME with much content stays in the root file system"
                ),
            }
            let place = Place::Here(place);
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
    ) -> Result<Place> {
        let (id, sub_path) = (&volume.volume_id, &volume.sub_path);
        let doing = format!("open the volume for {}", volume.destination);
        match source {
            v1::VolumeSource::Host => {
                let mounts = agent.config.host()?.mounts.clone();
                let path = PathBuf::from(id);
                let (tree, directory) =
                    self.lane.run(&doing, LOOK_UP, move || mounts.copy(&path)).await?;
                return Ok(Place::Copied(tree, directory));
            }
            // A tmpfs that nobody else mounts anything in.
            v1::VolumeSource::Written => agent.lock().volumes.open(id, sub_path),
            v1::VolumeSource::Share => open_share(agent, &self.lane, doing, id, sub_path).await,
            v1::VolumeSource::HugePages => {
                agent.config.has_devices()?;
                let (base, id) = (agent.config.base.join("hugepages"), id.clone());
                let work = move || open_dir(&huge_pages::volume(&base, &id)?);
                self.lane.run(&doing, LOOK_UP, work).await
            }
            v1::VolumeSource::EmptyDir => {
                agent.config.has_devices()?;
                // Not held while looking: a container may have mounted something in it.
                let wait = agent.empty_dirs.lock();
                let root = in_time("wait for the emptyDirs", MOUNT, wait).await?.ready(id)?;
                let sub_path = sub_path.clone();
                let made = Made { uid: volume.uid, gid: volume.gid, mode: volume.mode };
                let work = move || empty_dirs::open(&root, &sub_path, made);
                self.lane.run(&doing, LOOK_UP, work).await
            }
            v1::VolumeSource::Image => {
                let image = images::take(agent, &self.lane, id).await?;
                let path = image.path().clone();
                self.images.push(image);
                let (id, sub_path) = (id.clone(), sub_path.clone());
                let work = move || open_in_image(&path, &id, &sub_path);
                self.lane.run(&doing, LOOK_UP, work).await
            }
        }
        .map(Place::Here)
    }

    /// Takes everything down; goes on past failures, may be repeated after one.
    pub async fn unstage(&mut self, agent: &Agent) -> Result<()> {
        let mounted = self.mounted.clone();
        let work = move || Ok(unmount_all(mounted));
        let (left, mut result) = self.removal.run("unmount the volumes", MOUNT, work).await?;
        self.mounted = left;
        if self.mounted.is_empty() {
            remove_places(&self.dir);
            for image in std::mem::take(&mut self.images) {
                if let Err(error) = images::release(agent, &self.removal, image).await {
                    result = Err(error);
                }
            }
        }
        result
    }
}

/// An entry of the pod's share, or what `sub_path` names in it.
pub(super) async fn open_share(
    agent: &Agent,
    lane: &Lane,
    doing: String,
    id: &str,
    sub_path: &str,
) -> Result<OwnedFd> {
    agent.config.has_devices()?;
    let wait = Arc::clone(&agent.share).lock_owned();
    let mut share = in_time("wait for the pod's share", MOUNT, wait).await?;
    // Held while mounting only: the first one mounts for the others. A look-up may lead to what a
    // container has mounted in the share.
    let mount = move || share.mount().map(|()| share.place().to_owned());
    let at = lane.run("mount the pod's share", MOUNT, mount).await?;
    let (id, sub_path) = (id.to_owned(), sub_path.to_owned());
    lane.run(&doing, LOOK_UP, move || share::open(&at, &id, &sub_path)).await
}

/// Answers what is still mounted, and the last failure.
fn unmount_all(mounted: Vec<PathBuf>) -> (Vec<PathBuf>, Result<()>) {
    let mut result = Ok(());
    let mut left = Vec::new();
    for target in mounted.into_iter().rev() {
        // What is unmounted inside stays where its mounts are shared with others.
        let slave = MsFlags::MS_REC | MsFlags::MS_SLAVE;
        let _ = mount(None::<&str>, &target, None::<&str>, slave, None::<&str>);
        // Detached: what was mounted inside goes too, and a mount namespace that is just going
        // away may still hold a copy.
        match umount2(&target, MntFlags::MNT_DETACH | MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => {}
            Err(error) => {
                result = Err(error).doing(|| format!("unmount {}", target.display()));
                left.insert(0, target);
            }
        }
    }
    (left, result)
}

/// Copies a folder of the image to `own`; what is to be mounted then, and what may still be copied.
/// None: it was too much, and the folder itself is to be mounted.
fn fill(place: OwnedFd, own: &Path, mut left: Limits) -> Result<(OwnedFd, Option<Limits>)> {
    let what = || format!("fill {}", own.display());
    let is_folder = open_dir(Path::new(&format!("/proc/self/fd/{}", place.as_raw_fd()))).is_ok();
    if !is_folder {
        return Ok((place, Some(left)));
    }
    fs::create_dir_all(own).doing(what)?;
    match copy::tree(&place, own, &mut left).doing(what)? {
        Copied::All => Ok((open_dir(own)?, Some(left))),
        Copied::TooMuch => {
            remove::everything_in(own).doing(what)?;
            fs::remove_dir(own).doing(what)?;
            Ok((place, None))
        }
    }
}

/// Removes what was mounted on. Not recursively: whatever is still mounted is somebody's data.
fn remove_places(dir: &Path) {
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let _ = fs::remove_dir(entry.path()).or_else(|_| fs::remove_file(entry.path()));
    }
    let _ = fs::remove_dir(dir);
}

/// Symlinks of the image lead to places inside the image.
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
        result => result.doing(|| format!("open {sub_path:?} in image {id}")),
    }
}

/// Mounts a copy of what `source` is on `target`, which is made; answers whether it is a folder.
fn attach(
    source: Place,
    volume: &v1::VolumeMount,
    kind: &Kind,
    userns: Option<&UserNamespace>,
    target: &Path,
) -> Result<bool> {
    let what = || format!("prepare the volume for {}", volume.destination);
    let (tree, directory) = match source {
        Place::Copied(tree, directory) => (tree, directory),
        Place::Here(place) => {
            let path = format!("/proc/self/fd/{}", place.as_raw_fd());
            let directory = fs::metadata(path).doing(what)?.is_dir();
            (Tree::copy(place.as_fd()).doing(what)?, directory)
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
            result => result.doing(what)?,
        }
    }
    tree.propagation(match kind.propagation {
        v1::Propagation::Private => MsFlags::MS_PRIVATE,
        v1::Propagation::Slave => MsFlags::MS_SLAVE,
        v1::Propagation::Shared => MsFlags::MS_SHARED,
    })
    .doing(what)?;
    if volume.recursive_read_only {
        tree.read_only(Reach::All).doing(what)?;
    } else if volume.read_only || kind.source == v1::VolumeSource::Image {
        tree.read_only(Reach::Top).doing(what)?;
    }
    let parent = target.parent().unwrap_or(Path::new("/"));
    fs::create_dir_all(parent).doing(what)?;
    if directory {
        fs::create_dir(target).doing(what)?;
    } else {
        fs::File::create_new(target).doing(what)?;
    }
    tree.attach(target).doing(what)?;
    if volume.read_only && !volume.recursive_read_only {
        open_submounts(target, &volume.submounts)?;
    }
    Ok(directory)
}

/// Lets be written to what the host has mounted below a read-only volume: here it is part of the
/// volume's own mount.
fn open_submounts(target: &Path, submounts: &[String]) -> Result<()> {
    if submounts.len() > MAX_SUBMOUNTS {
        return Err(Error::Exhausted { what: "submounts", limit: MAX_SUBMOUNTS as u64 });
    }
    if submounts.is_empty() {
        return Ok(());
    }
    let root = open_dir(target)?;
    for submount in submounts {
        // Another container may write to the volume: no link of it leads to what is protected.
        let how = OpenHow::new()
            .flags(OFlag::O_PATH | OFlag::O_CLOEXEC)
            .resolve(ResolveFlag::RESOLVE_BENEATH | ResolveFlag::RESOLVE_NO_SYMLINKS);
        let place = match openat2(root.as_fd(), relative(submount)?, how) {
            Ok(place) => place,
            // One that has gone away is no loss.
            Err(error) => {
                tracing::info!(submount, %error, "submount is not there");
                continue;
            }
        };
        let what = || format!("let {submount:?} be written to");
        if !fstatvfs(&place).doing(what)?.flags().contains(FsFlags::ST_RDONLY) {
            continue;
        }
        let tree = Tree::copy(place.as_fd()).doing(what)?;
        tree.writable().doing(what)?;
        tree.attach_at(place.as_fd()).doing(what)?;
    }
    Ok(())
}
