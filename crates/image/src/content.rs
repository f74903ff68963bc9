//! The content store: blobs by digest, under `content/blobs/sha256/`.
//!
//! A blob is kept while a [`Lease`] on it exists: a pull in progress, or an image that refers to
//! it.
//! Dropping the last lease deletes the file, so garbage is only left by a process that was killed;
//! it is swept when the store opens.
//!
//! A partial blob stays in `content/ingest/` under its digest so that a later pull can resume it:
//! for at most a day and within a byte limit, the oldest deleted first. Its bytes are used only
//! after the complete blob has the expected digest.

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, SystemTime};

use sha2::{Digest as _, Sha256};

use crate::damaged::DamagedFiles;
use crate::digest::Digest;
use crate::error::Error;
use crate::files::{create_directory, list, sync_directory};
use crate::space::{SPACE_CHECK_INTERVAL, Space};

/// Smaller partial blobs are deleted, not kept for resuming.
const MIN_PARTIAL: u64 = 64 << 10;
const PARTIAL_MAX_AGE: Duration = Duration::from_secs(24 * 3600);

#[derive(Debug, Clone)]
pub struct Content(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    blobs: PathBuf,
    ingest: PathBuf,
    max_partial: u64,
    damaged: DamagedFiles,
    state: Mutex<State>,
    /// Whether the last lease deletes its blob. False until the whole store is open, and again at
    /// process exit: leases are dropped then, but images stay.
    live: AtomicBool,
    next: AtomicU64,
}

#[derive(Debug, Default)]
struct State {
    leases: HashMap<Digest, usize>,
    /// Bytes on disk of each complete blob.
    blobs: HashMap<Digest, u64>,
    /// Files in `ingest/` by name.
    ingests: HashMap<String, Partial>,
}

#[derive(Debug)]
struct Partial {
    bytes: u64,
    touched: SystemTime,
    /// An [`Ingest`] is writing it.
    open: bool,
}

impl Content {
    /// Opens the store and deletes incomplete files of a killed process except partial blobs. Blobs
    /// stay until [`Content::start`], so that images can take their leases first.
    pub fn open(root: &Path, max_partial: u64, damaged: DamagedFiles) -> Result<Self, Error> {
        let blobs = root.join("blobs/sha256");
        let ingest = root.join("ingest");
        create_directory(&blobs)?;
        create_directory(&ingest)?;
        let mut state = State::default();
        for (name, entry) in list(&ingest)? {
            let metadata = entry.metadata().map_err(|e| Error::io("read", &entry.path(), e))?;
            if Digest::from_hex(&name).is_some() && metadata.is_file() {
                let touched = metadata.modified().unwrap_or(SystemTime::UNIX_EPOCH);
                let partial = Partial { bytes: metadata.len(), touched, open: false };
                state.ingests.insert(name, partial);
            } else if metadata.is_dir() {
                damaged.move_away(&entry.path(), "is a directory, expected a file");
            } else {
                fs::remove_file(entry.path()).map_err(|e| Error::io("remove", &entry.path(), e))?;
            }
        }
        for (name, entry) in list(&blobs)? {
            if !entry.metadata().is_ok_and(|metadata| metadata.is_file()) {
                damaged.move_away(&entry.path(), "is not a regular file, expected a blob");
            } else if let Some(digest) = Digest::from_hex(&name) {
                state.blobs.insert(digest, entry.metadata().map_or(0, |m| m.blocks() * 512));
            }
        }
        let content = Self(Arc::new(Inner {
            blobs,
            ingest,
            max_partial,
            damaged,
            state: Mutex::new(state),
            live: AtomicBool::new(false),
            next: AtomicU64::new(0),
        }));
        content.trim(max_partial);
        Ok(content)
    }

    /// Enables deletion with the last lease; deletes blobs that have no lease now.
    pub fn start(&self) -> Result<(), Error> {
        self.sweep()?;
        self.0.live.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// Disables deletion with the last lease.
    pub fn stop(&self) {
        self.0.live.store(false, Ordering::Relaxed);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().expect("no holder panics")
    }

    /// Deletes all blobs without a lease and expired partial blobs; returns the number and bytes of
    /// the deleted blobs.
    pub fn sweep(&self) -> Result<(u64, u64), Error> {
        let (mut blobs, mut bytes) = (0, 0);
        for (name, entry) in list(&self.0.blobs)? {
            // Locked per file: no lease can be taken between check and removal.
            let mut state = self.state();
            let digest = Digest::from_hex(&name);
            if digest.is_some_and(|digest| state.leases.contains_key(&digest)) {
                continue;
            }
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                // Not a blob name. The next open moves it to `damaged/`.
                continue;
            }
            let size = entry.metadata().map_or(0, |metadata| metadata.len());
            fs::remove_file(entry.path()).map_err(|e| Error::io("remove", &entry.path(), e))?;
            if let Some(digest) = digest {
                state.blobs.remove(&digest);
            }
            blobs += 1;
            bytes += size;
        }
        self.trim(self.0.max_partial);
        Ok((blobs, bytes))
    }

    /// Deletes expired partial blobs, then the oldest ones until at most `limit` bytes are kept.
    fn trim(&self, limit: u64) {
        let mut state = self.state();
        let mut idle: Vec<_> = state
            .ingests
            .iter()
            .filter(|(_, partial)| !partial.open)
            .map(|(name, partial)| (partial.touched, name.clone(), partial.bytes))
            .collect();
        idle.sort();
        let mut total: u64 = idle.iter().map(|(_, _, bytes)| bytes).sum();
        for (touched, name, bytes) in idle {
            // A modification time in the future (the clock was set back) counts as expired.
            let age = touched.elapsed().unwrap_or(PARTIAL_MAX_AGE);
            if age < PARTIAL_MAX_AGE && total <= limit {
                continue;
            }
            total -= bytes;
            state.ingests.remove(&name);
            let _ = fs::remove_file(self.0.ingest.join(name));
        }
    }

    /// Bytes on disk and number of files, from counters in memory.
    pub fn usage(&self) -> (u64, u64) {
        let state = self.state();
        let bytes: u64 = state.blobs.values().sum();
        let ingests: u64 = state.ingests.values().map(|partial| partial.bytes).sum();
        (bytes + ingests, (state.blobs.len() + state.ingests.len()) as u64)
    }

    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.0.blobs.join(digest.hex())
    }

    /// Whether the blob exists with this size. The result stays valid only while the caller holds a
    /// lease.
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        fs::metadata(self.path(digest)).is_ok_and(|metadata| metadata.len() == size)
    }

    /// Bytes on disk of a blob; 0 if it does not exist.
    pub fn disk_size(&self, digest: &Digest) -> u64 {
        self.state().blobs.get(digest).copied().unwrap_or_default()
    }

    /// Length of a blob in bytes; 0 if it does not exist.
    pub fn size(&self, digest: &Digest) -> u64 {
        fs::metadata(self.path(digest)).map_or(0, |metadata| metadata.len())
    }

    /// Fails if the missing bytes of these blobs do not fit on the disk. Partial blobs without a
    /// writer are deleted first if that frees enough space.
    pub fn check_space(&self, blobs: &BTreeMap<Digest, u64>) -> Result<(), Error> {
        let fits = || {
            let needed: u64 = blobs.iter().map(|(digest, size)| self.missing(digest, *size)).sum();
            Space::of(File::open(&self.0.ingest)?)?.check(needed)
        };
        let checked = match fits() {
            Err(e) if e.kind() == io::ErrorKind::StorageFull => {
                self.trim(0);
                fits()
            }
            checked => checked,
        };
        checked.map_err(|e| Error::io("write", &self.0.ingest, e))
    }

    /// Bytes of a blob that are still to be fetched.
    fn missing(&self, digest: &Digest, size: u64) -> u64 {
        if self.has(digest, size) {
            return 0;
        }
        let state = self.state();
        size.saturating_sub(state.ingests.get(&digest.hex()).map_or(0, |partial| partial.bytes))
    }

    pub fn damaged(&self) -> &DamagedFiles {
        &self.0.damaged
    }

    /// Moves a blob to `damaged/`; no error if it does not exist.
    pub fn move_to_damaged(&self, digest: &Digest, reason: &str) {
        let path = self.path(digest);
        let mut state = self.state();
        state.blobs.remove(digest);
        if fs::symlink_metadata(&path).is_ok() {
            self.0.damaged.move_away(&path, reason);
        }
    }

    /// Verifies a blob's digest and moves it to `damaged/` on a mismatch, so that it is fetched
    /// again.
    pub fn verify_digest(&self, digest: &Digest) {
        let hashed = self.open_blob(digest).and_then(|mut file| {
            let mut hash = Sha256::new();
            io::copy(&mut file, &mut hash).map_err(|e| Error::io("read", &self.path(digest), e))?;
            Ok(Digest::from_hash(hash.finalize().into()))
        });
        match hashed {
            Ok(got) if got == *digest => {}
            Ok(_) => self.move_to_damaged(digest, "its content has a different digest"),
            Err(e) if e.is_damage() => self.move_to_damaged(digest, &e.to_string()),
            Err(_) => {}
        }
    }

    pub fn lease(&self, digest: Digest) -> Lease {
        *self.state().leases.entry(digest).or_default() += 1;
        Lease { content: self.clone(), digest }
    }

    pub fn open_blob(&self, digest: &Digest) -> Result<File, Error> {
        let path = self.path(digest);
        File::open(&path).map_err(|e| Error::io("open", &path, e))
    }

    /// Reads a small blob and verifies its digest.
    pub fn read(&self, digest: &Digest) -> Result<Vec<u8>, Error> {
        let path = self.path(digest);
        let bytes = fs::read(&path).map_err(|e| Error::io("read", &path, e))?;
        let got = Digest::of(&bytes);
        if got != *digest {
            return Err(Error::DigestMismatch {
                what: path.display().to_string(),
                expected: *digest,
                got,
            });
        }
        Ok(bytes)
    }

    /// Starts writing a blob; the file is deleted unless [`Ingest::commit`] succeeds.
    pub fn ingest(&self) -> Result<Ingest, Error> {
        let name = self.0.next.fetch_add(1, Ordering::Relaxed).to_string();
        let path = self.0.ingest.join(&name);
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(self.new_ingest(name, path, file))
    }

    /// Starts or resumes writing a blob; an incomplete file is kept for the next resume.
    pub fn resume(&self, digest: &Digest) -> Result<Ingest, Error> {
        let name = digest.hex();
        let path = self.0.ingest.join(&name);
        {
            let mut state = self.state();
            let partial = Partial { bytes: 0, touched: SystemTime::now(), open: true };
            match state.ingests.get_mut(&name) {
                // The previous writer was cancelled and has not closed it yet.
                Some(known) if known.open => {
                    drop(state);
                    return self.ingest();
                }
                Some(known) => known.open = true,
                None => drop(state.ingests.insert(name.clone(), partial)),
            }
        }
        let opened =
            File::options().read(true).write(true).create(true).truncate(false).open(&path);
        let file = match opened {
            Ok(file) => file,
            Err(e) => {
                self.state().ingests.remove(&name);
                return Err(Error::io("create", &path, e));
            }
        };
        let mut ingest = self.new_ingest(name, path, file);
        ingest.keep = true;
        ingest.rehash()?;
        Ok(ingest)
    }

    fn new_ingest(&self, name: String, path: PathBuf, file: File) -> Ingest {
        let partial = Partial { bytes: 0, touched: SystemTime::now(), open: true };
        self.state().ingests.insert(name.clone(), partial);
        Ingest {
            content: self.clone(),
            name,
            file,
            path,
            hash: Sha256::new(),
            written: 0,
            unchecked: 0,
            keep: false,
            committed: false,
        }
    }

    /// Stores a small blob durably.
    pub fn put(&self, bytes: &[u8]) -> Result<Lease, Error> {
        let digest = Digest::of(bytes);
        let lease = self.lease(digest);
        if !self.has(&digest, bytes.len() as u64) {
            let mut ingest = self.ingest()?;
            ingest.write(bytes)?;
            ingest.commit(&digest, "blob", true)?;
        }
        Ok(lease)
    }
}

/// Keeps a blob on disk; see the module header.
#[derive(Debug)]
pub struct Lease {
    content: Content,
    digest: Digest,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut state = self.content.state();
        let count = state.leases.get_mut(&self.digest).expect("this lease is counted");
        *count -= 1;
        if *count == 0 {
            state.leases.remove(&self.digest);
            if self.content.0.live.load(Ordering::Relaxed) {
                state.blobs.remove(&self.digest);
                // Missing if the download failed.
                let _ = fs::remove_file(self.content.path(&self.digest));
            }
        }
    }
}

/// A blob being written; see [`Content::ingest`] and [`Content::resume`].
#[derive(Debug)]
pub struct Ingest {
    content: Content,
    name: String,
    file: File,
    path: PathBuf,
    hash: Sha256,
    written: u64,
    /// Bytes written since the last check of the free space.
    unchecked: u64,
    /// Whether an incomplete file is kept.
    keep: bool,
    committed: bool,
}

impl Ingest {
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        if let Err(e) = self.check_space(bytes.len()).and_then(|()| self.file.write_all(bytes)) {
            // On a full disk, incomplete blobs are deleted to free space.
            self.keep = false;
            self.content.trim(0);
            return Err(Error::io("write", &self.path, e));
        }
        self.hash.update(bytes);
        self.written += bytes.len() as u64;
        self.note();
        Ok(())
    }

    fn check_space(&mut self, length: usize) -> io::Result<()> {
        self.unchecked += length as u64;
        if self.unchecked < SPACE_CHECK_INTERVAL {
            return Ok(());
        }
        self.unchecked = 0;
        Space::of(&self.file)?.check(0)
    }

    /// Discards what was written and starts from the beginning.
    pub fn reset(&mut self) -> Result<(), Error> {
        use io::Seek;
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|e| Error::io("truncate", &self.path, e))?;
        self.hash = Sha256::new();
        self.written = 0;
        self.note();
        Ok(())
    }

    /// Hashes the bytes that the file already holds.
    fn rehash(&mut self) -> Result<(), Error> {
        let mut buffer = vec![0; 256 << 10];
        loop {
            let read = self.file.read(&mut buffer).map_err(|e| Error::io("read", &self.path, e))?;
            if read == 0 {
                self.note();
                return Ok(());
            }
            self.hash.update(&buffer[..read]);
            self.written += read as u64;
        }
    }

    fn note(&self) {
        if let Some(partial) = self.content.state().ingests.get_mut(&self.name) {
            partial.bytes = self.written;
            partial.touched = SystemTime::now();
        }
    }

    /// Fails if digest or size of the written bytes differ from the expected ones.
    pub fn check(&self, expected: &Digest, what: &str) -> Result<(), Error> {
        let got = Digest::from_hash(self.hash.clone().finalize().into());
        if got == *expected {
            return Ok(());
        }
        Err(Error::DigestMismatch { what: what.into(), expected: *expected, got })
    }

    /// Verifies the digest and renames the file to its blob name. `durable` syncs it; not needed
    /// for blobs that do not outlive the process: syncing gigabytes of layers would double a pull's
    /// time.
    pub fn commit(mut self, expected: &Digest, what: &str, durable: bool) -> Result<(), Error> {
        self.keep = false;
        self.check(expected, what)?;
        let target = self.content.path(expected);
        if durable {
            self.file.sync_all().map_err(|e| Error::io("sync", &self.path, e))?;
        }
        let size = self.file.metadata().map_or(self.written, |metadata| metadata.blocks() * 512);
        {
            let mut state = self.content.state();
            fs::rename(&self.path, &target).map_err(|e| Error::io("rename", &target, e))?;
            state.blobs.insert(*expected, size);
            state.ingests.remove(&self.name);
        }
        self.committed = true;
        if durable { sync_directory(&self.content.0.blobs) } else { Ok(()) }
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        let mut state = self.content.state();
        match state.ingests.get_mut(&self.name) {
            Some(partial) if self.keep && self.written >= MIN_PARTIAL => partial.open = false,
            _ => {
                let _ = fs::remove_file(&self.path);
                state.ingests.remove(&self.name);
                return;
            }
        }
        drop(state);
        self.content.trim(self.content.0.max_partial);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::ErrorKind;

    fn content(dir: &Path, max_partial: u64) -> Content {
        let damaged = DamagedFiles::open(dir).unwrap();
        let content = Content::open(dir, max_partial, damaged).unwrap();
        content.start().unwrap();
        content
    }

    fn digest(name: u8) -> Digest {
        Digest::of(&[name])
    }

    fn write_partial(content: &Content, name: u8, bytes: usize) {
        let mut ingest = content.resume(&digest(name)).unwrap();
        ingest.write(&vec![name; bytes]).unwrap();
    }

    #[test]
    fn a_partial_blob_is_resumed_also_by_the_next_process() {
        let dir = tempfile::tempdir().unwrap();
        let whole = vec![7; 200_000];
        let expected = Digest::of(&whole);
        let first = content(dir.path(), 1 << 20);
        first.resume(&expected).unwrap().write(&whole[..100_000]).unwrap();
        assert_eq!(first.usage(), (100_000, 1));
        drop(first);
        let next = content(dir.path(), 1 << 20);
        let _lease = next.lease(expected);
        let mut ingest = next.resume(&expected).unwrap();
        assert_eq!(ingest.written(), 100_000);
        // A second writer of the same blob starts a separate file.
        assert_eq!(next.resume(&expected).unwrap().written(), 0);
        ingest.write(&whole[100_000..]).unwrap();
        ingest.commit(&expected, "blob", false).unwrap();
        assert!(next.has(&expected, 200_000));
        assert_eq!(next.usage().1, 1);
    }

    #[test]
    fn the_oldest_partial_blobs_are_deleted_first_and_small_ones_are_not_kept() {
        let dir = tempfile::tempdir().unwrap();
        let content = content(dir.path(), 250_000);
        write_partial(&content, 1, 100_000);
        write_partial(&content, 2, 100_000);
        write_partial(&content, 3, 1_000);
        assert_eq!(content.usage(), (200_000, 2));
        write_partial(&content, 4, 100_000);
        assert_eq!(content.usage(), (200_000, 2));
        assert_eq!(content.resume(&digest(1)).unwrap().written(), 0, "the oldest was deleted");
        assert_eq!(content.resume(&digest(4)).unwrap().written(), 100_000);
        let names = fs::read_dir(dir.path().join("ingest")).unwrap().count();
        assert_eq!(names, 2);
    }

    #[test]
    fn a_partial_blob_older_than_a_day_is_swept() {
        let dir = tempfile::tempdir().unwrap();
        let content = content(dir.path(), 1 << 20);
        write_partial(&content, 1, 100_000);
        content.state().ingests.get_mut(&digest(1).hex()).unwrap().touched =
            SystemTime::now() - PARTIAL_MAX_AGE;
        content.sweep().unwrap();
        assert_eq!(content.usage(), (0, 0));
        assert_eq!(fs::read_dir(dir.path().join("ingest")).unwrap().count(), 0);
    }

    #[test]
    fn blobs_that_do_not_fit_on_the_disk_are_refused_before_the_download() {
        let dir = tempfile::tempdir().unwrap();
        let content = content(dir.path(), 1 << 20);
        let here = content.put(&[1; 100]).unwrap();
        write_partial(&content, 2, 100_000);
        assert_eq!(content.missing(&here.digest, 100), 0);
        assert_eq!(content.missing(&digest(2), 150_000), 50_000);
        assert_eq!(content.missing(&digest(3), 150_000), 150_000);
        content.check_space(&BTreeMap::from([(here.digest, 100)])).unwrap();
        assert_eq!(content.usage().1, 2);
        let huge = 1 << 60;
        let error = content.check_space(&BTreeMap::from([(digest(3), huge)])).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ResourceExhausted);
        let message = std::error::Error::source(&error).unwrap().to_string();
        assert!(message.starts_with(&format!("{huge} bytes are needed")), "{message}");
        assert_eq!(content.usage().1, 1, "the partial blob was deleted");
    }

    #[test]
    fn the_free_space_is_checked_periodically_while_a_blob_is_written() {
        let dir = tempfile::tempdir().unwrap();
        let content = content(dir.path(), 1 << 20);
        let mut ingest = content.ingest().unwrap();
        ingest.write(&[0; 100]).unwrap();
        assert_eq!(ingest.unchecked, 100);
        ingest.unchecked = SPACE_CHECK_INTERVAL - 1;
        ingest.write(&[0; 100]).unwrap();
        assert_eq!(ingest.unchecked, 0);
    }

    #[test]
    fn directories_in_place_of_files_are_moved_to_damaged() {
        let dir = tempfile::tempdir().unwrap();
        let first = content(dir.path(), 1 << 20);
        let path = first.path(&digest(1));
        drop(first);
        for place in [&path, &dir.path().join("ingest").join(digest(2).hex())] {
            fs::create_dir_all(place.join("deep")).unwrap();
        }
        let next = content(dir.path(), 1 << 20);
        assert_eq!(next.damaged().list().len(), 2);
        assert!(!path.exists());
        // A directory that appears after the open causes no error.
        fs::create_dir(&path).unwrap();
        next.sweep().unwrap();
    }

    #[test]
    fn a_blob_with_wrong_content_is_detected_and_a_good_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let content = content(dir.path(), 1 << 20);
        let good = content.put(b"good").unwrap();
        content.verify_digest(&good.digest);
        assert!(content.has(&good.digest, 4));
        fs::write(content.path(&good.digest), "evil").unwrap();
        content.verify_digest(&good.digest);
        assert!(!content.has(&good.digest, 4) && content.damaged().list().len() == 1);
    }

    #[test]
    fn a_blob_with_a_wrong_digest_leaves_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let content = content(dir.path(), 1 << 20);
        let mut ingest = content.resume(&digest(1)).unwrap();
        ingest.write(&vec![0; 100_000]).unwrap();
        assert!(ingest.commit(&digest(1), "blob", false).is_err());
        assert_eq!(content.usage(), (0, 0));
        assert_eq!(content.resume(&digest(1)).unwrap().written(), 0);
    }
}
