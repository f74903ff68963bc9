//! The image service: pull, import, look up, remove; shares a pull between concurrent callers.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock, Weak};

use oci_spec::image::ImageConfiguration;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::config::Config;
use crate::content::Content;
use crate::damaged::{Damaged, DamagedFiles};
use crate::digest::Digest;
use crate::error::Error;
use crate::files::{create_directory, remove_directory};
use crate::import;
use crate::manifest::chain_id;
use crate::observe::{Observer, Pulling, Unobserved};
use crate::progress::{Progress, ProgressSender, Tracker};
use crate::pull::pull;
use crate::reference::Reference;
use crate::registry::{Auth, Registries, run_blocking};
use crate::store::{Holds, ImageState, Store, Temporary, View};

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

/// Keeps an image's file on disk; see [`Images::hold`].
#[derive(Debug)]
pub struct Hold {
    inner: Arc<Inner>,
    holds: Arc<Holds>,
    id: Digest,
    path: PathBuf,
}

#[derive(Debug)]
pub(crate) struct Inner {
    pub config: Arc<Config>,
    pub observer: Arc<dyn Observer>,
    /// Full names and ids.
    pinned: BTreeSet<String>,
    pub content: Content,
    pub registries: Registries,
    /// Locked during disk writes; readers use `view`.
    store: Mutex<Store>,
    /// The store after its last change. Locked only to copy or replace the pointer.
    view: RwLock<Arc<View>>,
    pulls: Mutex<HashMap<PullKey, SharedPull>>,
    next_pull: std::sync::atomic::AtomicU64,
    locks: Mutex<HashMap<(Purpose, Digest), Weak<Lock>>>,
    /// flock on the directory for the lifetime of this process.
    _lock: File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Purpose {
    Build,
    Blob,
}

/// Pulls are shared only between callers with equal credentials: a caller without access must not
/// get an image because another caller has access.
type PullKey = (Reference, Auth);
type Lock = tokio::sync::Mutex<()>;
type Outcome = Option<Result<Digest, Arc<Error>>>;

/// A pull in progress.
#[derive(Debug)]
struct SharedPull {
    number: u64,
    waiters: usize,
    abort: AbortHandle,
    outcome: watch::Receiver<Outcome>,
    progress: watch::Receiver<Progress>,
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
            create_directory(&config.root)?;
            let lock = lock(&config.root)?;
            let pinned = config.pinned.iter().map(|name| pinned(name)).collect::<Result<_, _>>()?;
            let damaged = DamagedFiles::open(&config.root)?;
            let blobs = config.root.join("content");
            let content = Content::open(&blobs, config.max_partial_bytes, damaged)?;
            let store = Store::open(&config.root.join("images"), &content)?;
            content.start()?;
            let config = Arc::new(config);
            Ok(Self(Arc::new(Inner {
                registries: Registries::new(Arc::clone(&config)),
                config,
                observer,
                pinned,
                content,
                view: RwLock::new(Arc::new(store.view())),
                store: Mutex::new(store),
                pulls: Mutex::default(),
                next_pull: Default::default(),
                locks: Mutex::default(),
                _lock: lock,
            })))
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
        let mut waiter = self.join_pull(reference, auth.unwrap_or_default());
        loop {
            if let (Some(sender), Some(updates)) = (&progress, &mut waiter.progress) {
                sender.send_replace(updates.borrow_and_update().clone());
            }
            if let Some(outcome) = waiter.outcome.borrow_and_update().clone() {
                return outcome.map_err(|e| match Arc::try_unwrap(e) {
                    Ok(e) => e,
                    Err(shared) => Error::Shared(shared),
                });
            }
            let progressed = async {
                match &mut waiter.progress {
                    Some(updates) if progress.is_some() => updates.changed().await,
                    _ => std::future::pending().await,
                }
            };
            tokio::select! {
                // The task was aborted: its runtime shuts down.
                gone = waiter.outcome.changed() => gone.map_err(|_| Error::Cancelled)?,
                ended = progressed => {
                    if ended.is_err() {
                        waiter.progress = None;
                    }
                }
            }
        }
    }

    fn join_pull(&self, reference: Reference, auth: Auth) -> Waiter {
        let key = (reference.clone(), auth.clone());
        let mut pulls = self.0.pulls.lock().expect("no holder panics");
        let shared = pulls.entry(key.clone()).or_insert_with(|| {
            let number = self.0.next_pull.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let tracker = Tracker::new();
            let progress = tracker.subscribe();
            let (done, outcome) = watch::channel(None);
            let (inner, key) = (Arc::clone(&self.0), key.clone());
            let pulling = Pulling::begin(inner.observer.clone());
            let task = tokio::spawn(async move {
                let result = pull(Arc::clone(&inner), reference, auth, tracker).await;
                pulling.end(&result);
                // A later caller starts a new pull.
                let mut pulls = inner.pulls.lock().expect("no holder panics");
                if pulls.get(&key).is_some_and(|shared| shared.number == number) {
                    pulls.remove(&key);
                }
                drop(pulls);
                done.send_replace(Some(result.map_err(Arc::new)));
            });
            SharedPull { number, waiters: 0, abort: task.abort_handle(), outcome, progress }
        });
        shared.waiters += 1;
        Waiter {
            inner: Arc::clone(&self.0),
            number: shared.number,
            outcome: shared.outcome.clone(),
            progress: Some(shared.progress.clone()),
            key,
        }
    }

    /// Imports an OCI layout (directory or tar) or a docker archive. `name` names the image of an
    /// archive with a single image; otherwise the archive's names are used.
    pub async fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<ImageId>, Error> {
        let name = name.map(str::parse).transpose()?;
        let (inner, path) = (Arc::clone(&self.0), path.to_owned());
        import::import(inner, path, name).await
    }

    /// Finds an image by name, id, or unique prefix of its id.
    pub fn image(&self, reference_or_id: &str) -> Option<ImageInfo> {
        let view = self.0.view();
        let id = find(&view, reference_or_id)?;
        view.get(&id).map(|state| self.0.info(&view, state))
    }

    pub fn images(&self) -> Vec<ImageInfo> {
        let view = self.0.view();
        view.images().map(|state| self.0.info(&view, state)).collect()
    }

    /// Removes the image with this name or id and all its names, as containerd's CRI plugin does.
    /// Succeeds if there is none.
    pub async fn remove(&self, reference: &str) -> Result<(), Error> {
        let (inner, reference) = (Arc::clone(&self.0), reference.to_owned());
        run_blocking(move || {
            inner.change(|store| match find(&store.view(), &reference) {
                Some(id) => store.remove(&id),
                None => Ok(()),
            })
        })
        .await
    }

    /// Removes one name; removing the last name removes the image.
    pub async fn untag(&self, reference: &str) -> Result<(), Error> {
        let name = reference.parse::<Reference>()?.to_string();
        let inner = Arc::clone(&self.0);
        run_blocking(move || {
            inner.change(|store| {
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
        let view = self.0.view();
        let id = find(&view, reference_or_id).or_else(|| reference_or_id.parse().ok())?;
        let holds = view.holds(&id)?;
        let path = view.rootfs(&id);
        holds.take().then(|| Hold { inner: Arc::clone(&self.0), holds, id, path })
    }

    /// [`Images::hold`] by the path of the image's EROFS file.
    pub fn hold_file(&self, path: &Path) -> Option<Hold> {
        let id = Digest::from_hex(path.parent()?.file_name()?.to_str()?)?;
        let here = self.0.view().rootfs(&id) == path;
        here.then(|| self.hold(&id.to_string())).flatten()
    }

    /// Files of the store that were found damaged; see [`Damaged`].
    pub fn damaged(&self) -> Vec<Damaged> {
        self.0.content.damaged().list()
    }

    /// From counters in memory; cheap.
    pub fn fs_info(&self) -> FsInfo {
        let root = &self.0.config.root;
        let (content, images) = (self.0.content.usage(), self.0.view().usage());
        FsInfo {
            used_bytes: content.0 + images.0,
            inodes_used: content.1 + images.1,
            mountpoint: root.clone(),
        }
    }

    /// Deletes removed images without holds and unreferenced blobs. To be called once after a
    /// start, when the running containers hold their images again.
    pub async fn collect_garbage(&self) -> Result<Garbage, Error> {
        let inner = Arc::clone(&self.0);
        run_blocking(move || {
            let (images, image_bytes) = inner.change(Store::delete_removed)?;
            let (blobs, blob_bytes) = inner.content.sweep()?;
            Ok(Garbage { images, blobs, bytes: image_bytes + blob_bytes })
        })
        .await
    }
}

impl Inner {
    /// The current state of the images; a change in progress is visible when it is complete.
    fn view(&self) -> Arc<View> {
        self.view.read().expect("no holder panics").clone()
    }

    /// Changes the store, then, without the lock, deletes the files that the change released.
    /// Blocking.
    pub fn change<T>(&self, work: impl FnOnce(&mut Store) -> Result<T, Error>) -> Result<T, Error> {
        let (result, pending_deletes) = {
            let mut store = self.store.lock().expect("no holder panics");
            let result = work(&mut store);
            // Also after an error: the change may have been applied in part.
            let view = Arc::new(store.view());
            let before =
                std::mem::replace(&mut *self.view.write().expect("no holder panics"), view);
            drop(before);
            (result, store.take_pending_deletes())
        };
        let deleted = pending_deletes.iter().try_for_each(|path| remove_directory(path));
        result.and_then(|value| deleted.map(|()| value))
    }

    /// A directory in which to build an image. Blocking.
    pub fn temporary(&self) -> Result<Temporary, Error> {
        self.change(Store::temporary)
    }

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

    pub fn build_lock(&self, id: Digest) -> Arc<Lock> {
        self.lock(Purpose::Build, id)
    }

    pub fn blob_lock(&self, digest: Digest) -> Arc<Lock> {
        self.lock(Purpose::Blob, digest)
    }

    fn lock(&self, purpose: Purpose, digest: Digest) -> Arc<Lock> {
        let mut locks = self.locks.lock().expect("no holder panics");
        locks.retain(|_, lock| lock.strong_count() > 0);
        if let Some(lock) = locks.get(&(purpose, digest)).and_then(Weak::upgrade) {
            return lock;
        }
        let lock = Arc::default();
        locks.insert((purpose, digest), Arc::downgrade(&lock));
        lock
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.content.stop();
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
        let (inner, id) = (Arc::clone(&self.inner), self.id);
        let release = move || {
            if let Err(error) = inner.change(|store| store.delete_if_removed(&id)) {
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

/// One caller's share of a pull; dropping the last one cancels the pull.
struct Waiter {
    inner: Arc<Inner>,
    key: PullKey,
    number: u64,
    outcome: watch::Receiver<Outcome>,
    progress: Option<watch::Receiver<Progress>>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut pulls = self.inner.pulls.lock().expect("no holder panics");
        let Some(shared) = pulls.get_mut(&self.key).filter(|f| f.number == self.number) else {
            return;
        };
        shared.waiters -= 1;
        if shared.waiters == 0 {
            shared.abort.abort();
            pulls.remove(&self.key);
        }
    }
}

fn lock(root: &Path) -> Result<File, Error> {
    let path = root.join("images.lock");
    let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(std::fs::TryLockError::WouldBlock) => Err(Error::InUse { root: root.into() }),
        Err(std::fs::TryLockError::Error(e)) => Err(Error::io("lock", &path, e)),
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
