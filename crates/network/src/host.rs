//! Blocking implementation of [`crate::Cni`]. Steps of an attach, each undone by [`Host::detach`]:
//!
//! 1. remove the remains of an earlier incomplete attach
//! 2. write the record, then the libcni cache file
//! 3. create the network namespace
//! 4. run the plugins; add their result to the record and the cache file
//! 5. connect each interface with a tap
//!
//! Calls for one pod never run concurrently, also if the caller of the first no longer waits.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::config::Config;
use crate::default;
use crate::error::{Error, with_causes};
use crate::libcni_cache;
use crate::model::{Attachment, Pod};
use crate::netns;
use crate::nic;
use crate::observe::Observer;
use crate::plugin::chain::{AddError, Runner};
use crate::plugin::conf::{ConfError, Network};
use crate::plugin::params::{Params, check_id};
use crate::plugin::reply::Success;
use crate::plugin_lock::PluginLock;
use crate::pod_locks::PodLocks;
use crate::record::{Record, Records};
use crate::tap;

/// Prefix of the names of nacelle's network namespaces.
pub const PREFIX: &str = "nacelle-";

/// A failed step of an attach, with the number of plugins that need a DEL.
struct Failed {
    error: Error,
    reached: usize,
}

impl Failed {
    fn before(error: impl Into<Error>) -> Self {
        Self { error: error.into(), reached: 0 }
    }
}

/// Handling of the namespace if a plugin's DEL failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NetnsOnError {
    /// Keep it: DEL is retried and the plugin may need it.
    Keep,
    /// Remove it: there may be no retry.
    Take,
}

#[derive(Debug)]
pub struct Host {
    pub(crate) config: Config,
    pub(crate) runner: Runner,
    pub(crate) records: Records,
    /// Serializes calls for one pod.
    pub(crate) pods: PodLocks,
    pub(crate) plugin_lock: PluginLock,
    /// Pods attached by this process. They may be missing in a list of known pods that a caller of
    /// [`Host::collect`] made earlier.
    attached_here: Mutex<BTreeSet<String>>,
}

impl Host {
    pub fn new(config: Config, observer: Arc<dyn Observer>) -> Self {
        Self {
            runner: Runner::new(&config, observer),
            records: Records::new(&config.cache_dir),
            pods: PodLocks::default(),
            plugin_lock: PluginLock::new(Duration::from_millis(config.gc_interval_ms)),
            attached_here: Mutex::default(),
            config,
        }
    }

    pub fn netns_path(&self, id: &str) -> PathBuf {
        self.config.netns_dir.join(format!("{PREFIX}{id}"))
    }

    pub fn attach(&self, pod: &Pod) -> Result<Attachment, Error> {
        let path = self.netns_path(&pod.id);
        let params = Params::new(pod, &self.config.interface, &path)?;
        let _pod_lock = self.pods.lock(&pod.id);
        let _guard = self.plugin_lock.shared();
        if self.records.exists(&pod.id) || path.exists() {
            self.release(&pod.id, NetnsOnError::Take)?;
        }
        let network = self.network(pod.default_network)?;
        self.runner.check_binaries(&network)?;
        for capability in params.unsupported_capabilities(&network) {
            tracing::warn!(
                pod = pod.id,
                network = network.name,
                "the pod requests {capability}, but no plugin of {} has this capability",
                network.path.display()
            );
        }
        let mut record = Record { network, params, result: None };
        self.records.write(&record)?;
        self.attached_here().insert(pod.id.clone());
        self.write_cache_file(&record);
        self.attach_network(&path, &mut record, pod.native).map_err(|Failed { error, reached }| {
            let undone = self.undo_attach(&record, reached);
            self.attached_here().remove(&pod.id);
            if let Err(e) = undone {
                // Logged, as the caller gets the first error.
                tracing::warn!(
                    pod = pod.id,
                    "cannot undo a failed attach completely; garbage collection will retry: {}",
                    with_causes(&e)
                );
            }
            error
        })
    }

    fn attach_network(
        &self,
        path: &Path,
        record: &mut Record,
        native: bool,
    ) -> Result<Attachment, Failed> {
        netns::create(path).map_err(Failed::before)?;
        netns::run_in_netns(path, nic::set_up_loopback).map_err(Failed::before)?;
        let Record { network, params, .. } = &*record;
        let success = self.runner.add(network, params).map_err(|AddError { error, reached }| {
            // The failed plugin needs a DEL too.
            Failed { error: error.into(), reached: reached + 1 }
        })?;
        let all = network.plugins.len();
        let after = |error: Error| Failed { error, reached: all };
        if self.config.check_after_add {
            self.runner.check(network, params, &success.raw).map_err(|e| after(e.into()))?;
        }
        record.result = Some(success.raw.clone());
        self.records.write(record).map_err(|e| after(e.into()))?;
        self.write_cache_file(record);
        let primary = record.params.interface.as_str();
        let connect = if native { nic::describe_interfaces } else { nic::connect_taps };
        netns::run_in_netns(path, || connect(path, primary, &success)).map_err(|e| after(e.into()))
    }

    /// Undoes a failed attach. The namespace is removed in any case, as no process runs in it; the
    /// record is kept if a DEL failed.
    fn undo_attach(&self, record: &Record, reached: usize) -> Result<(), Error> {
        let Record { network, params, result } = record;
        let mut errors: Vec<Error> = self
            .runner
            .del(network, params, result.as_ref(), reached)
            .into_iter()
            .map(Error::from)
            .collect();
        if errors.is_empty() {
            errors.extend(self.remove_records(record).err());
        }
        errors.extend(netns::remove(&params.netns).err().map(Error::from));
        Error::all(errors)
    }

    /// Removes cache file and record, after all DELs succeeded.
    fn remove_records(&self, record: &Record) -> Result<(), Error> {
        let dir = &self.config.results_dir;
        libcni_cache::remove(dir, record)
            .map_err(|source| Error::Results { dir: dir.clone(), source })?;
        Ok(self.records.remove(&record.params.container_id)?)
    }

    /// Writes the libcni cache file. A failure is logged only.
    pub(crate) fn write_cache_file(&self, record: &Record) {
        let dir = &self.config.results_dir;
        if let Err(e) = libcni_cache::write(dir, record) {
            tracing::warn!(
                pod = record.params.container_id,
                "cannot write to {}; the GC of another runtime may free the pod's address: {e}",
                dir.display()
            );
        }
    }

    pub fn open_taps(&self, id: &str, interfaces: &[String]) -> Result<Vec<OwnedFd>, Error> {
        check_id(id)?;
        let path = self.netns_path(id);
        Ok(netns::run_in_netns(&path, || nic::open_taps(interfaces))?)
    }

    pub fn detach(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        let _pod_lock = self.pods.lock(id);
        let _guard = self.plugin_lock.shared();
        self.release(id, NetnsOnError::Keep)?;
        self.attached_here().remove(id);
        Ok(())
    }

    /// Detaches a pod. If a plugin fails, the others run anyway and the record is kept for a retry;
    /// `netns_on_error` decides about the namespace.
    pub(crate) fn release(&self, id: &str, netns_on_error: NetnsOnError) -> Result<(), Error> {
        let path = self.netns_path(id);
        let mut errors: Vec<Error> = Vec::new();
        if path.exists() && !netns::is_mounted(&path) {
            // An interrupted creation, or a reboot with a persistent /run.
            errors.extend(netns::remove(&path).err().map(Error::from));
        }
        let mut damaged = false;
        let record = match self.records.read(id) {
            Ok(record) => record,
            Err(e) => {
                tracing::warn!(
                    pod = id,
                    "{}; using the current network configuration",
                    with_causes(&e)
                );
                damaged = true;
                Some(self.record_from_config(id, &path)?)
            }
        };
        let mut del_failed = false;
        if let Some(Record { network, params, result }) = &record {
            let count = network.plugins.len();
            let failed = self.runner.del(network, params, result.as_ref(), count);
            del_failed = !failed.is_empty();
            errors.extend(failed.into_iter().map(Error::from));
        }
        if !del_failed || netns_on_error == NetnsOnError::Take {
            errors.extend(netns::remove(&path).err().map(Error::from));
        }
        if errors.is_empty() && damaged {
            let dir = &self.config.results_dir;
            let removed = libcni_cache::remove_by_id(dir, id, &path);
            errors.extend(removed.err().map(|source| Error::Results { dir: dir.clone(), source }));
        }
        if errors.is_empty() {
            errors.extend(match &record {
                _ if damaged => self.records.move_to_damaged(id).err().map(Error::from),
                Some(record) => self.remove_records(record).err(),
                None => self.records.remove(id).err().map(Error::from),
            });
        }
        Error::all(errors)
    }

    /// The host's network; where none is configured and `default` is set, the built-in one.
    fn network(&self, default: bool) -> Result<Network, ConfError> {
        match Network::load(&self.config.conf_dir) {
            Err(ConfError::None { .. }) if default => default::built_in(),
            loaded => loaded,
        }
    }

    fn record_from_config(&self, id: &str, path: &Path) -> Result<Record, Error> {
        // Only libcni's cache knows that the pod was on the built-in network; it may be missing or
        // disabled. Then the pod was on the configured network, if there is one. DEL is idempotent.
        let dir = &self.config.results_dir;
        let network = if libcni_cache::is_cached(dir, default::BUILT_IN_NAME, id, path) {
            default::built_in()
        } else {
            self.network(true)
        };
        Ok(Record {
            network: network?,
            params: Params::from_id(id, &self.config.interface, path)?,
            result: None,
        })
    }

    /// Checks the connections of the taps and runs the plugins' CHECK.
    pub fn check(&self, id: &str, attachment: &Attachment) -> Result<(), Error> {
        check_id(id)?;
        let path = self.netns_path(id);
        netns::run_in_netns(&path, || nic::check(&attachment.interfaces))?;
        let unattached = || Error::Unattached { id: id.to_owned() };
        let record = self.records.read(id)?.ok_or_else(unattached)?;
        let result = record.result.as_ref().ok_or_else(unattached)?;
        Success::from_value(result.clone()).map_err(|problem| Error::Result { problem })?;
        Ok(self.runner.check(&record.network, &record.params, result)?)
    }

    /// Descriptions of damaged records.
    pub fn damaged(&self) -> Vec<String> {
        match self.records.damaged() {
            Ok(damaged) => damaged.iter().map(|e| with_causes(e)).collect(),
            Err(e) => vec![with_causes(&e)],
        }
    }

    /// Whether the host has a CNI configuration, valid or not.
    pub fn is_configured(&self) -> bool {
        !matches!(Network::load(&self.config.conf_dir), Err(ConfError::None { .. }))
    }

    /// The reason why pods cannot be attached, if there is one; with `default`, pods that may be
    /// attached to the built-in network.
    pub fn trouble(&self, default: bool) -> Option<String> {
        if let Some(trouble) = tap::trouble() {
            return Some(trouble);
        }
        let network = match self.network(default) {
            Ok(network) => network,
            Err(e) => return Some(with_causes(&e)),
        };
        self.runner
            .check_binaries(&network)
            .and_then(|()| self.runner.check_versions(&network))
            .and_then(|()| self.runner.status(&network))
            .err()
            .map(|e| with_causes(&e))
    }

    pub(crate) fn attached_here(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.attached_here.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operation_during_shutdown_is_not_reported_as_a_panic() {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let ended = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let handle = ended.handle().clone();
        drop(ended);
        let error = runtime.block_on(handle.spawn_blocking(|| ())).unwrap_err();
        assert!(matches!(Error::from(error), Error::ShuttingDown));
        let panicking = runtime.spawn_blocking(|| panic!("expected by the test"));
        let error = runtime.block_on(panicking).unwrap_err();
        assert!(matches!(Error::from(error), Error::Panicked));
    }
}
