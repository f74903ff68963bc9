//! The journal: one record per pod, `pods/<id>/record.json`, replaced atomically (write a new file,
//! sync, rename, sync the directory), so that a crash leaves the old or the new one. Beside it is a
//! small [`header`], for the case that the record is unreadable.

mod header;
mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::failpoint::{Failpoints, When};
use crate::host::{ignore_not_found, sync_dir};
use crate::model::PodId;
use crate::observe::{Measured, Observer, Outcome};
use crate::policy::Pod;

pub(crate) use header::Header;
pub(crate) use record::PartialRecord;

const RECORD: &str = "record.json";
const HEADER: &str = "header.json";
/// Names of files before their rename.
const NEW: [&str; 2] = ["record.new", "header.new"];
/// Largest record, bytes: far above any that is written.
const MAX_RECORD: u64 = 64 << 20;

/// The records of a node.
#[derive(Clone)]
pub(crate) struct Journal {
    pods: PathBuf,
    observer: Arc<dyn Observer>,
    failpoints: Failpoints,
}

/// Content of a pod's directory.
pub(crate) enum Found {
    Pod {
        pod: Box<Pod>,
        boot_id: String,
    },
    /// The directory exists without a record: nothing else was done for the pod.
    Empty {
        id: PodId,
    },
    Unreadable(Box<Unreadable>),
}

/// A pod with an unreadable record, and the fields that are known.
pub(crate) struct Unreadable {
    pub(crate) id: PodId,
    pub(crate) why: String,
    pub(crate) header: Option<Header>,
    pub(crate) partial: PartialRecord,
    /// Creation time of the directory.
    pub(crate) made: Option<SystemTime>,
}

impl Journal {
    pub(crate) fn open(
        pods: PathBuf,
        observer: Arc<dyn Observer>,
        failpoints: Failpoints,
    ) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&pods)?;
        Ok(Self { pods, observer, failpoints })
    }

    pub(crate) fn directory(&self, pod: &str) -> PathBuf {
        self.pods.join(pod)
    }

    /// Writes a pod's header and record. Blocks.
    ///
    /// An unreadable record is kept: another release may be able to read it. Changes of such a pod
    /// are found again after a restart, as undo is idempotent.
    pub(crate) fn write(&self, pod: &Pod, boot_id: &str) -> io::Result<()> {
        if pod.unreadable {
            return Ok(());
        }
        let began = Instant::now();
        let written = self.write_both(pod, boot_id);
        let outcome = if written.is_ok() { Outcome::Ok } else { Outcome::Failed };
        self.observer.measured(Measured::JournalWrite { outcome, took: began.elapsed() });
        written
    }

    fn write_both(&self, pod: &Pod, boot_id: &str) -> io::Result<()> {
        self.failpoints.check_blocking(When::Before, "journal: directory")?;
        let directory = self.directory(&pod.id);
        match fs::DirBuilder::new().mode(0o700).create(&directory) {
            Ok(()) => self.sync(|| sync_dir(&self.pods))?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        self.replace_header(pod)?;
        let bytes = record::encode(pod, boot_id)?;
        self.failpoints.check_blocking(When::Before, "journal: record")?;
        self.replace(&directory, "record.new", RECORD, &bytes)?;
        // One sync for both files, as the start of a pod waits for it.
        self.sync(|| sync_dir(&directory))?;
        self.failpoints.check_blocking(When::After, "journal: record")
    }

    /// Updates the header if it has changed. Blocks.
    pub(crate) fn write_header(&self, pod: &Pod) -> io::Result<()> {
        if self.replace_header(pod)? {
            self.sync(|| sync_dir(&self.directory(&pod.id)))
        } else {
            Ok(())
        }
    }

    /// Returns whether it was changed.
    fn replace_header(&self, pod: &Pod) -> io::Result<bool> {
        let directory = self.directory(&pod.id);
        let bytes = serde_json::to_vec(&Header::of(pod))?;
        if fs::read(directory.join(HEADER)).is_ok_and(|written| written == bytes) {
            return Ok(false);
        }
        self.failpoints.check_blocking(When::Before, "journal: header")?;
        self.replace(&directory, "header.new", HEADER, &bytes)?;
        self.failpoints.check_blocking(When::After, "journal: header")?;
        Ok(true)
    }

    /// Replaces a file, or a directory in its place; durable after a sync of the directory.
    fn replace(&self, directory: &Path, new: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (new, path) = (directory.join(new), directory.join(name));
        for place in [&new, &path] {
            if place.is_dir() {
                remove_any(place)?;
            }
        }
        let mut options = OpenOptions::new();
        let written = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(bytes).and_then(|()| self.sync(|| file.sync_all())))
            .and_then(|()| fs::rename(&new, &path));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        written
    }

    fn sync(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<()> {
        let began = Instant::now();
        let synced = sync();
        self.observer.measured(Measured::JournalSync { took: began.elapsed() });
        synced
    }

    /// Removes a pod's directory, record and header last. Blocks.
    pub(crate) fn remove(&self, pod: &str) -> io::Result<()> {
        let directory = self.directory(pod);
        self.failpoints.check_blocking(When::Before, "journal: removal")?;
        let entries = match fs::read_dir(&directory) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name() != RECORD && entry.file_name() != HEADER {
                remove_any(&entry.path())?;
            }
        }
        remove_any(&directory.join(RECORD))?;
        self.failpoints.check_blocking(When::After, "journal: removal of a record")?;
        remove_any(&directory.join(HEADER))?;
        ignore_not_found(fs::remove_dir(&directory))?;
        self.sync(|| sync_dir(&self.pods))?;
        self.failpoints.check_blocking(When::After, "journal: removal")
    }

    /// Reads all records. Blocks.
    pub(crate) fn load(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.pods)? {
            let entry = entry?;
            let Ok(id) = entry.file_name().into_string() else { continue };
            // Skip others, such as lost+found.
            let is_id = id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            if is_id && entry.file_type()?.is_dir() {
                found.push(load_one(&entry.path(), id)?);
            }
        }
        Ok(found)
    }
}

/// Errors are of this process (no descriptor, no memory), never of a single pod's files.
fn load_one(directory: &Path, id: PodId) -> io::Result<Found> {
    let bytes = read(&directory.join(RECORD))?;
    let (why, partial) = match bytes {
        Ok(bytes) => match record::decode(&bytes) {
            Ok((pod, boot_id)) if pod.id == id => {
                return Ok(Found::Pod { pod: Box::new(pod), boot_id });
            }
            Ok((pod, _)) => (format!("it belongs to pod {:?}", pod.id), PartialRecord::default()),
            Err(error) => {
                (format!("{:#}", anyhow::Error::new(error)), record::decode_partial(&bytes, &id))
            }
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if is_empty(directory)? {
                return Ok(Found::Empty { id });
            }
            ("it is missing".to_owned(), PartialRecord::default())
        }
        Err(e) => (e.to_string(), PartialRecord::default()),
    };
    let header = read(&directory.join(HEADER))?.ok().and_then(|bytes| Header::decode(&bytes, &id));
    let made = fs::metadata(directory).and_then(|meta| meta.created().or_else(|_| meta.modified()));
    Ok(Found::Unreadable(Box::new(Unreadable { id, why, header, partial, made: made.ok() })))
}

/// Has only a header and unrenamed files: the pod was never planned, or is removed.
fn is_empty(directory: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(directory)? {
        let name = entry?.file_name();
        if name != HEADER && NEW.iter().all(|new| name != *new) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The inner error is about the file, the outer one about this process.
fn read(path: &Path) -> io::Result<io::Result<Vec<u8>>> {
    let mut bytes = Vec::new();
    let read = File::open(path)
        .and_then(|file| io::Read::read_to_end(&mut io::Read::take(file, MAX_RECORD), &mut bytes));
    match read {
        Err(e) if matches!(e.raw_os_error(), Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM)) => {
            Err(e)
        }
        Err(e) => Ok(Err(e)),
        Ok(_) => Ok(Ok(bytes)),
    }
}

/// Removes a file, or a directory in its place.
fn remove_any(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        kind => kind?,
    };
    ignore_not_found(if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) })
}

#[cfg(test)]
mod tests;
