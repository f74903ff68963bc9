//! The journal: one record a pod, `pods/<id>/record.json`, replaced as a whole (written beside,
//! synced, renamed, folder synced), so that a crash at any moment leaves the old or the new one.

mod record;

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::host::{absent_is_fine, sync_dir};
use crate::model::PodId;
use crate::policy::{Effect, Pod};

const RECORD: &str = "record.json";
/// A record is refused above this size: nothing we write comes near it.
const MAX_RECORD: u64 = 64 << 20;

/// Where a test may stop the world, or fail: before or after the n-th write of the journal.
pub(crate) trait Probe: Send + Sync {
    fn before_write(&self, pod: &Pod) -> io::Result<()>;
    fn after_write(&self, pod: &Pod);
}

/// The records of a node.
#[derive(Clone)]
pub(crate) struct Journal {
    pods: PathBuf,
    probe: Option<Arc<dyn Probe>>,
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
    /// Not to be understood; as much of the ledger as could be read.
    Quarantined {
        id: PodId,
        why: String,
        effects: Vec<Effect>,
    },
}

impl Journal {
    pub(crate) fn open(pods: PathBuf, probe: Option<Arc<dyn Probe>>) -> io::Result<Self> {
        fs::DirBuilder::new().recursive(true).mode(0o700).create(&pods)?;
        Ok(Self { pods, probe })
    }

    pub(crate) fn folder(&self, pod: &str) -> PathBuf {
        self.pods.join(pod)
    }

    /// Writes a pod's record. Blocks.
    pub(crate) fn write(&self, pod: &Pod, boot_id: &str) -> io::Result<()> {
        if let Some(probe) = &self.probe {
            probe.before_write(pod)?;
        }
        let folder = self.folder(&pod.id);
        match fs::DirBuilder::new().mode(0o700).create(&folder) {
            Ok(()) => sync_dir(&self.pods)?,
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
        }
        let bytes = record::encode(pod, boot_id)?;
        let (new, path) = (folder.join("record.new"), folder.join(RECORD));
        let mut options = OpenOptions::new();
        let written = options
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .open(&new)
            .and_then(|mut file| file.write_all(&bytes).and_then(|()| file.sync_all()))
            .and_then(|()| fs::rename(&new, &path))
            .and_then(|()| sync_dir(&folder));
        if written.is_err() {
            let _ = fs::remove_file(&new);
        }
        if let (Some(probe), Ok(())) = (&self.probe, &written) {
            probe.after_write(pod);
        }
        written
    }

    /// Removes a pod's folder, its record last. Blocks.
    pub(crate) fn remove(&self, pod: &str) -> io::Result<()> {
        let folder = self.folder(pod);
        let entries = match fs::read_dir(&folder) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            entries => entries?,
        };
        for entry in entries {
            let entry = entry?;
            if entry.file_name() != RECORD {
                absent_is_fine(if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())
                } else {
                    fs::remove_file(entry.path())
                })?;
            }
        }
        absent_is_fine(fs::remove_file(folder.join(RECORD)))?;
        absent_is_fine(fs::remove_dir(&folder))?;
        sync_dir(&self.pods)
    }

    /// Reads all records. Blocks.
    pub(crate) fn load(&self) -> io::Result<Vec<Found>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(&self.pods)? {
            let entry = entry?;
            let Ok(id) = entry.file_name().into_string() else { continue };
            if entry.file_type()?.is_dir() {
                found.push(load_one(&entry.path(), id)?);
            }
        }
        Ok(found)
    }
}

fn load_one(folder: &Path, id: PodId) -> io::Result<Found> {
    let path = folder.join(RECORD);
    let file = match File::open(&path) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Found::Empty { id }),
        file => file?,
    };
    let mut bytes = Vec::new();
    io::Read::read_to_end(&mut io::Read::take(file, MAX_RECORD), &mut bytes)?;
    Ok(match record::decode(&bytes) {
        Ok((pod, _)) if pod.id != id => Found::Quarantined {
            why: format!("record is of pod {:?}", pod.id),
            effects: pod.ledger,
            id,
        },
        Ok((pod, boot_id)) => Found::Pod { pod: Box::new(pod), boot_id },
        Err(e) => {
            Found::Quarantined { id, why: e.to_string(), effects: record::decode_ledger(&bytes) }
        }
    })
}

#[cfg(test)]
mod tests;
