//! The image service: pull, import, look up, remove.

use std::collections::{BTreeSet, HashMap};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, RwLock, Weak};

use oci_spec::image::ImageConfiguration;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::aside::{Aside, Damaged};
use crate::config::Config;
use crate::content::Content;
use crate::digest::Digest;
use crate::error::Error;
use crate::files::{create_directory, remove_directory};
use crate::import;
use crate::manifest::chain_id;
use crate::progress::{Progress, ProgressSender, Tracker};
use crate::pull::pull;
use crate::reference::Reference;
use crate::registry::{Auth, Registries, run_blocking};
use crate::store::{Holds, Seen, Store, Temporary, View};

/// Digest of an image's configuration; prints as `sha256:<hex>`.
pub type ImageId = Digest;

/// A cheap handle on the images of this machine.
#[derive(Debug, Clone)]
pub struct Images(Arc<Inner>);

#[derive(Debug, Clone)]
pub struct ImageInfo {
    /// `sha256:<hex>`.
    pub id: String,
    /// Complete names with tags.
    pub repo_tags: Vec<String>,
    /// Complete names with the digest of a manifest or index.
    pub repo_digests: Vec<String>,
    /// Bytes that the image takes on this machine's disk: the file system, the configuration, the
    /// manifest, and the layers if they are kept.
    pub size: u64,
    /// A kubelet must not remove it to make room.
    pub pinned: bool,
    /// As the image's configuration has it: user, uid, and group in one string; may be empty.
    pub user: String,
    /// An artifact's is empty.
    pub config: Arc<ImageConfiguration>,
    /// The image as a read-only file system.
    pub erofs_path: PathBuf,
    /// Seconds since the epoch at which the image came here.
    pub added: u64,
}

/// How much room the images take.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FsInfo {
    pub used_bytes: u64,
    pub inodes_used: u64,
    /// The directory that holds everything.
    pub mountpoint: PathBuf,
}

/// What a collection found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Garbage {
    pub images: u64,
    pub blobs: u64,
    pub bytes: u64,
}

/// Keeps an image's file on the disk; see [`Images::hold`].
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
    /// Complete names and ids.
    pinned: BTreeSet<String>,
    pub content: Content,
    pub registries: Registries,
    /// Locked over disk writes; who only reads takes `view`.
    store: Mutex<Store>,
    /// The store after its last change. Locked for no longer than it takes to copy a pointer.
    view: RwLock<Arc<View>>,
    flights: Mutex<HashMap<FlightKey, Flight>>,
    next_flight: std::sync::atomic::AtomicU64,
    locks: Mutex<HashMap<(Purpose, Digest), Weak<Lock>>>,
    /// Locked for as long as this process uses the directory.
    _lock: File,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Purpose {
    Build,
    Blob,
}

/// Pulls are shared only between callers with the same credentials: who may not see an image must
/// not get it because somebody else may.
type FlightKey = (Reference, Auth);
type Lock = tokio::sync::Mutex<()>;
type Outcome = Option<Result<Digest, Arc<Error>>>;

/// A pull under way.
#[derive(Debug)]
struct Flight {
    number: u64,
    waiters: usize,
    abort: AbortHandle,
    outcome: watch::Receiver<Outcome>,
    progress: watch::Receiver<Progress>,
}

impl Images {
    /// Opens the directory, which must not be open in another process, and removes what a killed
    /// one left half-done.
    pub async fn open(config: Config) -> Result<Self, Error> {
        run_blocking(move || {
            create_directory(&config.root)?;
            let lock = lock(&config.root)?;
            let pinned = config.pinned.iter().map(|name| pinned(name)).collect::<Result<_, _>>()?;
            let aside = Aside::open(&config.root)?;
            let blobs = config.root.join("content");
            let content = Content::open(&blobs, config.max_partial_bytes, aside)?;
            let store = Store::open(&config.root.join("images"), &content)?;
            content.start()?;
            let config = Arc::new(config);
            Ok(Self(Arc::new(Inner {
                registries: Registries::new(Arc::clone(&config)),
                config,
                pinned,
                content,
                view: RwLock::new(Arc::new(store.view())),
                store: Mutex::new(store),
                flights: Mutex::default(),
                next_flight: Default::default(),
                locks: Mutex::default(),
                _lock: lock,
            })))
        })
        .await
    }

    /// Pulls an image. Callers that ask for the same at the same time share one pull, which ends
    /// early when all of them have dropped their futures.
    pub async fn pull(
        &self,
        reference: &str,
        auth: Option<Auth>,
        progress: Option<ProgressSender>,
    ) -> Result<ImageId, Error> {
        let reference: Reference = reference.parse()?;
        let mut waiter = self.join_flight(reference, auth.unwrap_or_default());
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
                // The pull was aborted from outside: its runtime is going down.
                gone = waiter.outcome.changed() => gone.map_err(|_| Error::Cancelled)?,
                ended = progressed => {
                    if ended.is_err() {
                        waiter.progress = None;
                    }
                }
            }
        }
    }

    fn join_flight(&self, reference: Reference, auth: Auth) -> Waiter {
        let key = (reference.clone(), auth.clone());
        let mut flights = self.0.flights.lock().expect("no holder panics");
        let flight = flights.entry(key.clone()).or_insert_with(|| {
            let number = self.0.next_flight.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let tracker = Tracker::new();
            let progress = tracker.subscribe();
            let (done, outcome) = watch::channel(None);
            let (inner, key) = (Arc::clone(&self.0), key.clone());
            let task = tokio::spawn(async move {
                let result = pull(Arc::clone(&inner), reference, auth, tracker).await;
                // From here on a new caller starts a new pull.
                let mut flights = inner.flights.lock().expect("no holder panics");
                if flights.get(&key).is_some_and(|flight| flight.number == number) {
                    flights.remove(&key);
                }
                drop(flights);
                done.send_replace(Some(result.map_err(Arc::new)));
            });
            Flight { number, waiters: 0, abort: task.abort_handle(), outcome, progress }
        });
        flight.waiters += 1;
        Waiter {
            inner: Arc::clone(&self.0),
            number: flight.number,
            outcome: flight.outcome.clone(),
            progress: Some(flight.progress.clone()),
            key,
        }
    }

    /// Imports an OCI layout (directory or tar) or a docker archive. `name` names the image where
    /// there is only one; otherwise the names in the archive count.
    pub async fn import(&self, path: &Path, name: Option<&str>) -> Result<Vec<ImageId>, Error> {
        let name = name.map(str::parse).transpose()?;
        let (inner, path) = (Arc::clone(&self.0), path.to_owned());
        import::import(inner, path, name).await
    }

    /// Finds an image by name, id, or the first digits of its id.
    pub fn image(&self, reference_or_id: &str) -> Option<ImageInfo> {
        let view = self.0.view();
        let id = find(&view, reference_or_id)?;
        view.get(&id).map(|seen| self.0.info(&view, seen))
    }

    pub fn images(&self) -> Vec<ImageInfo> {
        let view = self.0.view();
        view.images().map(|seen| self.0.info(&view, seen)).collect()
    }

    /// Removes the image that a name or id stands for, with all its names, as containerd's CRI
    /// does. Succeeds when there is none.
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

    /// Takes one name away; the image goes with its last name.
    pub async fn untag(&self, reference: &str) -> Result<(), Error> {
        let name = reference.parse::<Reference>()?.to_string();
        let inner = Arc::clone(&self.0);
        run_blocking(move || {
            inner.change(|store| {
                let Some(id) = store.view().resolve(&name) else { return Ok(()) };
                store.untag(&name)?;
                // What is left of a pulled image without tags is the name with its digest.
                let tagged = store.view().names(&id).any(|name| !name.contains('@'));
                if tagged { Ok(()) } else { store.remove(&id) }
            })
        })
        .await
    }

    /// Keeps the files of an image until the hold is dropped, also when the image is removed
    /// meanwhile. `None`: there is no such image. An image whose removal waits for its holders is
    /// found by its whole id only, so that containers of an earlier process keep it.
    pub fn hold(&self, reference_or_id: &str) -> Option<Hold> {
        let view = self.0.view();
        let id = find(&view, reference_or_id).or_else(|| reference_or_id.parse().ok())?;
        let holds = view.holds(&id)?;
        let path = view.rootfs(&id);
        holds.take().then(|| Hold { inner: Arc::clone(&self.0), holds, id, path })
    }

    /// [`Images::hold`] by the file of the image.
    pub fn hold_file(&self, path: &Path) -> Option<Hold> {
        let id = Digest::from_hex(path.parent()?.file_name()?.to_str()?)?;
        let here = self.0.view().rootfs(&id) == path;
        here.then(|| self.hold(&id.to_string())).flatten()
    }

    /// Files of the store that could not be understood and were moved aside.
    pub fn damaged(&self) -> Vec<Damaged> {
        self.0.content.aside().list()
    }

    /// From what is counted in memory; cheap enough for every call.
    pub fn fs_info(&self) -> FsInfo {
        let root = &self.0.config.root;
        let (content, images) = (self.0.content.usage(), self.0.view().usage());
        FsInfo {
            used_bytes: content.0 + images.0,
            inodes_used: content.1 + images.1,
            mountpoint: root.clone(),
        }
    }

    /// Deletes removed images that nobody holds and blobs that nothing refers to. To be called
    /// once after a start, when the containers that live on hold their images again.
    pub async fn collect_garbage(&self) -> Result<Garbage, Error> {
        let inner = Arc::clone(&self.0);
        run_blocking(move || {
            let (images, image_bytes) = inner.change(Store::reap_all)?;
            let (blobs, blob_bytes) = inner.content.sweep()?;
            Ok(Garbage { images, blobs, bytes: image_bytes + blob_bytes })
        })
        .await
    }
}

impl Inner {
    /// What the images are now; a change under way shows when it is done.
    fn view(&self) -> Arc<View> {
        self.view.read().expect("no holder panics").clone()
    }

    /// Changes the store, and deletes what that gave up once others can go on. Blocking.
    pub fn change<T>(&self, work: impl FnOnce(&mut Store) -> Result<T, Error>) -> Result<T, Error> {
        let (result, doomed) = {
            let mut store = self.store.lock().expect("no holder panics");
            let result = work(&mut store);
            // A change that failed may have done a part.
            let view = Arc::new(store.view());
            let before =
                std::mem::replace(&mut *self.view.write().expect("no holder panics"), view);
            drop(before);
            (result, store.take_doomed())
        };
        let deleted = doomed.iter().try_for_each(|path| remove_directory(path));
        result.and_then(|value| deleted.map(|()| value))
    }

    /// A directory in which an image can be built. Blocking.
    pub fn temporary(&self) -> Result<Temporary, Error> {
        self.change(Store::temporary)
    }

    fn info(&self, view: &View, seen: &Seen) -> ImageInfo {
        let id = seen.record.id;
        let (repo_digests, repo_tags): (Vec<_>, Vec<_>) =
            view.names(&id).map(str::to_owned).partition(|name| name.contains('@'));
        let user = seen.config.config().as_ref().and_then(|config| config.user().clone());
        let mut names = repo_digests.iter().chain(&repo_tags);
        ImageInfo {
            pinned: names.any(|name| self.pinned.contains(name))
                || self.pinned.contains(&id.to_string()),
            id: id.to_string(),
            repo_tags,
            repo_digests,
            size: seen.size,
            user: user.unwrap_or_default(),
            config: Arc::clone(&seen.config),
            erofs_path: view.rootfs(&id),
            added: seen.record.added,
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

    /// The image as a read-only file system.
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
            if let Err(error) = inner.change(|store| store.reap(&id)) {
                tracing::warn!(image = %id, %error, "cannot delete a removed image");
            }
        };
        // Deleting a large file takes a while.
        match tokio::runtime::Handle::try_current() {
            Ok(runtime) => drop(runtime.spawn_blocking(release)),
            Err(_) => release(),
        }
    }
}

/// One caller's part in a pull.
struct Waiter {
    inner: Arc<Inner>,
    key: FlightKey,
    number: u64,
    outcome: watch::Receiver<Outcome>,
    progress: Option<watch::Receiver<Progress>>,
}

impl Drop for Waiter {
    fn drop(&mut self) {
        let mut flights = self.inner.flights.lock().expect("no holder panics");
        let Some(flight) = flights.get_mut(&self.key).filter(|f| f.number == self.number) else {
            return;
        };
        flight.waiters -= 1;
        if flight.waiters == 0 {
            flight.abort.abort();
            flights.remove(&self.key);
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
        return view.get(&id).map(|seen| seen.record.id);
    }
    let named = text.parse::<Reference>().ok().and_then(|name| view.resolve(&name.to_string()));
    named.or_else(|| view.by_prefix(text.strip_prefix("sha256:").unwrap_or(text)))
}

/// A reference as names are kept, or an id.
fn pinned(text: &str) -> Result<String, Error> {
    match text.parse::<Digest>() {
        Ok(id) => Ok(id.to_string()),
        Err(_) => Ok(text.parse::<Reference>()?.to_string()),
    }
}

impl ImageInfo {
    /// Name of the image's stack of layers; empty without layers.
    pub fn chain_id(&self) -> String {
        chain_id(&self.config)
    }
}
