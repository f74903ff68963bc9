//! The store's two kinds of record, `images/<id>/record.json` and `refs.json`, as they stand on disk.
//! The stored types change with [`VERSION`] only; a field that only one side of a conversion has does
//! not compile.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::digest::{BadDigest, Digest};
use crate::error::Error;
use crate::files::write_atomic;

/// Of both kinds of file. A newer version's files are moved aside, not guessed at.
const VERSION: u64 = 1;

/// What is known of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    /// Digest of the configuration, which is in the content store; of an artifact, that of the
    /// manifest.
    pub id: Digest,
    /// Has no configuration.
    pub artifact: bool,
    /// Manifest that the image came with; archives of docker have none.
    pub manifest: Option<Digest>,
    pub layers: Vec<Layer>,
    /// Whether the compressed layers are kept.
    pub layers_kept: bool,
    /// Length of the image file.
    pub rootfs_bytes: u64,
    pub inodes: u64,
    /// Seconds since the epoch.
    pub added: u64,
    /// Removed by the user while something still held it: gone from every list, its files go with
    /// the last holder.
    pub removed: bool,
    /// As in `refs.json`, which counts; former releases wrote none.
    pub names: Vec<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Layer {
    pub digest: Digest,
    pub size: u64,
}

/// Images by name.
pub type Refs = BTreeMap<String, Digest>;

#[derive(Serialize, Deserialize)]
struct StoredRecord {
    version: u64,
    id: String,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    artifact: bool,
    manifest: Option<String>,
    layers: Vec<StoredLayer>,
    layers_kept: bool,
    rootfs_bytes: u64,
    inodes: u64,
    added: u64,
    removed: bool,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    names: Vec<String>,
}

#[derive(Serialize, Deserialize)]
struct StoredLayer {
    digest: String,
    size: u64,
}

#[derive(Serialize, Deserialize)]
struct StoredRefs {
    version: u64,
    refs: BTreeMap<String, String>,
}

impl From<&Record> for StoredRecord {
    fn from(live: &Record) -> Self {
        let Record {
            id,
            artifact,
            manifest,
            layers,
            layers_kept,
            rootfs_bytes,
            inodes,
            added,
            removed,
            names,
        } = live.clone();
        Self {
            version: VERSION,
            id: id.into(),
            artifact,
            manifest: manifest.map(String::from),
            layers: layers.into_iter().map(StoredLayer::from).collect(),
            layers_kept,
            rootfs_bytes,
            inodes,
            added,
            removed,
            names,
        }
    }
}

impl TryFrom<StoredRecord> for Record {
    type Error = BadDigest;

    fn try_from(stored: StoredRecord) -> Result<Self, BadDigest> {
        let StoredRecord {
            version: _,
            id,
            artifact,
            manifest,
            layers,
            layers_kept,
            rootfs_bytes,
            inodes,
            added,
            removed,
            names,
        } = stored;
        Ok(Self {
            id: id.parse()?,
            artifact,
            manifest: manifest.map(Digest::try_from).transpose()?,
            layers: layers.into_iter().map(Layer::try_from).collect::<Result<_, _>>()?,
            layers_kept,
            rootfs_bytes,
            inodes,
            added,
            removed,
            names,
        })
    }
}

impl From<Layer> for StoredLayer {
    fn from(live: Layer) -> Self {
        let Layer { digest, size } = live;
        Self { digest: digest.into(), size }
    }
}

impl TryFrom<StoredLayer> for Layer {
    type Error = BadDigest;

    fn try_from(stored: StoredLayer) -> Result<Self, BadDigest> {
        let StoredLayer { digest, size } = stored;
        Ok(Self { digest: digest.parse()?, size })
    }
}

pub fn write_record(path: &Path, record: &Record) -> Result<(), Error> {
    let stored = StoredRecord::from(record);
    write_atomic(path, &serde_json::to_vec_pretty(&stored).expect("numbers and strings"))
}

pub fn read_record(path: &Path, id: Digest) -> Result<Record, Error> {
    let bad = |reason: String| Error::Record { path: path.into(), reason };
    let bytes = read_if_there(path)?.ok_or_else(|| bad("the file is missing".into()))?;
    let stored: StoredRecord = parse_versioned(path, &bytes)?;
    let record = Record::try_from(stored).map_err(|e| bad(e.to_string()))?;
    if record.id != id {
        return Err(bad(format!("it is of image {}", record.id)));
    }
    Ok(record)
}

pub fn write_refs(path: &Path, refs: &Refs) -> Result<(), Error> {
    let refs = refs.iter().map(|(name, id)| (name.clone(), id.to_string())).collect();
    let stored = StoredRefs { version: VERSION, refs };
    write_atomic(path, &serde_json::to_vec_pretty(&stored).expect("strings"))
}

/// None: there is no file.
pub fn read_refs(path: &Path) -> Result<Option<Refs>, Error> {
    let Some(bytes) = read_if_there(path)? else { return Ok(None) };
    let StoredRefs { version: _, refs } = parse_versioned(path, &bytes)?;
    let parsed = refs.into_iter().map(|(name, id)| Ok((name, id.parse::<Digest>()?)));
    let refs: Result<Refs, BadDigest> = parsed.collect();
    refs.map(Some).map_err(|e| Error::Record { path: path.into(), reason: e.to_string() })
}

fn read_if_there(path: &Path) -> Result<Option<Vec<u8>>, Error> {
    match fs::read(path) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(e) => Err(Error::io("read", path, e)),
    }
}

fn parse_versioned<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T, Error> {
    #[derive(Deserialize)]
    struct Probe {
        version: u64,
    }
    let bad = |e: serde_json::Error| Error::Record { path: path.into(), reason: e.to_string() };
    let Probe { version } = serde_json::from_slice(bytes).map_err(bad)?;
    if version != VERSION {
        return Err(Error::RecordVersion { path: path.into(), found: version, known: VERSION });
    }
    serde_json::from_slice(bytes).map_err(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Written by the release before, with something in every field.
    const V1: &str = include_str!("../fixtures/image-v1.json");
    /// As version 1 was when it was new, and still is for an image without names.
    const V1_FIRST: &str = include_str!("../fixtures/image-v1-first.json");
    const REFS_V1: &str = include_str!("../fixtures/refs-v1.json");

    fn digest(n: u8) -> Digest {
        Digest::of(&[n])
    }

    fn first() -> Record {
        Record {
            id: digest(1),
            artifact: false,
            manifest: Some(digest(2)),
            layers: vec![Layer { digest: digest(3), size: 4 }],
            layers_kept: true,
            rootfs_bytes: 4096,
            inodes: 7,
            added: 1_700_000_000,
            removed: false,
            names: Vec::new(),
        }
    }

    fn full() -> Record {
        let names = vec!["registry.example/web:1".into()];
        Record { artifact: true, removed: true, names, ..first() }
    }

    #[test]
    fn records_and_names_are_written_and_read_as_the_fixtures_have_them() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        for (record, fixture) in [(first(), V1_FIRST), (full(), V1)] {
            write_record(&path, &record).unwrap();
            assert_eq!(fs::read_to_string(&path).unwrap(), fixture);
            fs::write(&path, fixture).unwrap();
            assert_eq!(read_record(&path, digest(1)).unwrap(), record);
        }
        let refs: Refs = [("registry.example/web:1".to_owned(), digest(1))].into();
        write_refs(&path, &refs).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), REFS_V1);
        fs::write(&path, REFS_V1).unwrap();
        assert_eq!(read_refs(&path).unwrap(), Some(refs));
    }

    #[test]
    fn a_digest_that_is_none_is_damage_wherever_it_stands() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.json");
        for n in [1, 2, 3] {
            fs::write(&path, V1.replace(&digest(n).to_string(), "sha256:zz")).unwrap();
            let error = read_record(&path, digest(1)).unwrap_err();
            assert!(matches!(error, Error::Record { .. }), "{error}");
        }
        fs::write(&path, REFS_V1.replace(&digest(1).to_string(), "md5:0")).unwrap();
        assert!(read_refs(&path).unwrap_err().is_damage());
        fs::write(&path, V1.replace("\"version\": 1", "\"version\": 2")).unwrap();
        let error = read_record(&path, digest(1)).unwrap_err();
        assert!(matches!(error, Error::RecordVersion { found: 2, .. }), "{error}");
    }
}
