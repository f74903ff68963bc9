//! The journal: one record a pod, `pods/<id>/record.json`, replaced as a whole (written beside,
//! synced, renamed, folder synced), so that a crash at any moment leaves the old or the new one.
//! Beside it stands a small [`header`], for the case that the record cannot be read.

mod header;
mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use crate::failpoint::{Failpoints, When};
use crate::host::{absent_is_fine, sync_dir};
use crate::model::PodId;
use crate::observe::{Measured, Observer, Outcome};
use crate::policy::Pod;

pub(crate) use header::Header;
pub(crate) use record::Rescued;

const RECORD: &str = "record.json";
const HEADER: &str = "header.json";
/// Files in the making.
const NEW: [&str; 2] = ["record.new", "header.new"];
/// A record is refused above this size: nothing we write comes near it.
const MAX_RECORD: u64 = 64 << 20;

/// The records of a node.
#[derive(Clone)]
pub(crate) struct Journal {
    pods: PathBuf,
    observer: Arc<dyn Observer>,
    failpoints: Failpoints,
}

/// What stands in a pod's folder.
pub(crate) enum Found {
    Pod {
        pod: Box<Pod>,
        boot_id: String,
    },
    /// The folder was made, the record not: nothing else has happened yet.
    Empty {
        id: PodId,
    },
    Unread(Box<Unread>),
}

/// A pod whose record cannot be read, and what is known of it all the same.
pub(crate) struct Unread {
    pub(crate) id: PodId,
    pub(crate) why: String,
    pub(crate) header: Option<Header>,
    pub(crate) rescued: Rescued,
    /// When the folder was made.
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

    pub(crate) fn folder(&self, pod: &str) -> PathBuf {
        self.pods.join(pod)
    }

    /// Writes a pod's header and record. Blocks.
    ///
    /// A record that could not be read stays as it is: another release may be able to read it. What
    /// happens to such a pod is found out again after a restart, as undoing can be repeated.
    pub(crate) fn write(&self, pod: &Pod, boot_id: &str) -> io::Result<()> {
        if pod.unread {
            return Ok(());
        }
        let began = Instant::now();
        let written = self.write_both(pod, boot_id);
        let outcome = if written.is_ok() { Outcome::Ok } else { Outcome::Failed };
        self.observer.measured(Measured::JournalWrite { outcome, took: began.elapsed() });
        written
    }

    fn write_both(&self, pod: &Pod, boot_id: &str) -> io::Result<()> {
        self.failpoints.pass(When::Before, "journal: folder")?;
        let folder = self.folder(&pod.id);
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => self.sync(|| sync_dir(&self.pods))?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        self.replace_header(pod)?;
        let bytes = record::encode(pod, boot_id)?;
        self.failpoints.pass(When::Before, "journal: record")?;
        self.replace(&folder, "record.new", RECORD, &bytes)?;
        // One for both: it is what a start of a pod waits for.
        self.sync(|| sync_dir(&folder))?;
        self.failpoints.pass(When::After, "journal: record")
    }

    /// Brings the header up to date, if it is not. Blocks.
    pub(crate) fn write_header(&self, pod: &Pod) -> io::Result<()> {
        match self.replace_header(pod)? {
            true => self.sync(|| sync_dir(&self.folder(&pod.id))),
            false => Ok(()),
        }
    }

    /// True if it was not up to date.
    fn replace_header(&self, pod: &Pod) -> io::Result<bool> {
        let folder = self.folder(&pod.id);
        let bytes = serde_json::to_vec(&Header::of(pod))?;
        if fs::read(folder.join(HEADER)).is_ok_and(|written| written == bytes) {
            return Ok(false);
        }
        self.failpoints.pass(When::Before, "journal: header")?;
        self.replace(&folder, "header.new", HEADER, &bytes)?;
        self.failpoints.pass(When::After, "journal: header")?;
        Ok(true)
    }

    /// Writes a file of a folder, whatever stood there before; durable once the folder is synced.
    fn replace(&self, folder: &Path, new: &str, name: &str, bytes: &[u8]) -> io::Result<()> {
        let (new, path) = (folder.join(new), folder.join(name));
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

    /// Removes a pod's folder, its record and header last. Blocks.
    pub(crate) fn remove(&self, pod: &str) -> io::Result<()> {
        let folder = self.folder(pod);
        self.failpoints.pass(When::Before, "journal: removal")?;
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name() != RECORD && entry.file_name() != HEADER {
                remove_any(&entry.path())?;
            }
        }
        remove_any(&folder.join(RECORD))?;
        self.failpoints.pass(When::After, "journal: removal of a record")?;
        remove_any(&folder.join(HEADER))?;
        absent_is_fine(fs::remove_dir(&folder))?;
        self.sync(|| sync_dir(&self.pods))?;
        self.failpoints.pass(When::After, "journal: removal")
    }

    /// Reads all records. Blocks.
    pub(crate) fn load(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.pods)? {
            let entry = entry?;
            let Ok(id) = entry.file_name().into_string() else { continue };
            // Such as lost+found.
            let is_id = id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-');
            if is_id && entry.file_type()?.is_dir() {
                found.push(load_one(&entry.path(), id)?);
            }
        }
        Ok(found)
    }
}

/// An error is one of this process (no descriptor, no memory), never of a single pod's files.
fn load_one(folder: &Path, id: PodId) -> io::Result<Found> {
    let bytes = read(&folder.join(RECORD))?;
    let (why, rescued) = match bytes {
        Ok(bytes) => match record::decode(&bytes) {
            Ok((pod, boot_id)) if pod.id == id => {
                return Ok(Found::Pod { pod: Box::new(pod), boot_id });
            }
            Ok((pod, _)) => (format!("it is of pod {:?}", pod.id), Rescued::default()),
            Err(error) => (format!("{:#}", anyhow::Error::new(error)), record::rescue(&bytes, &id)),
        },
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            if is_empty(folder)? {
                return Ok(Found::Empty { id });
            }
            ("it is missing".to_owned(), Rescued::default())
        }
        Err(e) => (e.to_string(), Rescued::default()),
    };
    let header = read(&folder.join(HEADER))?.ok().and_then(|bytes| Header::decode(&bytes, &id));
    let made = fs::metadata(folder).and_then(|meta| meta.created().or_else(|_| meta.modified()));
    Ok(Found::Unread(Box::new(Unread { id, why, header, rescued, made: made.ok() })))
}

/// Nothing but a header and files in the making: the pod was never planned, or is removed.
fn is_empty(folder: &Path) -> io::Result<bool> {
    for entry in fs::read_dir(folder)? {
        let name = entry?.file_name();
        if name != HEADER && NEW.iter().all(|new| name != *new) {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The inner result is about the file, the outer one about this process.
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

/// Removes a file, or a folder that stands in the place of one.
fn remove_any(path: &Path) -> io::Result<()> {
    let kind = match fs::symlink_metadata(path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        kind => kind?,
    };
    absent_is_fine(if kind.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) })
}

#[cfg(test)]
mod tests;
