//! Records of attachments on disk: written before the first plugin runs and removed after the last
//! DEL, so that a pod can always be detached with the configuration of its attach.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::plugin::conf::{ConfError, Network};
use crate::plugin::params::Params;

const VERSION: u32 = 1;
/// Maximum size of a record, bytes: more than the maximum of two configurations and a result.
const MAX_BYTES: u64 = 4 << 20;
const SUFFIX: &str = ".json";

#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("cannot {what} {}", .path.display())]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error("the network record {} is damaged: {problem}", .path.display())]
    Damaged { path: PathBuf, problem: String },
}

/// The attachment of a pod to a network.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    pub network: Network,
    pub params: Params,
    /// None until ADD has succeeded.
    pub result: Option<Value>,
}

/// Format on disk.
#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    conf_path: PathBuf,
    conf: Value,
    params: Params,
    result: Option<Value>,
}

/// The directory of records.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
    /// Directory for damaged records of detached pods.
    damaged_dir: PathBuf,
}

impl Records {
    pub fn new(dir: &Path) -> Self {
        Self { dir: dir.join("attachments"), damaged_dir: dir.join("damaged") }
    }

    fn path(&self, id: &str) -> PathBuf {
        self.dir.join(format!("{id}{SUFFIX}"))
    }

    /// Atomic and durable: without its record a leased address could not be released.
    pub fn write(&self, record: &Record) -> Result<(), RecordError> {
        let id = &record.params.container_id;
        let path = self.path(id);
        let stored = Stored {
            version: VERSION,
            conf_path: record.network.path.clone(),
            conf: record.network.source.clone(),
            params: record.params.clone(),
            result: record.result.clone(),
        };
        let bytes = serde_json::to_vec(&stored)
            .map_err(|e| RecordError::Damaged { path: path.clone(), problem: e.to_string() })?;
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| RecordError::Io { what, path, source }
        };
        fs::create_dir_all(&self.dir).map_err(io("create", &self.dir))?;
        let temporary = self.dir.join(format!(".{id}.tmp"));
        let written = File::create(&temporary)
            .and_then(|mut file| {
                file.write_all(&bytes)?;
                file.sync_all()
            })
            .and_then(|()| fs::rename(&temporary, &path))
            .and_then(|()| File::open(&self.dir)?.sync_all());
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written.map_err(io("write", &path))
    }

    /// None if the pod has no record.
    pub fn read(&self, id: &str) -> Result<Option<Record>, RecordError> {
        let path = self.path(id);
        let mut bytes = Vec::new();
        let read = File::open(&path).and_then(|f| f.take(MAX_BYTES).read_to_end(&mut bytes));
        match read {
            Ok(_) => {}
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(RecordError::Io { what: "read", path, source }),
        }
        let damaged = |problem| RecordError::Damaged { path: path.clone(), problem };
        let stored: Stored = serde_json::from_slice(&bytes).map_err(|e| damaged(e.to_string()))?;
        if stored.version != VERSION {
            let problem = format!("version {}, only {VERSION} is supported", stored.version);
            return Err(damaged(problem));
        }
        let network = Network::from_value(stored.conf_path, stored.conf)
            .map_err(|e: ConfError| damaged(e.to_string()))?;
        if stored.params.container_id != id {
            return Err(damaged(format!("it belongs to {:?}", stored.params.container_id)));
        }
        Ok(Some(Record { network, params: stored.params, result: stored.result }))
    }

    pub fn exists(&self, id: &str) -> bool {
        self.path(id).exists()
    }

    /// Removes a record; success if there is none.
    pub fn remove(&self, id: &str) -> Result<(), RecordError> {
        let path = self.path(id);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                Err(RecordError::Io { what: "remove", path, source: e })
            }
            _ => Ok(()),
        }
    }

    /// Moves a damaged record to the directory `damaged`. Only after its pod was detached: until
    /// then the record marks the pod's address as in use.
    pub fn move_to_damaged(&self, id: &str) -> Result<(), RecordError> {
        let io = |what, path: &Path| {
            let path = path.to_owned();
            move |source| RecordError::Io { what, path, source }
        };
        let path = self.path(id);
        if fs::symlink_metadata(&path).is_err_and(|e| e.kind() == io::ErrorKind::NotFound) {
            return Ok(());
        }
        fs::create_dir_all(&self.damaged_dir).map_err(io("create", &self.damaged_dir))?;
        let target = self.damaged_dir.join(format!("{id}{SUFFIX}"));
        // Of earlier damage to the same pod's record.
        let removed =
            if target.is_dir() { fs::remove_dir_all(&target) } else { fs::remove_file(&target) };
        match removed {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(io("remove", &target)(e));
            }
            _ => {}
        }
        fs::rename(&path, &target).map_err(io("move aside", &path))
    }

    /// Errors of all records that cannot be read.
    pub fn damaged(&self) -> Result<Vec<RecordError>, RecordError> {
        Ok(self.ids()?.iter().filter_map(|id| self.read(id).err()).collect())
    }

    /// Ids of all pods with a record.
    pub fn ids(&self) -> Result<Vec<String>, RecordError> {
        let io = |source| RecordError::Io { what: "list", path: self.dir.clone(), source };
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(io(e)),
        };
        let mut ids = Vec::new();
        for entry in entries {
            let name = entry.map_err(io)?.file_name();
            let Some(name) = name.to_str() else { continue };
            if let Some(id) = name.strip_suffix(SUFFIX).filter(|id| !id.starts_with('.')) {
                ids.push(id.to_owned());
            } else if name.starts_with('.') && name.ends_with(".tmp") {
                // Left by an interrupted write.
                let _ = fs::remove_file(self.dir.join(name));
            }
        }
        Ok(ids)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn record() -> Record {
        let conf = json!({"cniVersion":"1.0.0","name":"n","plugins":[{"type":"bridge"}]});
        Record {
            network: Network::from_value("/etc/cni/net.d/1.conflist".into(), conf).unwrap(),
            params: Params::from_id("pod1", "eth0", Path::new("/run/netns/p")).unwrap(),
            result: Some(json!({"ips":[]})),
        }
    }

    #[test]
    fn a_record_round_trips() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path());
        assert_eq!(records.ids().unwrap(), Vec::<String>::new());
        assert_eq!(records.read("pod1").unwrap(), None);
        records.write(&record()).unwrap();
        assert_eq!(records.read("pod1").unwrap(), Some(record()));
        assert_eq!(records.ids().unwrap(), ["pod1"]);
        records.remove("pod1").unwrap();
        records.remove("pod1").unwrap();
        assert!(!records.exists("pod1"));
    }

    #[test]
    fn damaged_records_are_reported_and_temporary_files_removed() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path());
        records.write(&record()).unwrap();
        let path = records.path("pod1");
        let good = fs::read_to_string(&path).unwrap();
        for bad in [
            "",
            "{",
            &good[..good.len() / 2],
            &good.replace("\"version\":1", "\"version\":9"),
            &good.replace("pod1", "pod2"),
            &good.replace("bridge", "../bridge"),
        ] {
            fs::write(&path, bad).unwrap();
            let e = records.read("pod1").unwrap_err();
            assert!(matches!(e, RecordError::Damaged { .. }), "{bad}: {e}");
        }
        fs::remove_file(&path).unwrap();
        fs::create_dir_all(path.join("deep")).unwrap();
        assert!(records.read("pod1").is_err());
        assert_eq!(records.damaged().unwrap().len(), 1);
        fs::write(records.dir.join(".pod3.tmp"), "x").unwrap();
        assert_eq!(records.ids().unwrap(), ["pod1"]);
        assert!(!records.dir.join(".pod3.tmp").exists());
        records.move_to_damaged("pod1").unwrap();
        assert!(records.ids().unwrap().is_empty() && records.damaged().unwrap().is_empty());
        // A directory or file of an earlier call is replaced.
        records.write(&record()).unwrap();
        records.move_to_damaged("pod1").unwrap();
        records.move_to_damaged("pod1").unwrap();
        assert!(records.damaged_dir.join("pod1.json").is_file());
    }
}
