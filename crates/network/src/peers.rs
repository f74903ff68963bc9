//! Pods that other runtimes of this host have on the same network. A plugin's GC frees everything
//! that it is not told of, so it must be told of them too. The reference library, which containerd,
//! CRI-O and Podman use, keeps a file for each attachment here.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserialize;

const RESULTS: &str = "/var/lib/cni/results";
/// Longest file that is looked into.
const MAX_BYTES: u64 = 1 << 20;
const KIND: &str = "cniCacheV1";

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Cached {
    kind: String,
    container_id: String,
    if_name: String,
    network_name: String,
}

/// Container ids and interfaces of the others on that network. The file or folder that may hold
/// some but cannot be read (one being written, say) is the error: then nobody knows.
pub fn attachments(network: &str) -> Result<Vec<(String, String)>, PathBuf> {
    attachments_in(Path::new(RESULTS), network)
}

fn attachments_in(dir: &Path, network: &str) -> Result<Vec<(String, String)>, PathBuf> {
    let entries = match fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(_) => return Err(dir.to_owned()),
    };
    // Names of files begin with the network's.
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
            // Of a pod that went this moment.
            None if named && path.exists() => return Err(path),
            _ => {}
        }
    }
    Ok(found)
}

fn read(path: &Path) -> Option<Cached> {
    let mut bytes = Vec::new();
    File::open(path).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
    serde_json::from_slice(&bytes).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachments_of_the_same_network_are_found_and_rubbish_of_others_is_passed_over() {
        let dir = tempfile::tempdir().unwrap();
        for (file, text) in [
            (
                "a",
                r#"{"kind":"cniCacheV1","containerId":"c1","ifName":"eth0","networkName":"n",
                    "config":"e30="}"#,
            ),
            ("b", r#"{"kind":"cniCacheV1","containerId":"c2","ifName":"eth0","networkName":"m"}"#),
            ("c", "rubbish"),
        ] {
            fs::write(dir.path().join(file), text).unwrap();
        }
        let ours = [("c1".to_owned(), "eth0".to_owned())];
        assert_eq!(attachments_in(dir.path(), "n").unwrap(), ours);
        assert_eq!(attachments_in(Path::new("/nonexistent"), "n"), Ok(Vec::new()));
        // Half written, and of this network by its name.
        let half = dir.path().join("n-c3-eth0");
        fs::write(&half, "{\"kind\":").unwrap();
        assert_eq!(attachments_in(dir.path(), "n"), Err(half));
        assert_eq!(attachments_in(dir.path(), "m").unwrap().len(), 1);
    }
}
