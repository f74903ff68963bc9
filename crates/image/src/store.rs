//! What is known of the images on this machine: one record an image, and one file with the names.
//!
//! ```text
//! images/<id>/record.json     written once, before the directory gets its name
//! images/<id>/rootfs.erofs
//! images/refs.json            name -> id, replaced as a whole: a tag moves atomically
//! ```
//!
//! A record also holds the names of its image, so that `refs.json` can be made again from the
//! records when it is damaged. What is damaged is moved aside ([`crate::aside`]).
//!
//! Blocking; callers bring their own thread and lock. A [`View`] is what the store was at one moment:
//! it answers without the disk, so that readers never wait for a writer.

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

/// Directories in the making or on their way out; nobody's after a restart.
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
    room: (u64, u64),
    holds: Arc<Holds>,
    _leases: Vec<Lease>,
}

/// What readers see of an image.
#[derive(Debug, Clone)]
pub struct Seen {
    pub record: Record,
    pub config: Arc<ImageConfiguration>,
    /// Room on the host's disk of the image file and the blobs that belong to the image.
    pub size: u64,
    /// Room of what is in the image's directory, and the number of files with the directory.
    room: (u64, u64),
    pub holds: Arc<Holds>,
}

/// How many hold an image's files, or that they are gone. Shared by the store and all its views, so
/// that a hold needs no lock and no view takes hold of an image that is going.
#[derive(Debug, Default)]
pub struct Holds(AtomicUsize);

impl Holds {
    const GONE: usize = usize::MAX;

    /// False when the files are gone.
    pub fn take(&self) -> bool {
        let one_more = |holds| (holds != Self::GONE).then(|| holds + 1);
        self.0.fetch_update(Ordering::AcqRel, Ordering::Acquire, one_more).is_ok()
    }

    /// Undoes one [`Holds::take`]; true for the last. See [`Store::reap`].
    pub fn release(&self) -> bool {
        self.0.fetch_sub(1, Ordering::AcqRel) == 1
    }

    /// Nobody can take hold any more; false when somebody has.
    fn close(&self) -> bool {
        self.0.compare_exchange(0, Self::GONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// Undoes [`Holds::close`].
    fn reopen(&self) {
        self.0.store(0, Ordering::Release);
    }

    fn are_gone(&self) -> bool {
        self.0.load(Ordering::Acquire) == Self::GONE
    }

    fn is_held(&self) -> bool {
        !matches!(self.0.load(Ordering::Acquire), 0 | Self::GONE)
    }
}

/// The store at one moment.
#[derive(Debug)]
pub struct View {
    root: PathBuf,
    images: BTreeMap<Digest, Seen>,
    refs: BTreeMap<String, Digest>,
    temporaries: Vec<Weak<PathBuf>>,
}

impl View {
    /// An image that is not being removed.
    pub fn get(&self, id: &Digest) -> Option<&Seen> {
        self.images.get(id).filter(|seen| seen.is_listed())
    }

    /// Also one whose removal waits for its holders.
    pub fn holds(&self, id: &Digest) -> Option<Arc<Holds>> {
        self.images.get(id).map(|seen| seen.holds.clone())
    }

    pub fn images(&self) -> impl Iterator<Item = &Seen> {
        self.images.values().filter(|seen| seen.is_listed())
    }

    /// Names of an image.
    pub fn names(&self, id: &Digest) -> impl Iterator<Item = &str> {
        self.refs.iter().filter(move |(_, target)| *target == id).map(|(name, _)| name.as_str())
    }

    pub fn resolve(&self, name: &str) -> Option<Digest> {
        self.refs.get(name).copied()
    }

    /// The one image whose id begins with these digits.
    pub fn by_prefix(&self, prefix: &str) -> Option<Digest> {
        let hex = |c: char| c.is_ascii_digit() || ('a'..='f').contains(&c);
        if prefix.is_empty() || !prefix.chars().all(hex) {
            return None;
        }
        let mut matching = self.images().filter(|seen| seen.record.id.hex().starts_with(prefix));
        let first = matching.next()?;
        matching.next().is_none().then_some(first.record.id)
    }

    pub fn rootfs(&self, id: &Digest) -> PathBuf {
        self.root.join(id.hex()).join(ROOTFS)
    }

    /// Bytes on the disk and number of files, known without a look but for the images in the
    /// making.
    pub fn usage(&self) -> (u64, u64) {
        let making = self.temporaries.iter().filter_map(Weak::upgrade).map(|path| {
            // Gone already: published, or given up.
            fs::metadata(path.join(ROOTFS)).map_or((0, 0), |m| (m.blocks() * 512, 2))
        });
        let made = self.images.values().map(|seen| seen.room);
        made.chain(making).fold((0, 0), |sum, one| (sum.0 + one.0, sum.1 + one.1))
    }
}

impl Seen {
    fn is_listed(&self) -> bool {
        !self.record.removed && !self.holds.are_gone()
    }
}

#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    content: Content,
    images: BTreeMap<Digest, Entry>,
    refs: Refs,
    next_temporary: u64,
    /// Images in the making.
    temporaries: Vec<Weak<PathBuf>>,
    /// Directories that nothing refers to any more; see [`Store::take_doomed`].
    doomed: Vec<PathBuf>,
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
            doomed: Vec::new(),
        };
        for (name, entry) in list(root)? {
            let path = entry.path();
            if name.starts_with(TEMPORARY) {
                remove_any(&path)?;
            } else if let Some(id) = Digest::from_hex(&name) {
                match read_record(&path.join(RECORD), id).and_then(|record| store.load(record)) {
                    Ok(entry) => drop(store.images.insert(id, entry)),
                    Err(e) if e.is_damage() => store.set_aside(&path, &e),
                    Err(e) => return Err(e),
                }
            }
        }
        store.load_refs()?;
        Ok(store)
    }

    /// One bad image must not keep the node from starting; it can be pulled again. Its file system
    /// goes at once: without a record nobody can tell whether it is whole, and it is large. What a
    /// newer release has written is kept as it is.
    fn set_aside(&self, path: &Path, error: &Error) {
        if !matches!(error, Error::RecordVersion { .. }) {
            // Not there, or a directory: then it is moved with the rest.
            let _ = fs::remove_file(path.join(ROOTFS));
        }
        self.content.aside().take(path, &with_causes(error));
    }

    fn load_refs(&mut self) -> Result<(), Error> {
        let path = self.root.join(REFS);
        let known = match read_refs(&path) {
            Ok(refs) => refs,
            Err(e) if e.is_damage() => {
                self.content.aside().take(&path, &with_causes(&e));
                None
            }
            Err(e) => return Err(e),
        };
        let rebuilt = known.is_none() && !self.images.is_empty();
        self.refs = known.unwrap_or_else(|| self.refs_of_records());
        self.refs.retain(|_, id| self.images.get(id).is_some_and(|e| !e.record.removed));
        if rebuilt {
            tracing::warn!(names = self.refs.len(), "names of images are those of their records");
            // On a full disk: they are rebuilt again by the next start.
            if let Err(error) = self.write_refs(self.refs.clone()) {
                tracing::warn!(%error, "names of images are not written");
            }
        }
        for id in self.images.keys().copied().collect::<Vec<_>>() {
            self.write_names(&id);
        }
        Ok(())
    }

    /// Of two records with one name the one written last counts: the name moved to it.
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

    /// Brings the names in an image's record in step with `refs`. They are a second copy, so a
    /// failure is only told.
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
                tracing::warn!(image = %id, %error, "names are not in the image's record");
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
                self.content.set_aside(&record.id, &with_causes(e));
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
        let room = usage(&self.root.join(record.id.hex()));
        let mut blobs = BTreeSet::from([record.id]);
        blobs.extend(record.manifest);
        if record.layers_kept {
            blobs.extend(record.layers.iter().map(|layer| layer.digest));
        }
        let blobs: u64 = blobs.iter().map(|digest| self.content.room(digest)).sum();
        Ok(Entry {
            size: metadata.blocks() * 512 + blobs,
            room,
            record,
            config: Arc::new(config),
            holds: Arc::default(),
            _leases: leases,
        })
    }

    /// What an image can do without is moved aside where it is damaged, and the image stays. Layers
    /// are looked at by their length only: reading them all would take minutes.
    fn check_blobs(&self, record: &Record) {
        let manifest = record.manifest.filter(|digest| self.content.path(digest).exists());
        if let Some(digest) = manifest
            && let Err(e) = self.content.read(&digest)
            && e.is_damage()
        {
            self.content.set_aside(&digest, &with_causes(&e));
        }
        for Layer { digest, size } in record.layers.iter().filter(|_| record.layers_kept) {
            let got = self.content.size(digest);
            if got != *size && self.content.path(digest).exists() {
                let reason = format!("{got} bytes, not {size}");
                self.content.set_aside(digest, &reason);
            }
        }
    }

    pub fn view(&self) -> View {
        let seen = |entry: &Entry| {
            let Entry { record, config, size, room, holds, _leases } = entry;
            let (record, config, holds) = (record.clone(), config.clone(), holds.clone());
            Seen { record, config, size: *size, room: *room, holds }
        };
        View {
            root: self.root.clone(),
            images: self.images.iter().map(|(id, entry)| (*id, seen(entry))).collect(),
            refs: self.refs.clone(),
            temporaries: self.temporaries.clone(),
        }
    }

    fn rootfs(&self, id: &Digest) -> PathBuf {
        self.root.join(id.hex()).join(ROOTFS)
    }

    /// A directory in which an image can be built; see [`Store::publish`].
    pub fn temporary(&mut self) -> Result<Temporary, Error> {
        self.next_temporary += 1;
        let path = self.root.join(format!("{TEMPORARY}{}", self.next_temporary));
        create_directory(&path)?;
        let path = Arc::new(path);
        self.temporaries.retain(|temporary| temporary.strong_count() > 0);
        self.temporaries.push(Arc::downgrade(&path));
        Ok(Temporary(path))
    }

    /// Puts a finished image in its place. The configuration's blob must be in the content store.
    pub fn publish(&mut self, build: Temporary, record: Record) -> Result<(), Error> {
        let id = record.id;
        let target = self.root.join(id.hex());
        if self.images.contains_key(&id) {
            // The same bytes; only a pending removal has to be taken back.
            return self.revive(&id).map(drop);
        }
        write_record(&build.0.join(RECORD), &record)?;
        if fs::symlink_metadata(&target).is_ok() {
            // Damaged, and could not be moved aside when the store was opened.
            self.content.aside().take(&target, "not in use");
        }
        fs::rename(&*build.0, &target).map_err(|e| Error::io("rename", &target, e))?;
        sync_directory(&self.root)?;
        let entry = self.load(record)?;
        self.images.insert(id, entry);
        Ok(())
    }

    /// Whether the image is here; takes back a removal that waits for the last holder.
    pub fn revive(&mut self, id: &Digest) -> Result<bool, Error> {
        let path = self.root.join(id.hex()).join(RECORD);
        let Some(entry) = self.images.get_mut(id) else { return Ok(false) };
        if entry.record.removed {
            let record = Record { removed: false, ..entry.record.clone() };
            write_record(&path, &record)?;
            entry.record = record;
        }
        Ok(true)
    }

    /// Points names at an image, wherever they pointed before. False when the image is not here
    /// (any more).
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
            // New, and nobody would find it: better not there than half there.
            let _ = self.remove(id);
        }
        written.map(|()| true)
    }

    /// Takes one name away.
    pub fn untag(&mut self, name: &str) -> Result<(), Error> {
        let mut refs = self.refs.clone();
        if refs.remove(name).is_none() {
            return Ok(());
        }
        self.write_refs(refs)
    }

    /// Removes an image with all its names; its files stay while it is held.
    pub fn remove(&mut self, id: &Digest) -> Result<(), Error> {
        let Some(entry) = self.images.get_mut(id) else { return Ok(()) };
        if entry.holds.close() {
            // The files first: on a full disk nothing can be written before. Names without an
            // image are dropped when the store opens.
            self.give_up(id)?;
        } else if !entry.record.removed {
            let record = Record { removed: true, ..entry.record.clone() };
            write_record(&self.root.join(id.hex()).join(RECORD), &record)?;
            entry.record = record;
        }
        let mut refs = self.refs.clone();
        refs.retain(|_, target| target != id);
        self.write_refs(refs)
    }

    /// Gives up the files of removed images that nobody holds; returns their number and bytes.
    pub fn reap_all(&mut self) -> Result<(u64, u64), Error> {
        let removed = self.images.values().filter(|e| e.record.removed && !e.holds.is_held());
        let removed: BTreeSet<_> = removed.map(|e| (e.record.id, e.room.0)).collect();
        for (id, _) in &removed {
            self.reap(id)?;
        }
        Ok((removed.len() as u64, removed.iter().map(|(_, bytes)| bytes).sum()))
    }

    /// Gives up the files of an image that is removed and that nobody holds. To be called after the
    /// last hold was released.
    pub fn reap(&mut self, id: &Digest) -> Result<(), Error> {
        match self.images.get(id) {
            Some(entry) if entry.record.removed && entry.holds.close() => self.give_up(id),
            _ => Ok(()),
        }
    }

    /// After [`Holds::close`].
    fn give_up(&mut self, id: &Digest) -> Result<(), Error> {
        let discarded = self.discard(&self.root.join(id.hex()));
        if discarded.is_err() {
            if let Some(entry) = self.images.get(id) {
                entry.holds.reopen();
            }
            return discarded;
        }
        // Its leases go with it, and their blobs.
        self.images.remove(id);
        Ok(())
    }

    /// Renamed only: a directory without its record would not be understood after a crash, and
    /// deleting a large file takes longer than anybody should wait for the store.
    fn discard(&mut self, path: &Path) -> Result<(), Error> {
        self.next_temporary += 1;
        let doomed = self.root.join(format!("{TEMPORARY}{}", self.next_temporary));
        fs::rename(path, &doomed).map_err(|e| Error::io("rename", path, e))?;
        self.doomed.push(doomed);
        Ok(())
    }

    /// What to delete once the store is not locked any more.
    pub fn take_doomed(&mut self) -> Vec<PathBuf> {
        std::mem::take(&mut self.doomed)
    }

    fn write_refs(&mut self, refs: Refs) -> Result<(), Error> {
        write_refs(&self.root.join(REFS), &refs)?;
        let before = std::mem::replace(&mut self.refs, refs);
        let changed = |from: &BTreeMap<String, Digest>, to: &BTreeMap<String, Digest>| {
            let moved = from.iter().filter(|(name, id)| to.get(*name) != Some(*id));
            moved.map(|(_, id)| *id).collect::<BTreeSet<_>>()
        };
        // Those that gain names first: a name that is cut short on its way is in two records then,
        // and in none otherwise.
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

/// A directory that vanishes with its owner unless it was published.
#[derive(Debug)]
pub struct Temporary(Arc<PathBuf>);

impl Temporary {
    pub fn rootfs(&self) -> PathBuf {
        self.0.join(ROOTFS)
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already when it was published.
        let _ = fs::remove_dir_all(&*self.0);
    }
}

/// An error and what it came from, on one line.
fn with_causes(error: &Error) -> String {
    let mut text = error.to_string();
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}
