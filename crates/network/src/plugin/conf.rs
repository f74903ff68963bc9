//! Network configurations on disk: CNI spec section 1.

use std::collections::BTreeSet;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde_json::{Map, Value};

/// Maximum size of a configuration file, bytes.
const MAX_CONF_BYTES: u64 = 1 << 20;
/// Maximum plugins of a network; bounds the processes of one attach.
const MAX_PLUGINS: usize = 32;
const EXTENSIONS: [&str; 3] = ["conflist", "conf", "json"];

#[derive(Debug, thiserror::Error)]
pub enum ConfError {
    #[error(
        "no network is configured: {0} holds no .conflist or .conf file \
         (for a single node: mkdir -p {0}; nacelled config cni > {0}/10-nacelle.conflist)", .dir.display()
    )]
    None { dir: PathBuf },
    #[error("cannot read the network configuration {}", .path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error(
        "the network configuration {} is longer than {MAX_CONF_BYTES} bytes", .path.display()
    )]
    TooLong { path: PathBuf },
    #[error("the network configuration {} is not JSON", .path.display())]
    Json { path: PathBuf, source: serde_json::Error },
    #[error("the network configuration {}: {problem}", .path.display())]
    Invalid { path: PathBuf, problem: String },
}

/// Supported versions of the CNI spec.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SpecVersion {
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl SpecVersion {
    pub const ALL: [Self; 5] =
        [Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];

    pub fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_0 => "0.3.0",
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

impl fmt::Display for SpecVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for SpecVersion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|v| v.as_str() == text).ok_or_else(|| {
            format!("cniVersion {text:?} is not one of 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0")
        })
    }
}

/// One plugin of a network.
#[derive(Debug, Clone, PartialEq)]
pub struct Plugin {
    /// Name of the binary.
    pub kind: String,
    /// Binary of the IPAM plugin, if any.
    pub ipam: Option<String>,
    /// Supported capabilities (keys of `runtimeConfig`).
    pub capabilities: BTreeSet<String>,
    /// The plugin's configuration, unchanged.
    pub conf: Map<String, Value>,
}

/// A network configuration: an ordered list of plugins.
#[derive(Debug, Clone, PartialEq)]
pub struct Network {
    pub path: PathBuf,
    pub name: String,
    pub version: SpecVersion,
    pub disable_check: bool,
    pub disable_gc: bool,
    pub plugins: Vec<Plugin>,
    /// The whole list, unchanged (a single plugin as a list of one), to be stored with a pod.
    pub source: Value,
}

impl Network {
    /// Loads the first configuration of a directory, by name. If it is invalid, that is an error:
    /// the next one could be a different network.
    pub fn load(dir: &Path) -> Result<Self, ConfError> {
        let path = first_file(dir)?;
        let read = |source| ConfError::Read { path: path.clone(), source };
        let mut text = Vec::new();
        let file = File::open(&path).map_err(read)?;
        file.take(MAX_CONF_BYTES + 1).read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_CONF_BYTES {
            return Err(ConfError::TooLong { path });
        }
        let value: Value = serde_json::from_slice(&text)
            .map_err(|source| ConfError::Json { path: path.clone(), source })?;
        // A file without "plugins" is a single plugin, whatever its extension.
        let value = match value.get("plugins") {
            None if value.is_object() => wrap(value),
            _ => value,
        };
        Self::from_value(path, value)
    }

    /// Whether GC may be run.
    pub fn supports_gc(&self) -> bool {
        self.version >= SpecVersion::V1_1_0 && !self.disable_gc
    }

    /// Parses a list, from a file or as stored with a pod.
    pub fn from_value(path: PathBuf, source: Value) -> Result<Self, ConfError> {
        match parse(&path, source) {
            Ok(network) => Ok(network),
            Err(problem) => Err(ConfError::Invalid { path, problem }),
        }
    }
}

fn first_file(dir: &Path) -> Result<PathBuf, ConfError> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == io::ErrorKind::NotFound => {
            return Err(ConfError::None { dir: dir.to_owned() });
        }
        Err(source) => return Err(ConfError::Read { path: dir.to_owned(), source }),
    };
    entries
        .filter_map(Result::ok)
        .map(|entry| entry.path())
        .filter(|path| {
            let requested = path.extension().is_some_and(|e| EXTENSIONS.iter().any(|x| e == *x));
            requested && path.is_file()
        })
        .min()
        .ok_or_else(|| ConfError::None { dir: dir.to_owned() })
}

fn wrap(plugin: Value) -> Value {
    let mut list = Map::new();
    for key in ["cniVersion", "name"] {
        if let Some(value) = plugin.get(key) {
            list.insert(key.into(), value.clone());
        }
    }
    list.insert("plugins".into(), Value::Array(vec![plugin]));
    Value::Object(list)
}

fn parse(path: &Path, source: Value) -> Result<Network, String> {
    let list = source.as_object().ok_or("it is not a JSON object")?;
    let name = list.get("name").and_then(Value::as_str).ok_or("it has no \"name\"")?;
    if !is_name(name) {
        return Err(format!(
            "the name {name:?} must start with a letter or digit and contain only these, '.', '_', '-'"
        ));
    }
    let plugins =
        list.get("plugins").and_then(Value::as_array).ok_or("\"plugins\" is not a list")?;
    if plugins.is_empty() || plugins.len() > MAX_PLUGINS {
        return Err(format!("it has {} plugins, not 1 to {MAX_PLUGINS}", plugins.len()));
    }
    Ok(Network {
        path: path.to_owned(),
        name: name.to_owned(),
        version: version(list)?,
        disable_check: flag(list, "disableCheck")?,
        disable_gc: flag(list, "disableGC")?,
        plugins: plugins
            .iter()
            .enumerate()
            .map(|(i, p)| plugin(p).map_err(|e| format!("plugin {}: {e}", i + 1)))
            .collect::<Result<_, _>>()?,
        source: source.clone(),
    })
}

/// With `cniVersions` (spec 1.1), the highest supported version is used.
fn version(list: &Map<String, Value>) -> Result<SpecVersion, String> {
    let single = match list.get("cniVersion") {
        Some(v) => Some(v.as_str().ok_or("\"cniVersion\" is not a string")?),
        None => None,
    };
    let offered = match list.get("cniVersions") {
        Some(v) => v.as_array().ok_or("\"cniVersions\" is not a list")?.as_slice(),
        None => &[],
    };
    let best = offered.iter().filter_map(Value::as_str).filter_map(|v| v.parse().ok()).max();
    match (best, single) {
        (Some(version), _) => Ok(version),
        (None, Some(text)) => text.parse(),
        (None, None) if !offered.is_empty() => {
            Err("\"cniVersions\" has none of 0.3.0, 0.3.1, 0.4.0, 1.0.0, 1.1.0".into())
        }
        (None, None) => Err("it has no \"cniVersion\" (most plugins support 1.0.0)".into()),
    }
}

fn flag(list: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match list.get(key) {
        None => Ok(false),
        Some(Value::Bool(b)) => Ok(*b),
        // Strings were accepted before spec 1.1.
        Some(Value::String(s)) if s == "true" => Ok(true),
        Some(Value::String(s)) if s == "false" => Ok(false),
        Some(other) => Err(format!("\"{key}\" is {other}, not true or false")),
    }
}

fn plugin(value: &Value) -> Result<Plugin, String> {
    let conf = value.as_object().ok_or("it is not a JSON object")?;
    let kind = conf.get("type").and_then(Value::as_str).ok_or("it has no \"type\"")?;
    check_type(kind)?;
    let ipam = match conf.get("ipam").and_then(|i| i.get("type")) {
        Some(Value::String(t)) if !t.is_empty() => {
            check_type(t)?;
            Some(t.clone())
        }
        _ => None,
    };
    let capabilities = match conf.get("capabilities") {
        Some(Value::Object(map)) => {
            map.iter().filter(|(_, v)| **v == Value::Bool(true)).map(|(k, _)| k.clone()).collect()
        }
        Some(_) => return Err("\"capabilities\" is not a JSON object".into()),
        None => BTreeSet::new(),
    };
    Ok(Plugin { kind: kind.to_owned(), ipam, capabilities, conf: conf.clone() })
}

/// Types are file names in the plugin directories.
fn check_type(kind: &str) -> Result<(), String> {
    if kind.is_empty() || kind.contains('/') || kind == "." || kind == ".." {
        return Err(format!("the type {kind:?} is not the name of a plugin"));
    }
    Ok(())
}

/// Format of network names and container ids: spec sections 1 and 2.
pub fn is_name(text: &str) -> bool {
    let mut chars = text.chars();
    chars.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && chars.all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(files: &[(&str, &str)]) -> Result<Network, String> {
        let dir = tempfile::tempdir().unwrap();
        for (name, text) in files {
            std::fs::write(dir.path().join(name), text).unwrap();
        }
        Network::load(dir.path()).map_err(|e| e.to_string())
    }

    const LIST: &str = r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"bridge"}]}"#;

    #[test]
    fn the_first_file_by_name_is_used_and_other_extensions_are_ignored() {
        let other = LIST.replace(r#""a""#, r#""b""#);
        let n = load(&[("20.conflist", LIST), ("10.conflist", &other), ("00.bak", "x")]).unwrap();
        assert_eq!(n.name, "b");
    }

    #[test]
    fn a_single_plugin_becomes_a_list_of_one() {
        let n = load(&[(
            "10.conf",
            r#"{"cniVersion":"0.3.1","name":"a","type":"bridge","ipam":{"type":"host-local"},
               "capabilities":{"mac":true,"ips":false}}"#,
        )])
        .unwrap();
        assert_eq!(n.version, SpecVersion::V0_3_1);
        assert_eq!(n.plugins[0].kind, "bridge");
        assert_eq!(n.plugins[0].ipam.as_deref(), Some("host-local"));
        assert_eq!(n.plugins[0].capabilities.iter().collect::<Vec<_>>(), ["mac"]);
        let again = Network::from_value(n.path.clone(), n.source.clone()).unwrap();
        assert_eq!(again, n);
    }

    #[test]
    fn the_highest_common_version_is_used() {
        let n = load(&[(
            "1.conflist",
            r#"{"cniVersion":"0.4.0","cniVersions":["0.4.0","1.1.0","9.0.0"],"name":"a",
               "disableGC":true,"plugins":[{"type":"x"}]}"#,
        )])
        .unwrap();
        assert_eq!(n.version, SpecVersion::V1_1_0);
        assert!(n.disable_gc && !n.disable_check);
    }

    #[test]
    fn the_error_for_an_empty_or_missing_directory_has_advice() {
        assert!(load(&[]).unwrap_err().contains("nacelled config cni"));
        let e = Network::load(Path::new("/nonexistent")).unwrap_err();
        assert!(matches!(e, ConfError::None { .. }), "{e}");
    }

    #[test]
    fn each_error_is_specific() {
        for (text, expected) in [
            ("{", "not JSON"),
            ("[]", "not a JSON object"),
            (r#"{"cniVersion":"1.0.0","plugins":[{"type":"x"}]}"#, "no \"name\""),
            (r#"{"cniVersion":"1.0.0","name":"../x","plugins":[{"type":"x"}]}"#, "must start"),
            (r#"{"name":"a","plugins":[{"type":"x"}]}"#, "no \"cniVersion\""),
            (r#"{"cniVersion":"7.0","name":"a","plugins":[{"type":"x"}]}"#, "\"7.0\" is not one"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[]}"#, "has 0 plugins"),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{}]}"#, "plugin 1: it has no \"type\""),
            (r#"{"cniVersion":"1.0.0","name":"a","plugins":[{"type":"../sh"}]}"#, "not the name"),
            (
                r#"{"cniVersion":"1.0.0","name":"a","disableGC":3,"plugins":[{"type":"x"}]}"#,
                "\"disableGC\" is 3",
            ),
        ] {
            let e = load(&[("1.conflist", text)]).unwrap_err();
            assert!(e.contains(expected) && e.contains("1.conflist"), "{text}: {e}");
        }
    }

    #[test]
    fn an_oversized_file_is_refused() {
        let text = " ".repeat(MAX_CONF_BYTES as usize + 1);
        assert!(load(&[("1.conf", &text)]).unwrap_err().contains("longer than"));
    }
}
