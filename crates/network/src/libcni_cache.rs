//! libcni's cache of attachments, shared by the runtimes of a host. A plugin's GC frees everything
//! that is not in its list, so the list must have the pods of other runtimes. containerd, CRI-O and
//! Podman (libcni) keep a file `<network>-<container id>-<interface>` for each attachment in one
//! directory. These files are read here, and written for nacelle's pods in the same format.

use std::fs::{self, DirBuilder, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::record::Record;

/// Maximum size of a file that is read: a configuration in base64 and a result, each of the maximum
/// size.
const MAX_BYTES: u64 = 4 << 20;
const KIND: &str = "cniCacheV1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    kind: String,
    container_id: String,
    if_name: String,
    network_name: String,
    #[serde(default)]
    netns: PathBuf,
}

/// File format of libcni.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Entry<'a> {
    kind: &'static str,
    container_id: &'a str,
    /// Base64 of the network's configuration.
    config: String,
    if_name: &'a str,
    network_name: &'a str,
    netns: &'a Path,
    #[serde(skip_serializing_if = "is_empty")]
    cni_args: &'a [(String, String)],
    #[serde(skip_serializing_if = "Map::is_empty")]
    capability_args: &'a Map<String, Value>,
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<&'a Value>,
}

fn is_empty<T>(list: &&[T]) -> bool {
    list.is_empty()
}

/// Container ids and interfaces of all attachments to the network. The error is a file or directory
/// that cannot be read, for example one that is being written: then the list would be incomplete.
pub fn attachments(dir: &Path, network: &str) -> Result<Vec<(String, String)>, PathBuf> {
    if dir.as_os_str().is_empty() {
        return Ok(Vec::new());
    }
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(_) => return Err(dir.to_owned()),
    };
    // File names start with the network name.
    let prefix = format!("{network}-");
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.map_err(|_| dir.to_owned())?.path();
        let named =
            path.file_name().is_some_and(|n| n.as_encoded_bytes().starts_with(prefix.as_bytes()));
        match read(&path) {
            Some(cached) if cached.kind == KIND && cached.network_name == network => {
                found.push((cached.container_id, cached.if_name));
            }
            // If it no longer exists, the pod was removed meanwhile.
            None if named && path.exists() => return Err(path),
            _ => {}
        }
    }
    Ok(found)
}

/// Writes the file of a pod, without or with its result. Does nothing if no directory is
/// configured.
pub fn write(dir: &Path, record: &Record) -> io::Result<()> {
    if dir.as_os_str().is_empty() {
        return Ok(());
    }
    let Record { network, params, result } = record;
    let entry = Entry {
        kind: KIND,
        container_id: &params.container_id,
        config: STANDARD.encode(serde_json::to_vec(&network.source)?),
        if_name: &params.interface,
        network_name: &network.name,
        netns: &params.netns,
        cni_args: &params.args,
        capability_args: &params.runtime,
        result: result.as_ref(),
    };
    let bytes = serde_json::to_vec(&entry)?;
    DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
    let path = path(dir, record);
    let temporary = temporary(&path);
    let written = File::options()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&temporary)
        .and_then(|mut file| {
            file.write_all(&bytes)?;
            // An empty file after a crash would prevent every GC.
            file.sync_data()
        })
        .and_then(|()| fs::rename(&temporary, &path));
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written
}

/// Whether the file exists, or no directory is configured.
pub fn exists(dir: &Path, record: &Record) -> bool {
    dir.as_os_str().is_empty() || path(dir, record).exists()
}

/// Removes the file; success if it does not exist.
pub fn remove(dir: &Path, record: &Record) -> io::Result<()> {
    if dir.as_os_str().is_empty() {
        return Ok(());
    }
    let path = path(dir, record);
    ignore_not_found(fs::remove_file(temporary(&path)))?;
    ignore_not_found(fs::remove_file(&path))
}

/// Whether a pod of nacelle is entered in this network.
pub fn is_cached(dir: &Path, network: &str, id: &str, netns: &Path) -> bool {
    let beginning = format!("{network}-{id}-");
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut named = entries.filter(|e| e.file_name().to_string_lossy().starts_with(&beginning));
    named.any(|entry| {
        let cached = read(&entry.path());
        cached.is_some_and(|c| c.kind == KIND && c.container_id == id && c.netns == netns)
    })
}

/// Removes the file of a pod with a damaged record, whose network name is not known.
pub fn remove_by_id(dir: &Path, id: &str, netns: &Path) -> io::Result<()> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(e),
    };
    let part = format!("-{id}-");
    for entry in entries {
        let path = entry?.path();
        let named = path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.contains(&part));
        // Another runtime may use the same id with another namespace.
        let ours = |c: &Cached| c.kind == KIND && c.container_id == id && c.netns == netns;
        if named && read(&path).as_ref().is_some_and(ours) {
            ignore_not_found(fs::remove_file(&path))?;
        }
    }
    Ok(())
}

/// Names of networks, ids and interfaces contain no '/'.
fn path(dir: &Path, record: &Record) -> PathBuf {
    let Record { network, params, .. } = record;
    dir.join(format!("{}-{}-{}", network.name, params.container_id, params.interface))
}

/// Temporary name with a leading dot, which does not match any network's prefix.
fn temporary(path: &Path) -> PathBuf {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    path.with_file_name(format!(".{name}.tmp"))
}

fn ignore_not_found(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

fn read(path: &Path) -> Option<Cached> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    use serde_json::json;

    use crate::plugin::conf::Network;
    use crate::plugin::params::Params;

    fn record() -> Record {
        let conf = json!({"cniVersion":"1.1.0","name":"net","plugins":[{"type":"bridge"}]});
        let mut params = Params::from_id("pod-1", "eth0", Path::new("/run/netns/p")).unwrap();
        params.runtime.insert("bandwidth".into(), json!({"ingressRate": 1000}));
        Record {
            network: Network::from_value("/etc/cni/net.d/1.conflist".into(), conf).unwrap(),
            params,
            result: None,
        }
    }

    #[test]
    fn a_file_has_the_format_of_libcni() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("cni/results");
        let mut record = record();
        write(&dir, &record).unwrap();
        // The file exists before ADD, without a result.
        assert_eq!(attachments(&dir, "net").unwrap(), [("pod-1".into(), "eth0".into())]);
        record.result = Some(json!({"cniVersion":"1.1.0","ips":[{"address":"10.1.0.5/16"}]}));
        write(&dir, &record).unwrap();
        let path = dir.join("net-pod-1-eth0");
        let entry: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
        let config = STANDARD.decode(entry["config"].as_str().unwrap()).unwrap();
        assert_eq!(serde_json::from_slice::<Value>(&config).unwrap(), record.network.source);
        let expected = json!({
            "kind": "cniCacheV1",
            "containerId": "pod-1",
            "config": entry["config"],
            "ifName": "eth0",
            "networkName": "net",
            "netns": "/run/netns/p",
            "cniArgs": [
                ["IgnoreUnknown", "1"],
                ["K8S_POD_NAMESPACE", ""],
                ["K8S_POD_NAME", ""],
                ["K8S_POD_INFRA_CONTAINER_ID", "pod-1"],
                ["K8S_POD_UID", ""],
            ],
            "capabilityArgs": {"bandwidth": {"ingressRate": 1000}},
            "result": {"cniVersion": "1.1.0", "ips": [{"address": "10.1.0.5/16"}]},
        });
        assert_eq!(entry, expected);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&path), mode(&dir)), (0o600, 0o700));
        remove(&dir, &record).unwrap();
        remove(&dir, &record).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
    }

    #[test]
    fn a_file_can_be_removed_by_pod_id_without_affecting_others() {
        let dir = tempfile::tempdir().unwrap();
        let mut other = record();
        other.params.container_id = "pod-2".into();
        let mut foreign = record();
        foreign.network.name = "foreign".into();
        foreign.params.netns = "/run/netns/foreign".into();
        for record in [&record(), &other, &foreign] {
            write(dir.path(), record).unwrap();
        }
        remove_by_id(dir.path(), "pod-1", Path::new("/run/netns/p")).unwrap();
        assert!(!dir.path().join("net-pod-1-eth0").exists());
        assert!(dir.path().join("net-pod-2-eth0").exists());
        assert!(dir.path().join("foreign-pod-1-eth0").exists());
    }

    #[test]
    fn without_a_directory_nothing_is_written_or_read() {
        let nowhere = Path::new("");
        write(nowhere, &record()).unwrap();
        remove(nowhere, &record()).unwrap();
        assert_eq!(attachments(nowhere, "net"), Ok(Vec::new()));
    }

    #[test]
    fn attachments_of_a_network_are_found_and_unrelated_files_ignored() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            (
                "a",
                r#"{"kind":"cniCacheV1","containerId":"c1","ifName":"eth0","networkName":"n",
                    "config":"e30="}"#,
            ),
            ("b", r#"{"kind":"cniCacheV1","containerId":"c2","ifName":"eth0","networkName":"m"}"#),
            ("c", "garbage"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let ours = [("c1".to_owned(), "eth0".to_owned())];
        assert_eq!(attachments(dir.path(), "n").unwrap(), ours);
        assert_eq!(attachments(Path::new("/nonexistent"), "n"), Ok(Vec::new()));
        // An incomplete file with the network's prefix.
        let half = dir.path().join("n-c3-eth0");
        fs::write(&half, "{\"kind\":").unwrap();
        assert_eq!(attachments(dir.path(), "n"), Err(half));
        assert_eq!(attachments(dir.path(), "m").unwrap().len(), 1);
    }
}
