//! nacelled's configuration: a TOML file, and a few values that flags and environment variables
//! override. [`TEMPLATE`] documents all settings; a test compares it with the defaults.

mod listen;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use listen::{Listen, ListenError};

/// Every setting with its default and a comment; printed by `nacelled config default`.
pub const TEMPLATE: &str = include_str!("settings.toml");
pub const DEFAULT_PATH: &str = "/etc/nacelle/config.toml";
pub const SOCKET_NAME: &str = "nacelled.sock";

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    pub root: PathBuf,
    pub state: PathBuf,
    /// Empty: in the state directory.
    pub socket: PathBuf,
    pub vmm: PathBuf,
    pub kernel: PathBuf,
    pub initramfs: PathBuf,
    pub log: Log,
    pub pods: sandbox::Config,
    pub cri: cri::Config,
    pub streaming: cri::Streaming,
    pub network: network::Config,
    pub images: image::Config,
    pub metrics: Metrics,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Log {
    /// tracing-subscriber's EnvFilter, e.g. `info,sandbox=debug`.
    pub level: String,
    pub format: LogFormat,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Metrics {
    pub listen: Listen,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum LogFormat {
    Text,
    Json,
}

/// Keys of sections that are set at the top of the file only.
const DERIVED: [(&str, &str, &str); 7] = [
    ("pods", "root", "root"),
    ("pods", "state", "state"),
    ("pods", "vmm", "vmm"),
    ("pods", "kernel", "kernel"),
    ("pods", "initramfs", "initramfs"),
    ("pods", "launcher", ""),
    ("images", "root", "root"),
];

#[derive(Debug, thiserror::Error)]
pub enum SettingsError {
    #[error("cannot read {}: {source}", path.display())]
    Read { path: PathBuf, source: std::io::Error },
    #[error("{}: {message}", path.display())]
    Parse { path: PathBuf, message: String },
    #[error("{}: [{section}] {key} is set at the top of the file, as `{instead}`", path.display())]
    Derived { path: PathBuf, section: String, key: String, instead: String },
}

/// Values from flags and environment variables.
#[derive(Debug, Default, Clone)]
pub struct Overrides {
    pub root: Option<PathBuf>,
    pub state: Option<PathBuf>,
    pub socket: Option<PathBuf>,
    pub cni_conf_dir: Option<PathBuf>,
    pub log_level: Option<String>,
    pub metrics_listen: Option<Listen>,
}

impl Default for Settings {
    fn default() -> Self {
        let pods = sandbox::Config::default();
        let mut settings = Self {
            root: pods.root.clone(),
            state: pods.state.clone(),
            socket: PathBuf::new(),
            vmm: pods.vmm.clone(),
            kernel: pods.kernel.clone(),
            initramfs: pods.initramfs.clone(),
            log: Log::default(),
            pods,
            cri: cri::Config::default(),
            streaming: cri::Streaming::default(),
            network: network::Config { cache_dir: PathBuf::new(), ..network::Config::default() },
            images: image::Config::default(),
            metrics: Metrics::default(),
        };
        settings.derive();
        settings
    }
}

impl Default for Log {
    fn default() -> Self {
        Self { level: "info".into(), format: LogFormat::Text }
    }
}

impl Settings {
    /// Reads a file and applies the overrides. Only the default file may be missing.
    pub fn load(path: Option<&Path>, overrides: &Overrides) -> Result<Self, SettingsError> {
        let file = path.unwrap_or(Path::new(DEFAULT_PATH));
        let text = match std::fs::read_to_string(file) {
            Ok(text) => text,
            Err(error) if path.is_none() && error.kind() == std::io::ErrorKind::NotFound => {
                String::new()
            }
            Err(source) => return Err(SettingsError::Read { path: file.to_owned(), source }),
        };
        Self::parse(&text, file, overrides)
    }

    pub fn parse(text: &str, path: &Path, overrides: &Overrides) -> Result<Self, SettingsError> {
        let wrong = |error: toml::de::Error| SettingsError::Parse {
            path: path.to_owned(),
            message: error.to_string(),
        };
        let table: toml::Table = text.parse().map_err(wrong)?;
        for (section, key, instead) in DERIVED {
            let given = table.get(section).and_then(|value| value.get(key));
            if given.is_some() {
                return Err(SettingsError::Derived {
                    path: path.to_owned(),
                    section: section.into(),
                    key: key.into(),
                    instead: if instead.is_empty() {
                        "nothing: it cannot be changed".into()
                    } else {
                        instead.into()
                    },
                });
            }
        }
        // The defaults derive these from other settings, which the file may have changed.
        let cache_given = table.get("network").and_then(|v| v.get("cache_dir")).is_some();
        let socket_given = table.contains_key("socket");
        let mut settings: Self = toml::from_str(text).map_err(wrong)?;
        if !cache_given {
            settings.network.cache_dir = PathBuf::new();
        }
        if !socket_given {
            settings.socket = PathBuf::new();
        }
        let put = |place: &mut PathBuf, value: &Option<PathBuf>| {
            if let Some(value) = value {
                place.clone_from(value);
            }
        };
        put(&mut settings.root, &overrides.root);
        put(&mut settings.state, &overrides.state);
        put(&mut settings.socket, &overrides.socket);
        put(&mut settings.network.conf_dir, &overrides.cni_conf_dir);
        if let Some(level) = &overrides.log_level {
            settings.log.level.clone_from(level);
        }
        if let Some(listen) = &overrides.metrics_listen {
            settings.metrics.listen.clone_from(listen);
        }
        settings.derive();
        Ok(settings)
    }

    fn derive(&mut self) {
        if self.socket.as_os_str().is_empty() {
            self.socket = self.state.join(SOCKET_NAME);
        }
        if self.network.cache_dir.as_os_str().is_empty() {
            self.network.cache_dir = self.root.join("network");
        }
        self.pods.root.clone_from(&self.root);
        self.pods.state.clone_from(&self.state);
        self.pods.vmm.clone_from(&self.vmm);
        self.pods.kernel.clone_from(&self.kernel);
        self.pods.initramfs.clone_from(&self.initramfs);
        self.images.root.clone_from(&self.root);
    }

    /// The first missing file that pods need, with how to provide it.
    pub fn missing_files(&self) -> Option<String> {
        [
            ("vmm", &self.vmm, "install nacelle-vmm"),
            (
                "kernel",
                &self.kernel,
                "build it with `make guest-kernel` and install it with `make install`",
            ),
            (
                "initramfs",
                &self.initramfs,
                "build it with `make guest-image` and install it with `make install`",
            ),
        ]
        .into_iter()
        .find(|(_, path, _)| !path.is_file())
        .map(|(key, path, advice)| {
            format!(
                "{key}: {} does not exist: {advice}, or set `{key}` in the configuration",
                path.display()
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Settings, SettingsError> {
        Settings::parse(text, Path::new("test.toml"), &Overrides::default())
    }

    #[test]
    fn the_template_has_the_defaults() {
        assert_eq!(parse(TEMPLATE).unwrap(), Settings::default());
        assert_eq!(parse("").unwrap(), Settings::default());
    }

    /// Path of each setting, e.g. `pods.max_pods`.
    fn keys(value: &serde_json::Value, prefix: &str, found: &mut Vec<String>) {
        match value {
            serde_json::Value::Object(members) if !members.is_empty() => {
                for (name, member) in members {
                    let path =
                        if prefix.is_empty() { name.clone() } else { format!("{prefix}.{name}") };
                    keys(member, &path, found);
                }
            }
            _ => found.push(prefix.to_string()),
        }
    }

    #[test]
    fn every_setting_is_in_the_template() {
        let mut all = Vec::new();
        keys(&serde_json::to_value(Settings::default()).unwrap(), "", &mut all);
        assert!(all.len() > 30, "{all:?}");
        let mut section = "";
        let mut written = Vec::new();
        for line in TEMPLATE.lines() {
            let line = line.trim_start_matches("# ");
            if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
                section = name;
                written.push(name.to_string());
            } else if let Some((key, _)) = line.split_once(" = ") {
                let dot = if section.is_empty() { "" } else { "." };
                written.push(format!("{section}{dot}{key}"));
            }
        }
        for key in &all {
            let derived = DERIVED
                .iter()
                .any(|(section, name, _)| key.starts_with(&format!("{section}.{name}")));
            assert!(derived || written.contains(key), "{key} is not in the template");
        }
    }

    #[test]
    fn sections_derive_from_the_top_of_the_file_and_flags_override_both() {
        let settings = parse("root = \"/r\"\nstate = \"/s\"\nvmm = \"/v\"").unwrap();
        assert_eq!(settings.pods.root, Path::new("/r"));
        assert_eq!(settings.images.root, Path::new("/r"));
        assert_eq!(settings.network.cache_dir, Path::new("/r/network"));
        assert_eq!(settings.socket, Path::new("/s/nacelled.sock"));
        assert_eq!(settings.pods.vmm, Path::new("/v"));
        let overrides = Overrides { root: Some("/o".into()), ..Default::default() };
        let settings =
            Settings::parse("root = \"/r\"", Path::new("test.toml"), &overrides).unwrap();
        assert_eq!(settings.pods.root, Path::new("/o"));
        let overrides = Overrides { metrics_listen: Some(Listen::Off), ..Default::default() };
        let text = "[metrics]\nlisten = \"127.0.0.1:9750\"";
        let settings = Settings::parse(text, Path::new("test.toml"), &overrides).unwrap();
        assert_eq!(settings.metrics.listen, Listen::Off);
        assert!(matches!(parse(text).unwrap().metrics.listen, Listen::Tcp(_)));
    }

    #[test]
    fn a_wrong_key_is_named() {
        let text = parse("rooot = \"/r\"").unwrap_err().to_string();
        assert!(text.contains("rooot") && text.contains("test.toml"), "{text}");
        let text = parse("[pods]\nroot = \"/r\"").unwrap_err().to_string();
        assert!(text.contains("[pods] root"), "{text}");
        assert!(parse("[pods]\ndefault_vcpus = \"two\"").is_err());
        let text = parse("[metrics]\nlisten = \"0.0.0.0:9750\"").unwrap_err().to_string();
        assert!(text.contains("listen") && text.contains("not a loopback address"), "{text}");
    }
}
