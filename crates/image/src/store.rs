//! The store's records: one per image, and one file with all names.
//!
//! ```text
//! images/<id>/record.json     written once, before the directory gets its name
//! images/<id>/rootfs.erofs
//! images/refs.json            name -> id, replaced atomically
//! ```
//!
//! A record also contains its image's names, so that a damaged `refs.json` can be rebuilt from the
//! records. Damaged files are moved away ([`crate::damaged`]).
//!
//! Blocking; callers provide thread and lock. A [`View`] is an immutable copy of the store's state:
//! readers use it without disk access and never wait for a writer.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use oci_spec::image::ImageConfiguration;

use crate::content::{Content, Lease};
use crate::digest::Digest;
use crate::error::Error;
use crate::files::{create_directory, list, remove_any, sync_directory, usage};
use crate::manifest::{empty_config, read_config};
use crate::record::{Layer, Record, Refs, read_record, read_refs, write_record, write_refs};

/// Prefix of directories being built or deleted; deleted when the store opens.
const TEMPORARY: &str = ".tmp-";
const RECORD: &str = "record.json";
const ROOTFS: &str = "rootfs.erofs";
const REFS: &str = "refs.json";

/// An image in memory.
#[derive(Debug)]
pub struct Entry {
    record: Record,
    config: Arc<ImageConfiguration>,
    size: u64,
    usage: (u64, u64),
    holds: Arc<Holds>,
    _leases: Vec<Lease>,
}

/// State of an image for readers.
#[derive(Debug, Clone)]
pub struct ImageState {
    pub record: Record,
    pub config: Arc<ImageConfiguration>,
    /// Bytes on disk of the EROFS file and the blobs that belong to the image.
    pub size: u64,
    /// Bytes and number of files of the image's directory, including the directory.
    usage: (u64, u64),
    pub holds: Arc<Holds>,
}

/// Number of holds on an image's files, or the mark that they are deleted. Shared by the store and
/// its views, so that taking a hold needs no lock and fails if the files are being deleted.
#[derive(Debug, Default)]
pub struct Holds(AtomicUsize);

impl Holds {
    const DELETED: usize = usize::MAX;

    /// Takes a hold; false if the files are deleted.
    pub fn take(&self) -> bool {
        let one_more = |holds| (holds != Self::DELETED).then(|| holds + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// Releases a hold; true if it was the last. See [`Store::delete_if_removed`].
    pub fn release(&self) -> bool {
        self.0.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Prevents further holds; false if there are any.
    fn close(&self) -> bool {
        self.0.compare_exchange(0, Self::DELETED, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Reverts [`Holds::close`].
    fn reopen(&self) {
        self.0.store(0, Ordering::Release);
    }

    fn are_deleted(&self) -> bool {
        self.0.load(Ordering::Acquire) == Self::DELETED
    }

    fn is_held(&self) -> bool {
        !matches!(self.0.load(Ordering::Acquire), 0 | Self::DELETED)
    }
}

/// Immutable state of the store.
#[derive(Debug)]
pub struct View {
    root: PathBuf,
    images: BTreeMap<Digest, ImageState>,
    refs: BTreeMap<String, Digest>,
    temporaries: Vec<Weak<PathBuf>>,
}

impl View {
    /// An image whose removal is not pending.
    pub fn get(&self, id: &Digest) -> Option<&ImageState> {
        self.images.get(id).filter(|state| state.is_listed())
    }

    /// Also for an image whose removal is pending.
    pub fn holds(&self, id: &Digest) -> Option<Arc<Holds>> {
        self.images.get(id).map(|state| state.holds.clone())
    }

    pub fn images(&self) -> impl Iterator<Item = &ImageState> {
        self.images.values().filter(|state| state.is_listed())
    }

    /// Names of an image.
    pub fn names(&self, id: &Digest) -> impl Iterator<Item = &str> {
        self.refs.iter().filter(move |(_, target)| *target == id).map(|(name, _)| name.as_str())
    }

    pub fn resolve(&self, name: &str) -> Option<Digest> {
        self.refs.get(name).copied()
    }

    /// The only image whose id has this prefix.
    pub fn by_prefix(&self, prefix: &str) -> Option<Digest> {
        let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if prefix.is_empty() || !prefix.chars().all(hex) {
            return None;
        }
        let mut matching = self.images().filter(|state| state.record.id.hex().starts_with(prefix));
        let first = matching.next()?;
        matching.next().is_none().then_some(first.record.id)
    }

    pub fn rootfs(&self, id: &Digest) -> PathBuf {
        self.root.join(id.hex()).join(ROOTFS)
    }

    /// Bytes on disk and number of files, from memory except for images being built.
    pub fn usage(&self) -> (u64, u64) {
        let making = self.temporaries.iter().filter_map(Weak::upgrade).map(|path| {
            // Missing after publish or failure.
            fs::metadata(path.join(ROOTFS)).map_or((0, 0), |m| (m.blocks() * 512, 2))
        });
        let made = self.images.values().map(|state| state.usage);
        made.chain(making).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}

impl ImageState {
    fn is_listed(&self) -> bool {
        !self.record.removed && !self.holds.are_deleted()
    }
}

#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    content: Content,
    images: BTreeMap<Digest, Entry>,
    refs: Refs,
    next_temporary: u64,
    /// Directories of images being built.
    temporaries: Vec<Weak<PathBuf>>,
    /// Directories to delete without the lock; see [`Store::take_pending_deletes`].
    pending_deletes: Vec<PathBuf>,
}

impl Store {
    pub fn open(root: &Path, content: &Content) -> Result<Self, Error> {
        create_directory(root)?;
        let mut store = Self {
            root: root.into(),
            content: content.clone(),
            images: BTreeMap::new(),
            refs: BTreeMap::new(),
            next_temporary: 0,
            temporaries: Vec::new(),
            pending_deletes: Vec::new(),
        };
        for (name, entry) in list(root)? {
            let path = entry.path();
            if name.starts_with(TEMPORARY) {
                remove_any(&path)?;
            } else if let Some(id) = Digest::from_hex(&name) {
                match read_record(&path.join(RECORD), id).and_then(|record| store.load(record)) {
                    Ok(entry) => drop(store.images.insert(id, entry)),
                    Err(e) if e.is_damage() => store.move_to_damaged(&path, &e),
                    Err(e) => return Err(e),
                }
            }
        }
        store.load_refs()?;
        Ok(store)
    }

    /// Moves a damaged image away: one bad image must not prevent the daemon from starting, and it
    /// can be pulled again. Its EROFS file is deleted first: it is large, and cannot be verified
    /// without a record. Files of a newer release are kept.
    fn move_to_damaged(&self, path: &Path, error: &Error) {
        if error.is_newer_version() {
            self.content.damaged().move_newer(path, &with_causes(error));
            return;
        }
        // Fails if missing or a directory, which is then moved with the rest.
        let _ = fs::remove_file(path.join(ROOTFS));
        self.content.damaged().move_away(path, &with_causes(error));
    }

    fn load_refs(&mut self) -> Result<(), Error> {
        let path = self.root.join(REFS);
        let known = match read_refs(&path) {
            Ok(refs) => refs,
            Err(e) if e.is_newer_version() => {
                self.content.damaged().move_newer(&path, &with_causes(&e));
                None
            }
            Err(e) if e.is_damage() => {
                self.content.damaged().move_away(&path, &with_causes(&e));
                None
            }
            Err(e) => return Err(e),
        };
        let rebuilt = known.is_none() && !self.images.is_empty();
        self.refs = known.unwrap_or_else(|| self.refs_of_records());
        self.refs.retain(|_, id| self.images.get(id).is_some_and(|e| !e.record.removed));
        if rebuilt {
            tracing::warn!(names = self.refs.len(), "image names were rebuilt from the records");
            // On a full disk: the next start rebuilds them again.
            if let Err(error) = self.write_refs(self.refs.clone()) {
                tracing::warn!(%error, "cannot write the image names");
            }
        }
        for id in self.images.keys().copied().collect::<Vec<_>>() {
            self.write_names(&id);
        }
        Ok(())
    }

    /// If two records have the same name, the one written last has it: the name was moved to it.
    fn refs_of_records(&self) -> Refs {
        let written = |id: &Digest| {
            let metadata = fs::metadata(self.root.join(id.hex()).join(RECORD));
            metadata.and_then(|m| m.modified()).unwrap_or(std::time::UNIX_EPOCH)
        };
        let mut records: Vec<_> =
            self.images.values().map(|e| (written(&e.record.id), &e.record)).collect();
        records.sort_by_key(|(written, record)| (*written, record.id));
        let names = records
            .into_iter()
            .flat_map(|(_, record)| record.names.iter().map(move |name| (name.clone(), record.id)));
        names.collect()
    }

    /// Updates the names in an image's record from `refs`. They are a second copy, so a failure is
    /// only logged.
    fn write_names(&mut self, id: &Digest) {
        let of_image = self.refs.iter().filter(|(_, target)| *target == id);
        let names: Vec<String> = of_image.map(|(name, _)| name.clone()).collect();
        let path = self.root.join(id.hex()).join(RECORD);
        let Some(entry) = self.images.get_mut(id).filter(|e| e.record.names != names) else {
            return;
        };
        let record = Record { names, ..entry.record.clone() };
        match write_record(&path, &record) {
            Ok(()) => entry.record = record,
            Err(error) => {
                tracing::warn!(image = %id, %error, "cannot write the names to the image's record");
            }
        }
    }

    fn load(&self, record: Record) -> Result<Entry, Error> {
        let mut leases = vec![self.content.lease(record.id)];
        leases.extend(record.manifest.map(|digest| self.content.lease(digest)));
        if record.layers_kept {
            leases.extend(record.layers.iter().map(|layer| self.content.lease(layer.digest)));
        }
        let config = if record.artifact {
            empty_config()
        } else {
            let path = self.content.path(&record.id);
            let config = self.content.read(&record.id).and_then(|bytes| {
                read_config(&bytes).map_err(|e| Error::Record { path, reason: e.to_string() })
            });
            if let Err(e) = &config
                && e.is_damage()
            {
                self.content.move_to_damaged(&record.id, &with_causes(e));
            }
            config?
        };
        self.check_blobs(&record);
        let rootfs = self.rootfs(&record.id);
        let metadata = fs::metadata(&rootfs).map_err(|e| Error::io("read", &rootfs, e))?;
        if metadata.len() != record.rootfs_bytes {
            let reason = format!("{} bytes, not {}", metadata.len(), record.rootfs_bytes);
            return Err(Error::Record { path: rootfs, reason });
        }
        let usage = usage(&self.root.join(record.id.hex()));
        let mut blobs = BTreeSet::from([record.id]);
        blobs.extend(record.manifest);
        if record.layers_kept {
            blobs.extend(record.layers.iter().map(|layer| layer.digest));
        }
        let blobs: u64 = blobs.iter().map(|digest| self.content.disk_size(digest)).sum();
        Ok(Entry {
            size: metadata.blocks() * 512 + blobs,
            usage,
            record,
            config: Arc::new(config),
            holds: Arc::default(),
            _leases: leases,
        })
    }

    /// Moves damaged blobs away that the image does not need to run; the image stays. Layers are
    /// checked by length only: hashing them would take minutes.
    fn check_blobs(&self, record: &Record) {
        let manifest = record.manifest.filter(|digest| self.content.path(digest).exists());
        if let Some(digest) = manifest
            && let Err(e) = self.content.read(&digest)
            && e.is_damage()
        {
            self.content.move_to_damaged(&digest, &with_causes(&e));
        }
        for Layer { digest, size } in record.layers.iter().filter(|_| record.layers_kept) {
            let got = self.content.size(digest);
            if got != *size && self.content.path(digest).exists() {
                let reason = format!("{got} bytes, not {size}");
                self.content.move_to_damaged(digest, &reason);
            }
        }
    }

    pub fn view(&self) -> View {
        let state = |entry: &Entry| {
            let Entry { record, config, size, usage, holds, _leases } = entry;
            let (record, config, holds) = (record.clone(), config.clone(), holds.clone());
            ImageState { record, config, size: *size, usage: *usage, holds }
        };
        View {
            root: self.root.clone(),
            images: self.images.iter().map(|(id, entry)| (*id, state(entry))).collect(),
            refs: self.refs.clone(),
            temporaries: self.temporaries.clone(),
        }
    }

    fn rootfs(&self, id: &Digest) -> PathBuf {
        self.root.join(id.hex()).join(ROOTFS)
    }

    /// A directory in which to build an image; see [`Store::publish`].
    pub fn temporary(&mut self) -> Result<Temporary, Error> {
        self.next_temporary += 1;
        let path = self.root.join(format!("{TEMPORARY}{}", self.next_temporary));
        create_directory(&path)?;
        let path = Arc::new(path);
        self.temporaries.retain(|temporary| temporary.strong_count() > 0);
        self.temporaries.push(Arc::downgrade(&path));
        Ok(Temporary(path))
    }

    /// Renames a finished image into place. The configuration's blob must be in the content store.
    pub fn publish(&mut self, build: Temporary, record: Record) -> Result<(), Error> {
        let id = record.id;
        let target = self.root.join(id.hex());
        if self.images.contains_key(&id) {
            // Same content; only a pending removal is cancelled.
            return self.cancel_removal(&id).map(drop);
        }
        write_record(&build.0.join(RECORD), &record)?;
        if fs::symlink_metadata(&target).is_ok() {
            // Damaged, and the move failed when the store was opened.
            self.content.damaged().move_away(&target, "not in use");
        }
        fs::rename(&*build.0, &target).map_err(|e| Error::io("rename", &target, e))?;
        sync_directory(&self.root)?;
        let entry = self.load(record)?;
        self.images.insert(id, entry);
        Ok(())
    }

    /// Whether the image exists; cancels a pending removal.
    pub fn cancel_removal(&mut self, id: &Digest) -> Result<bool, Error> {
        let path = self.root.join(id.hex()).join(RECORD);
        let Some(entry) = self.images.get_mut(id) else { return Ok(false) };
        if entry.record.removed {
            let record = Record { removed: false, ..entry.record.clone() };
            write_record(&path, &record)?;
            entry.record = record;
        }
        Ok(true)
    }

    /// Points names to an image, replacing previous targets. False if the image does not exist.
    pub fn tag(&mut self, id: &Digest, names: &[String]) -> Result<bool, Error> {
        if self.images.get(id).is_none_or(|entry| entry.record.removed) {
            return Ok(false);
        }
        if names.iter().all(|name| self.refs.get(name) == Some(id)) {
            return Ok(true);
        }
        let mut refs = self.refs.clone();
        refs.extend(names.iter().map(|name| (name.clone(), *id)));
        let written = self.write_refs(refs);
        let named = self.refs.values().any(|target| target == id);
        if written.is_err() && !names.is_empty() && !named {
            // A new image without a name cannot be found, so it is removed.
            let _ = self.remove(id);
        }
        written.map(|()| true)
    }

    /// Removes one name.
    pub fn untag(&mut self, name: &str) -> Result<(), Error> {
        let mut refs = self.refs.clone();
        if refs.remove(name).is_none() {
            return Ok(());
        }
        self.write_refs(refs)
    }

    /// Removes an image and its names; its files stay while it is held.
    pub fn remove(&mut self, id: &Digest) -> Result<(), Error> {
        let Some(entry) = self.images.get_mut(id) else { return Ok(()) };
        if entry.holds.close() {
            // The files first, as a full disk allows no write before. Names without an image are
            // dropped when the store opens.
            self.forget(id)?;
        } else if !entry.record.removed {
            let record = Record { removed: true, ..entry.record.clone() };
            write_record(&self.root.join(id.hex()).join(RECORD), &record)?;
            entry.record = record;
        }
        let mut refs = self.refs.clone();
        refs.retain(|_, target| target != id);
        self.write_refs(refs)
    }

    /// Deletes the files of all removed images without holds; returns their number and bytes.
    pub fn delete_removed(&mut self) -> Result<(u64, u64), Error> {
        let removed = self.images.values().filter(|e| e.record.removed && !e.holds.is_held());
        let removed: BTreeSet<_> = removed.map(|e| (e.record.id, e.usage.0)).collect();
        for (id, _) in &removed {
            self.delete_if_removed(id)?;
        }
        Ok((removed.len() as u64, removed.iter().map(|(_, bytes)| bytes).sum()))
    }

    /// Deletes the files of an image if it is removed and has no holds. To be called after the last
    /// hold was released.
    pub fn delete_if_removed(&mut self, id: &Digest) -> Result<(), Error> {
        match self.images.get(id) {
            Some(entry) if entry.record.removed && entry.holds.close() => self.forget(id),
            _ => Ok(()),
        }
    }

    /// Forgets the image and moves its directory to the pending deletes. After [`Holds::close`].
    fn forget(&mut self, id: &Digest) -> Result<(), Error> {
        let discarded = self.discard(&self.root.join(id.hex()));
        if discarded.is_err() {
            if let Some(entry) = self.images.get(id) {
                entry.holds.reopen();
            }
            return discarded;
        }
        // Drops its leases, and so its blobs.
        self.images.remove(id);
        Ok(())
    }

    /// Renames the directory for later deletion: deleting a large file takes too long under the
    /// lock, and a directory without its record would count as damaged after a crash.
    fn discard(&mut self, path: &Path) -> Result<(), Error> {
        self.next_temporary += 1;
        let pending_deletes = self.root.join(format!("{TEMPORARY}{}", self.next_temporary));
        fs::rename(path, &pending_deletes).map_err(|e| Error::io("rename", path, e))?;
        self.pending_deletes.push(pending_deletes);
        Ok(())
    }

    /// The directories to delete after unlocking the store.
    pub fn take_pending_deletes(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.pending_deletes)
    }

    fn write_refs(&mut self, refs: Refs) -> Result<(), Error> {
        write_refs(&self.root.join(REFS), &refs)?;
        let before = std::mem::replace(&mut self.refs, refs);
        let changed = |from: &BTreeMap<String, Digest>, to: &BTreeMap<String, Digest>| {
            let moved = from.iter().filter(|(name, id)| to.get(*name) != Some(*id));
            moved.map(|(_, id)| *id).collect::<BTreeSet<_>>()
        };
        // First the images that gain names: after a crash in between, a name is then in two records
        // instead of in none.
        let (losing, gaining) = (changed(&before, &self.refs), changed(&self.refs, &before));
        for id in gaining.iter().chain(losing.difference(&gaining)) {
            self.write_names(id);
        }
        Ok(())
    }
}

impl Record {
    pub fn new(id: Digest, manifest: Option<Digest>, layers: Vec<Layer>, kept: bool) -> Self {
        let since_epoch = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap_or_default();
        Self {
            id,
            artifact: false,
            manifest,
            layers,
            layers_kept: kept,
            rootfs_bytes: 0,
            inodes: 0,
            added: since_epoch.as_secs(),
            removed: false,
            names: Vec::new(),
        }
    }
}

/// A directory that is deleted on drop unless it was published.
#[derive(Debug)]
pub struct Temporary(Arc<PathBuf>);

impl Temporary {
    pub fn rootfs(&self) -> PathBuf {
        self.0.join(ROOTFS)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Missing if it was published.
        let _ = fs::remove_dir_all(&*self.0);
    }
}

/// An error and its sources on one line.
fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
