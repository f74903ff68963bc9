//! The image service: pull, import, look up, remove.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci_spec::image::ImageConfiguration;

use crate::config::Config;
use crate::damaged::Damaged;
use crate::digest::Digest;
use crate::error::Error;
use crate::import::import;
use crate::manifest::chain_id;
use crate::observe::{Observer, Unobserved};
use crate::progress::ProgressSender;
use crate::reference::Reference;
use crate::registry::{Auth, run_blocking};
use crate::shared_pulls::SharedPulls;
use crate::state::State;
use crate::store::{Holds, ImageState, Store, View};

/// Digest of an image's configuration; displayed as `sha256:<hex>`.
pub type ImageId = Digest;

/// Handle of the image service; cheap to clone.
#[derive(Debug, Clone)]
pub struct Images(Arc<Inner>);

#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// `sha256:<hex>`.
    pub id: String,
    /// Full names with tags.
    pub repo_tags: Vec<String>,
    /// Full names with the digest of a manifest or index.
    pub repo_digests: Vec<String>,
    /// Bytes on disk: file system image, configuration, manifest, and the layers if they are kept.
    pub size: u64,
    /// The kubelet's image garbage collection must not remove it.
    pub pinned: bool,
    /// `User` of the image's configuration (`user`, `uid`, `user:group`, ...); may be empty.
    pub user: String,
    /// Empty for an artifact.
    pub config: Arc<ImageConfiguration>,
    /// The image as an EROFS file.
    pub erofs_path: PathBuf,
    /// Time of the pull or import in seconds since the epoch.
    pub added: u64,
}

/// Disk usage of the images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    pub used_bytes: u64,
    pub inodes_used: u64,
    /// Root directory of the store.
    pub mountpoint: PathBuf,
}

/// What [`Images::collect_garbage`] deleted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Garbage {
    pub images: u64,
    pub blobs: u64,
    pub bytes: u64,
}

#[derive(Debug)]
struct Inner {
    state: Arc<State>,
    pulls: Arc<SharedPulls>,
    /// Full names and ids.
    pinned: BTreeSet<String>,
}

/// Keeps an image's file on disk; see [`Images::hold`].
#[derive(Debug)]
pub struct Hold {
    state: Arc<State>,
    holds: Arc<Holds>,
    id: Digest,
    path: PathBuf,
}

impl Images {
    /// Opens the store and deletes incomplete files of a killed process. Fails if another process
    /// has it open.
    pub async fn open(config: Config) -> Result<Self, Error> {
        Self::open_observed(config, Arc::new(Unobserved)).await
    }

    /// [`Self::open`], with an observer of measurements.
    pub async fn open_observed(config: Config, observer: Arc<dyn Observer>) -> Result<Self, Error> {
        run_blocking(move || {
            let pinned = config.pinned.iter().map(|name| pinned(name)).collect::<Result<_, _>>()?;
            let state = Arc::new(State::open(config, observer)?);
            Ok(Self(Arc::new(Inner { state, pulls: Arc::default(), pinned })))
        })
        .await
    }

    /// Pulls an image. Concurrent callers with equal arguments share one pull, which is cancelled
    /// when all of them have dropped their futures.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
        progress: Option<ProgressSender>,
    ) -> Result<ImageId, Error> {
        let reference: Reference = reference.parse()?;
        self.0.pulls.pull(&self.0.state, reference, auth.unwrap_or_default(), progress).await
    }

    /// Imports an OCI layout (directory or tar) or a docker archive. `name` names the image of an
    /// archive with a single image; otherwise the archive's names are used.
    pub async fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<ImageId>, Error> {
        let name = name.map(str::parse).transpose()?;
        let (state, path) = (Arc::clone(&self.0.state), path.to_owned());
        import(state, path, name).await
    }

    /// Finds an image by name, id, or unique prefix of its id.
    pub fn image(&self, reference_or_id: &str) -> Option<ImageInfo> {
        let view = self.0.state.view();
        let id = find(&view, reference_or_id)?;
        view.get(&id).map(|state| self.0.info(&view, state))
    }

    pub fn images(&self) -> Vec<ImageInfo> {
        let view = self.0.state.view();
        view.images().map(|state| self.0.info(&view, state)).collect()
    }

    /// Removes the image with this name or id and all its names, as containerd's CRI plugin does.
    /// Succeeds if there is none.
    pub async fn remove(&self, reference: &str) -> Result<(), Error> {
        let (state, reference) = (Arc::clone(&self.0.state), reference.to_owned());
        run_blocking(move || {
            state.change(|store| match find(&store.view(), &reference) {
                Some(id) => store.remove(&id),
                None => Ok(()),
            })
        })
        .await
    }

    /// Removes one name; removing the last name removes the image.
    pub async fn untag(&self, reference: &str) -> Result<(), Error> {
        let name = reference.parse::<Reference>()?.to_string();
        let state = Arc::clone(&self.0.state);
        run_blocking(move || {
            state.change(|store| {
                let Some(id) = store.view().resolve(&name) else { return Ok(()) };
                store.untag(&name)?;
                // Without tags, a pulled image has only the name with its digest left.
                let tagged = store.view().names(&id).any(|name| !name.contains('@'));
                if tagged { Ok(()) } else { store.remove(&id) }
            })
        })
        .await
    }

    /// Keeps the files of an image until the hold is dropped, also if the image is removed
    /// meanwhile. `None` if there is no such image. An image whose removal is pending is found by
    /// its full id only, so that containers of an earlier daemon process can hold it.
    pub fn hold(&self, reference_or_id: &str) -> Option<Hold> {
        let view = self.0.state.view();
        let id = find(&view, reference_or_id).or_else(|| reference_or_id.parse().ok())?;
        let holds = view.holds(&id)?;
        let path = view.rootfs(&id);
        holds.take().then(|| Hold { state: Arc::clone(&self.0.state), holds, id, path })
    }

    /// [`Images::hold`] by the path of the image's EROFS file.
    pub fn hold_file(&self, path: &Path) -> Option<Hold> {
        let id = Digest::from_hex(path.parent()?.file_name()?.to_str()?)?;
        let here = self.0.state.view().rootfs(&id) == path;
        here.then(|| self.hold(&id.to_string())).flatten()
    }

    /// Files of the store that were found damaged; see [`Damaged`].
    pub fn damaged(&self) -> Vec<Damaged> {
        self.0.state.content.damaged().list()
    }

    /// From counters in memory; cheap.
    pub fn fs_info(&self) -> FsInfo {
        let root = &self.0.state.config.root;
        let (content, images) = (self.0.state.content.usage(), self.0.state.view().usage());
        FsInfo {
            used_bytes: content.0 + images.0,
            inodes_used: content.1 + images.1,
            mountpoint: root.clone(),
        }
    }

    /// Deletes removed images without holds and unreferenced blobs. To be called once after a
    /// start, when the running containers hold their images again.
    pub async fn collect_garbage(&self) -> Result<Garbage, Error> {
        let state = Arc::clone(&self.0.state);
        run_blocking(move || {
            let (images, image_bytes) = state.change(Store::delete_removed)?;
            let (blobs, blob_bytes) = state.content.sweep()?;
            Ok(Garbage { images, blobs, bytes: image_bytes + blob_bytes })
        })
        .await
    }
}

impl Inner {
    fn info(&self, view: &View, state: &ImageState) -> ImageInfo {
        let id = state.record.id;
        let (repo_digests, repo_tags): (Vec<_>, Vec<_>) =
            view.names(&id).map(str::to_owned).partition(|name| name.contains('@'));
        let user = state.config.config().as_ref().and_then(|config| config.user().clone());
        let mut names = repo_digests.iter().chain(&repo_tags);
        ImageInfo {
            pinned: names.any(|name| self.pinned.contains(name))
                || self.pinned.contains(&id.to_string()),
            id: id.to_string(),
            repo_tags,
            repo_digests,
            size: state.size,
            user: user.unwrap_or_default(),
            config: Arc::clone(&state.config),
            erofs_path: view.rootfs(&id),
            added: state.record.added,
        }
    }
}

impl Hold {
    pub fn id(&self) -> ImageId {
        self.id
    }

    /// The image's EROFS file.
    pub fn erofs_path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if !self.holds.release() {
            return;
        }
        let (state, id) = (Arc::clone(&self.state), self.id);
        let release = move || {
            if let Err(error) = state.change(|store| store.delete_if_removed(&id)) {
                tracing::warn!(image = %id, %error, "cannot delete a removed image");
            }
        };
        // Off the async threads: deleting a large file takes time.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(release)),
            Err(_) => release(),
        }
    }
}

fn find(view: &View, text: &str) -> Option<Digest> {
    if let Ok(id) = text.parse::<Digest>() {
        return view.get(&id).map(|state| state.record.id);
    }
    let named = text.parse::<Reference>().ok().and_then(|name| view.resolve(&name.to_string()));
    named.or_else(|| view.by_prefix(text.strip_prefix("sha256:").unwrap_or(text)))
}

/// A full reference, or an id.
fn pinned(text: &str) -> Result<String, Error> {
    match text.parse::<Digest>() {
        Ok(id) => Ok(id.to_string()),
        Err(_) => Ok(text.parse::<Reference>()?.to_string()),
    }
}

impl ImageInfo {
    /// ChainID of the image's layers; empty without layers.
    pub fn chain_id(&self) -> String {
        chain_id(&self.config)
    }
}
