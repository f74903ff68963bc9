//! Pods that other runtimes of this host have on the same network. A plugin's GC frees everything
//! that it is not told of, so it must be told of them too. The reference library, which containerd,
//! CRI-O and Podman use, keeps a file for each attachment here.

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

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

/// Container ids and interfaces of the others on that network.
pub fn attachments(network: &str) -> Vec<(String, String)> {
    attachments_in(Path::new(RESULTS), network)
}

fn attachments_in(dir: &Path, network: &str) -> Vec<(String, String)> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter_map(|entry| {
            let mut bytes = Vec::new();
            File::open(entry.path()).ok()?.take(MAX_BYTES).read_to_end(&mut bytes).ok()?;
            let cached: Cached = serde_json::from_slice(&bytes).ok()?;
            (cached.kind == KIND && cached.network_name == network)
                .then_some((cached.container_id, cached.if_name))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attachments_of_the_same_network_are_found_and_rubbish_is_passed_over() {
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
        assert_eq!(attachments_in(dir.path(), "n"), [("c1".to_owned(), "eth0".to_owned())]);
        assert_eq!(attachments_in(Path::new("/nonexistent"), "n"), []);
    }
}
