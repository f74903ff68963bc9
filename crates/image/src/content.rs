//! The content store: blobs by digest, under `content/blobs/sha256/`.
//!
//! A blob lives as long as somebody holds a [`Lease`] on it: a pull under way, or an image that
//! refers to it. The last lease to go takes the file along, so garbage only comes from a process
//! that was killed, and is swept when the store opens.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use sha2::{Digest as _, Sha256};

use crate::digest::Digest;
use crate::error::Error;
use crate::files::{create_directory, list, sync_directory};

#[derive(Debug, Clone)]
pub struct Content(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    blobs: PathBuf,
    ingest: PathBuf,
    leases: Mutex<HashMap<Digest, usize>>,
    /// Whether a blob goes with its last lease. Not before the store is open as a whole, and not
    /// when the process ends: then leases go, but images stay.
    live: AtomicBool,
    next: AtomicU64,
}

impl Content {
    /// Opens the store and removes what a killed process left half-written. Blobs stay until
    /// [`Content::start`], so that images can take their leases first.
    pub fn open(root: &Path) -> Result<Self, Error> {
        let blobs = root.join("blobs/sha256");
        let ingest = root.join("ingest");
        create_directory(&blobs)?;
        create_directory(&ingest)?;
        for (_, entry) in list(&ingest)? {
            fs::remove_file(entry.path()).map_err(|e| Error::io("remove", &entry.path(), e))?;
        }
        Ok(Self(Arc::new(Inner {
            blobs,
            ingest,
            leases: Mutex::default(),
            live: AtomicBool::new(false),
            next: AtomicU64::new(0),
        })))
    }

    /// From here on blobs go with their last lease; what has none already goes now.
    pub fn start(&self) -> Result<(), Error> {
        self.sweep()?;
        self.0.live.store(true, Ordering::Relaxed);
        Ok(())
    }

    /// From here on leases that are dropped take nothing along.
    pub fn stop(&self) {
        self.0.live.store(false, Ordering::Relaxed);
    }

    /// Removes every blob without a lease; returns their number and bytes.
    pub fn sweep(&self) -> Result<(u64, u64), Error> {
        let (mut blobs, mut bytes) = (0, 0);
        for (name, entry) in list(&self.0.blobs)? {
            // Held for one file at a time: nobody can take a lease between check and removal.
            let leases = self.0.leases.lock().expect("no holder panics");
            if Digest::from_hex(&name).is_some_and(|digest| leases.contains_key(&digest)) {
                continue;
            }
            let size = entry.metadata().map_or(0, |metadata| metadata.len());
            fs::remove_file(entry.path()).map_err(|e| Error::io("remove", &entry.path(), e))?;
            blobs += 1;
            bytes += size;
        }
        Ok((blobs, bytes))
    }

    pub fn path(&self, digest: &Digest) -> PathBuf {
        self.0.blobs.join(digest.hex())
    }

    /// Whether the blob is here; only an answer that lasts while the caller holds a lease.
    pub fn has(&self, digest: &Digest, size: u64) -> bool {
        fs::metadata(self.path(digest)).is_ok_and(|metadata| metadata.len() == size)
    }

    /// Zero for a blob that is not here.
    pub fn size(&self, digest: &Digest) -> u64 {
        fs::metadata(self.path(digest)).map_or(0, |metadata| metadata.len())
    }

    pub fn lease(&self, digest: Digest) -> Lease {
        *self.0.leases.lock().expect("no holder panics").entry(digest).or_default() += 1;
        Lease { content: self.clone(), digest }
    }

    pub fn open_blob(&self, digest: &Digest) -> Result<File, Error> {
        let path = self.path(digest);
        File::open(&path).map_err(|e| Error::io("open", &path, e))
    }

    /// Reads a small blob and checks that it is what it should be.
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

    /// Starts a blob.
    pub fn ingest(&self) -> Result<Ingest, Error> {
        let name = self.0.next.fetch_add(1, Ordering::Relaxed).to_string();
        let path = self.0.ingest.join(name);
        let file = File::create(&path).map_err(|e| Error::io("create", &path, e))?;
        Ok(Ingest {
            content: self.clone(),
            file,
            path,
            hash: Sha256::new(),
            written: 0,
            committed: false,
        })
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

/// Keeps a blob; see the module.
#[derive(Debug)]
pub struct Lease {
    content: Content,
    digest: Digest,
}

impl Drop for Lease {
    fn drop(&mut self) {
        let mut leases = self.content.0.leases.lock().expect("no holder panics");
        let count = leases.get_mut(&self.digest).expect("this lease is counted");
        *count -= 1;
        if *count == 0 {
            leases.remove(&self.digest);
            if self.content.0.live.load(Ordering::Relaxed) {
                // Often not there: the download failed.
                let _ = fs::remove_file(self.content.path(&self.digest));
            }
        }
    }
}

/// A blob being written; removed when dropped before [`Ingest::commit`].
#[derive(Debug)]
pub struct Ingest {
    content: Content,
    file: File,
    path: PathBuf,
    hash: Sha256,
    written: u64,
    committed: bool,
}

impl Ingest {
    pub fn written(&self) -> u64 {
        self.written
    }

    pub fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|e| Error::io("write", &self.path, e))?;
        self.hash.update(bytes);
        self.written += bytes.len() as u64;
        Ok(())
    }

    /// Starts over.
    pub fn reset(&mut self) -> Result<(), Error> {
        use io::Seek;
        self.file
            .set_len(0)
            .and_then(|()| self.file.rewind())
            .map_err(|e| Error::io("truncate", &self.path, e))?;
        self.hash = Sha256::new();
        self.written = 0;
        Ok(())
    }

    /// Gives the blob its name, if it is what `expected` says. Blobs that do not outlive the
    /// process need not be `durable`: syncing gigabytes of layers would double a pull's time.
    pub fn commit(mut self, expected: &Digest, what: &str, durable: bool) -> Result<(), Error> {
        let got = Digest::from_hash(std::mem::take(&mut self.hash).finalize().into());
        if got != *expected {
            return Err(Error::DigestMismatch { what: what.into(), expected: *expected, got });
        }
        let target = self.content.path(expected);
        if durable {
            self.file.sync_all().map_err(|e| Error::io("sync", &self.path, e))?;
        }
        fs::rename(&self.path, &target).map_err(|e| Error::io("rename", &target, e))?;
        self.committed = true;
        if durable { sync_directory(&self.content.0.blobs) } else { Ok(()) }
    }
}

impl Drop for Ingest {
    fn drop(&mut self) {
        if !self.committed {
            let _ = fs::remove_file(&self.path);
        }
    }
}
