//! Records of attachments on disk: written before the first plugin runs and removed after the last
//! DEL, so that a pod can always be detached with the configuration of its attach.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::plugin::conf::{ConfError, Network};
use crate::plugin::params::Params;

const VERSION: u32 = 1;
/// Maximum size of a record, bytes: more than the maximum of two configurations and a result.
const MAX_BYTES: u64 = 4 << 20;
const SUFFIX: &str = ".json";
/// Damaged records that are kept, and for how long: enough for a look at what went wrong.
const MAX_DAMAGED: usize = 64;
const MAX_AGE: Duration = Duration::from_secs(30 * 24 * 60 * 60);

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

/// Format on disk. It changes with [`VERSION`] only; what CNI defines is in it as CNI's own JSON.
#[derive(Serialize, Deserialize)]
struct Stored {
    version: u32,
    conf_path: PathBuf,
    conf: Value,
    params: StoredParams,
    result: Option<Value>,
}

#[derive(Serialize, Deserialize)]
struct StoredParams {
    container_id: String,
    interface: String,
    netns: PathBuf,
    args: Vec<(String, String)>,
    runtime: Map<String, Value>,
}

impl From<Params> for StoredParams {
    fn from(live: Params) -> Self {
        let Params { container_id, interface, netns, args, runtime } = live;
        Self { container_id, interface, netns, args, runtime }
    }
}

impl From<StoredParams> for Params {
    fn from(stored: StoredParams) -> Self {
        let StoredParams { container_id, interface, netns, args, runtime } = stored;
        Self { container_id, interface, netns, args, runtime }
    }
}

impl From<Record> for Stored {
    fn from(live: Record) -> Self {
        let Record { network, params, result } = live;
        let Network {
            path,
            source,
            // Read from the source again.
            name: _,
            version: _,
            disable_check: _,
            disable_gc: _,
            plugins: _,
        } = network;
        Self { version: VERSION, conf_path: path, conf: source, params: params.into(), result }
    }
}

impl TryFrom<Stored> for Record {
    type Error = ConfError;

    fn try_from(stored: Stored) -> Result<Self, ConfError> {
        let Stored { version: _, conf_path, conf, params, result } = stored;
        let network = Network::from_value(conf_path, conf)?;
        Ok(Self { network, params: params.into(), result })
    }
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
        let bytes = serde_json::to_vec(&Stored::from(record.clone()))
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
        let record = Record::try_from(stored).map_err(|e| damaged(e.to_string()))?;
        if record.params.container_id != id {
            return Err(damaged(format!("it belongs to {:?}", record.params.container_id)));
        }
        Ok(Some(record))
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
        fs::rename(&path, &target).map_err(io("move aside", &path))?;
        self.prune_damaged(SystemTime::now());
        Ok(())
    }

    /// Removes damaged records that are too old, and the oldest ones above the maximum number.
    fn prune_damaged(&self, now: SystemTime) {
        let entries = fs::read_dir(&self.damaged_dir).into_iter().flatten().flatten();
        let mut kept: Vec<_> = entries
            .filter_map(|entry| {
                // The time of the last change of the inode: that of its move to here.
                let metadata = entry.metadata().ok()?;
                Some((metadata.ctime(), metadata.ctime_nsec(), metadata.is_dir(), entry.path()))
            })
            .collect();
        kept.sort();
        let too_many = kept.len().saturating_sub(MAX_DAMAGED);
        let oldest = now.checked_sub(MAX_AGE).unwrap_or(UNIX_EPOCH);
        let oldest = oldest.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        for (n, (moved, _, is_dir, path)) in kept.into_iter().enumerate() {
            if n >= too_many && u64::try_from(moved).unwrap_or(0) >= oldest {
                continue;
            }
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            if let Err(error) = removed {
                tracing::warn!(path = %path.display(), %error, "damaged record cannot be removed");
            }
        }
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

    /// A record as the release before wrote it, with something in every field.
    const V1: &str = include_str!("../fixtures/attachment-v1.json");

    #[test]
    fn the_record_is_written_and_read_as_the_fixture_has_it() {
        use crate::model::{Dns, Pod, PortMapping, Protocol};
        let port = PortMapping {
            protocol: Protocol::Sctp,
            container_port: 1,
            host_port: 2,
            host_ip: Some("::1".parse().unwrap()),
        };
        let pod = Pod {
            id: "pod1".into(),
            name: "web".into(),
            namespace: "prod".into(),
            uid: "1-2".into(),
            annotations: [("a".to_owned(), "b".to_owned())].into(),
            ports: vec![port],
            dns: Dns { servers: vec!["1.1.1.1".into()], ..Dns::default() },
            cgroup_parent: "/kubepods/pod1".into(),
            native: false,
            default_network: false,
        };
        let params = Params::new(&pod, "eth0", Path::new("/run/netns/p")).unwrap();
        let full = Record { params, ..record() };
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path());
        records.write(&full).unwrap();
        assert_eq!(fs::read_to_string(records.path("pod1")).unwrap(), V1);
        fs::write(records.path("pod1"), V1).unwrap();
        assert_eq!(records.read("pod1").unwrap(), Some(full));
        // Of an ADD that has not come to its end.
        let begun = Record { result: None, ..record() };
        records.write(&begun).unwrap();
        assert_eq!(records.read("pod1").unwrap(), Some(begun));
    }

    #[test]
    fn damaged_records_are_kept_up_to_a_number_and_for_a_month() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path());
        fs::create_dir_all(&records.dir).unwrap();
        for n in 0..MAX_DAMAGED + 3 {
            fs::write(records.path(&format!("pod{n}")), "{").unwrap();
            records.move_to_damaged(&format!("pod{n}")).unwrap();
            // Times of files are as coarse as the kernel's tick.
            std::thread::sleep(Duration::from_millis(12));
        }
        let kept = || fs::read_dir(&records.damaged_dir).unwrap().count();
        assert_eq!(kept(), MAX_DAMAGED);
        let has = |n: usize| records.damaged_dir.join(format!("pod{n}.json")).exists();
        assert!(!has(2) && has(3) && has(MAX_DAMAGED + 2));
        records.prune_damaged(SystemTime::now() + MAX_AGE + Duration::from_secs(3600));
        assert_eq!(kept(), 0);
    }
}
