//! Operations on a network with its chain of plugins: CNI spec sections 3 and 4. ADD runs the
//! plugins in order and passes each result to the next; DEL runs them in reverse and continues
//! after failures.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Instant, SystemTime};

use serde_json::{Map, Value, json};

use super::conf::{Network, Plugin, SpecVersion};
use super::error::{PluginError, Verb};
use super::exec::{ExecError, Invocation, Output, format_output};
use super::params::Params;
use super::reply::{Failure, Success, Versions, code};
use crate::config::Config;
use crate::observe::{Observer, Outcome, PluginRun};

/// A failed ADD. The plugins up to and including index `reached` need a DEL.
#[derive(Debug)]
pub struct AddError {
    pub error: PluginError,
    pub reached: usize,
}

/// Result of a GC.
#[derive(Debug, Default)]
pub struct GcOutcome {
    pub errors: Vec<PluginError>,
    /// The GC was stopped before all plugins have run.
    pub stopped: bool,
}

/// Runs plugins.
#[derive(Debug)]
pub struct Runner {
    observer: Arc<dyn Observer>,
    bin_dirs: Vec<PathBuf>,
    timeout: std::time::Duration,
    output_limit: usize,
    versions: Mutex<HashMap<PathBuf, (SystemTime, Vec<String>)>>,
}

impl Runner {
    pub fn new(config: &Config, observer: Arc<dyn Observer>) -> Self {
        Self {
            observer,
            bin_dirs: config.bin_dirs.clone(),
            timeout: config.plugin_timeout(),
            output_limit: config.plugin_output_limit,
            versions: Mutex::default(),
        }
    }

    /// Checks that all plugin binaries exist, before the first one runs.
    pub fn check_binaries(&self, network: &Network) -> Result<(), PluginError> {
        for plugin in &network.plugins {
            for kind in std::iter::once(&plugin.kind).chain(&plugin.ipam) {
                self.find(network, kind)?;
            }
        }
        Ok(())
    }

    pub fn add(&self, network: &Network, params: &Params) -> Result<Success, AddError> {
        let mut previous: Option<Success> = None;
        for (reached, plugin) in network.plugins.iter().enumerate() {
            let prev = previous.as_ref().map(|s| &s.raw);
            let added = self.measured(plugin, Verb::Add, || {
                self.call(network, plugin, Verb::Add, Some(params), prev, Map::new())
                    .and_then(|output| parse(plugin, Verb::Add, &output))
            });
            let mut result = added.map_err(|error| AddError { error, reached })?;
            if let Value::Object(raw) = &mut result.raw {
                raw.entry("cniVersion").or_insert_with(|| network.version.as_str().into());
            }
            previous = Some(result);
        }
        previous.ok_or_else(|| unreachable!("a network has at least one plugin"))
    }

    /// Runs DEL of the first `count` plugins in reverse order; returns all errors.
    pub fn del(
        &self,
        network: &Network,
        params: &Params,
        result: Option<&Value>,
        count: usize,
    ) -> Vec<PluginError> {
        // Section 3, DEL: prevResult is passed since 0.4.0.
        let result = result.filter(|_| network.version >= SpecVersion::V0_4_0);
        network.plugins[..count.min(network.plugins.len())]
            .iter()
            .rev()
            .filter_map(|plugin| {
                let deleted = self.measured(plugin, Verb::Del, || {
                    match self.call(network, plugin, Verb::Del, Some(params), result, Map::new()) {
                        Err(PluginError::Failed { failure, .. })
                            if failure.code == code::UNKNOWN_CONTAINER =>
                        {
                            Ok(())
                        }
                        other => other.map(drop),
                    }
                });
                deleted.err()
            })
            .collect()
    }

    /// Runs CHECK. Does nothing before 0.4.0 or with disableCheck.
    pub fn check(
        &self,
        network: &Network,
        params: &Params,
        result: &Value,
    ) -> Result<(), PluginError> {
        if network.disable_check || network.version < SpecVersion::V0_4_0 {
            return Ok(());
        }
        for plugin in &network.plugins {
            self.measured(plugin, Verb::Check, || {
                self.call(network, plugin, Verb::Check, Some(params), Some(result), Map::new())
            })?;
        }
        Ok(())
    }

    /// Runs GC with the valid (container id, interface) pairs. Does nothing before 1.1.0 or with
    /// disableGC. Stops when `should_stop` returns true.
    pub fn gc(
        &self,
        network: &Network,
        valid: &[(String, String)],
        should_stop: &dyn Fn() -> bool,
    ) -> GcOutcome {
        let mut collected = GcOutcome::default();
        if !network.supports_gc() {
            return collected;
        }
        let valid: Vec<Value> = valid
            .iter()
            .map(|(id, interface)| json!({"containerID": id, "ifname": interface}))
            .collect();
        let mut extra = Map::new();
        // libcni passes both keys; the second is from drafts of 1.1.
        for key in ["cni.dev/valid-attachments", "cni.dev/attachments"] {
            extra.insert(key.into(), valid.clone().into());
        }
        for plugin in &network.plugins {
            let stdin = request(network, plugin, Verb::Gc, None, None, extra.clone());
            let ran = self.measured(plugin, Verb::Gc, || {
                self.run(network, plugin, Verb::Gc, None, &stdin, Some(should_stop))
            });
            match ran {
                Ok(_) => {}
                Err(PluginError::Exec { source: ExecError::Interrupted { .. }, .. }) => {
                    collected.stopped = true;
                    break;
                }
                Err(e) => collected.errors.push(e),
            }
        }
        collected
    }

    /// Runs STATUS. Does nothing before 1.1.0.
    pub fn status(&self, network: &Network) -> Result<(), PluginError> {
        if network.version < SpecVersion::V1_1_0 {
            return Ok(());
        }
        for plugin in &network.plugins {
            self.call(network, plugin, Verb::Status, None, None, Map::new())?;
        }
        Ok(())
    }

    /// Checks with VERSION (cached for each binary) whether each plugin supports the network's
    /// version.
    pub fn check_versions(&self, network: &Network) -> Result<(), PluginError> {
        for plugin in &network.plugins {
            let binary = self.find(network, &plugin.kind)?;
            let supported = self.versions(network, plugin, &binary)?;
            if !supported.iter().any(|v| v == network.version.as_str()) {
                return Err(PluginError::Version {
                    kind: plugin.kind.clone(),
                    binary,
                    version: network.version,
                    supported,
                });
            }
        }
        Ok(())
    }

    fn versions(
        &self,
        network: &Network,
        plugin: &Plugin,
        binary: &Path,
    ) -> Result<Vec<String>, PluginError> {
        let changed =
            binary.metadata().and_then(|m| m.modified()).unwrap_or(SystemTime::UNIX_EPOCH);
        let known = self.versions.lock().unwrap_or_else(|e| e.into_inner()).get(binary).cloned();
        if let Some((when, versions)) = known
            && when == changed
        {
            return Ok(versions);
        }
        let output = self.call(network, plugin, Verb::Version, None, None, Map::new())?;
        let versions: Versions =
            serde_json::from_slice(&output.stdout).map_err(|e| PluginError::InvalidReply {
                kind: plugin.kind.clone(),
                verb: Verb::Version,
                problem: e.to_string(),
            })?;
        let mut cache = self.versions.lock().unwrap_or_else(|e| e.into_inner());
        cache.insert(binary.to_owned(), (changed, versions.supported.clone()));
        Ok(versions.supported)
    }

    fn find(&self, network: &Network, kind: &str) -> Result<PathBuf, PluginError> {
        self.bin_dirs.iter().map(|dir| dir.join(kind)).find(|path| path.is_file()).ok_or_else(
            || PluginError::Missing {
                network: network.name.clone(),
                kind: kind.to_owned(),
                searched: self.bin_dirs.clone(),
            },
        )
    }

    fn measured<T>(
        &self,
        plugin: &Plugin,
        verb: Verb,
        run: impl FnOnce() -> Result<T, PluginError>,
    ) -> Result<T, PluginError> {
        let began = Instant::now();
        let result = run();
        let (outcome, took) = (Outcome::of(&result), began.elapsed());
        self.observer.plugin_ran(PluginRun { plugin: &plugin.kind, verb, outcome, took });
        result
    }

    fn call(
        &self,
        network: &Network,
        plugin: &Plugin,
        verb: Verb,
        params: Option<&Params>,
        previous: Option<&Value>,
        extra: Map<String, Value>,
    ) -> Result<Output, PluginError> {
        let stdin = request(network, plugin, verb, params, previous, extra);
        self.run(network, plugin, verb, params, &stdin, None)
    }

    fn run(
        &self,
        network: &Network,
        plugin: &Plugin,
        verb: Verb,
        params: Option<&Params>,
        stdin: &[u8],
        should_stop: Option<&dyn Fn() -> bool>,
    ) -> Result<Output, PluginError> {
        let binary = self.find(network, &plugin.kind)?;
        let dirs = std::env::join_paths(&self.bin_dirs).unwrap_or_default();
        let mut env = vec![("CNI_COMMAND", verb.as_str().into()), ("CNI_PATH", dirs)];
        if let Some(params) = params {
            env.push(("CNI_CONTAINERID", (&params.container_id).into()));
            env.push(("CNI_IFNAME", (&params.interface).into()));
            env.push(("CNI_ARGS", params.args().into()));
            // Empty in DEL if the namespace no longer exists, for example after a reboot.
            let netns = if verb == Verb::Del && !params.netns.exists() {
                Path::new("")
            } else {
                &params.netns
            };
            env.push(("CNI_NETNS", netns.into()));
        }
        let output = Invocation {
            binary: &binary,
            env,
            stdin,
            timeout: self.timeout,
            should_stop,
            output_limit: self.output_limit,
        }
        .run()
        .map_err(|source| PluginError::Exec { kind: plugin.kind.clone(), verb, source })?;
        if output.status.success() {
            return Ok(output);
        }
        let (kind, output_text) = (plugin.kind.clone(), format_output(&output.stderr));
        Err(match Failure::parse(&output.stdout) {
            Some(failure) => PluginError::Failed { kind, verb, failure, output: output_text },
            None if output.stdout.iter().all(u8::is_ascii_whitespace) => {
                PluginError::NoMessage { kind, verb, status: output.status, output: output_text }
            }
            None => PluginError::InvalidReply {
                kind,
                verb,
                problem: format!(
                    "{}, and its output is not a CNI error{}{}",
                    output.status,
                    format_output(&output.stdout),
                    output_text,
                ),
            },
        })
    }
}

fn parse(plugin: &Plugin, verb: Verb, output: &Output) -> Result<Success, PluginError> {
    Success::parse(&output.stdout).map_err(|problem| PluginError::InvalidReply {
        kind: plugin.kind.clone(),
        verb,
        problem: format!("{problem}{}", format_output(&output.stdout)),
    })
}

/// Section 4, "Deriving request configuration from plugin configuration".
fn request(
    network: &Network,
    plugin: &Plugin,
    verb: Verb,
    params: Option<&Params>,
    previous: Option<&Value>,
    extra: Map<String, Value>,
) -> Vec<u8> {
    let version = network.version.as_str();
    if verb == Verb::Version {
        return json!({ "cniVersion": version }).to_string().into_bytes();
    }
    let mut conf = plugin.conf.clone();
    for key in ["capabilities", "runtimeConfig", "prevResult"] {
        conf.remove(key);
    }
    conf.insert("cniVersion".into(), version.into());
    conf.insert("name".into(), network.name.as_str().into());
    if let Some(params) = params {
        let requested: Map<String, Value> = params
            .runtime
            .iter()
            .filter(|(key, _)| plugin.capabilities.contains(*key))
            .map(|(key, value)| (key.clone(), value.clone()))
            .collect();
        if !requested.is_empty() {
            conf.insert("runtimeConfig".into(), requested.into());
        }
    }
    if let Some(previous) = previous {
        conf.insert("prevResult".into(), previous.clone());
    }
    conf.extend(extra);
    Value::Object(conf).to_string().into_bytes()
}
