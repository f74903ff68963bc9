//! Garbage collection: first the networks of removed pods, by their records, then the plugins' GC
//! (CNI spec 1.1, sections 2 and 4).
//!
//! A plugin frees every attachment that is not in the list it gets. So the list has every pod that
//! may exist, and if that is not known, GC is not run. The spec forbids ADD and DEL during GC,
//! which could free a new address.

use std::collections::BTreeSet;

use crate::error::{Error, with_causes};
use crate::host::{Host, NetnsOnError};
use crate::libcni_cache;
use crate::plugin::conf::{ConfError, Network};
use crate::plugin::params::check_id;

impl Host {
    /// Removes the networks of pods that are not in `known`, then runs the plugins' GC. The records
    /// decide which networks are nacelle's, as a namespace with the prefix may belong to another
    /// daemon.
    pub fn collect(&self, known: &[String]) -> Result<(), Error> {
        let mut errors: Vec<Error> = Vec::new();
        for damaged in self.damaged() {
            tracing::error!(damaged, "the pod keeps its network until it is removed");
        }
        match self.records.ids() {
            Ok(ids) => {
                errors.extend(ids.iter().filter_map(|id| self.collect_pod(id, known).err()));
                ids.iter().for_each(|id| self.restore_cache_file(id));
            }
            Err(e) => errors.push(e.into()),
        }
        errors.extend(self.run_gc(Some(known)));
        Error::all(errors)
    }

    fn collect_pod(&self, id: &str, known: &[String]) -> Result<(), Error> {
        // Locked: the pod is in use.
        let Some(_pod_lock) = self.pods.try_lock(id) else { return Ok(()) };
        // A file with another name is not a record.
        if known.iter().any(|k| k == id)
            || self.attached_here().contains(id)
            || check_id(id).is_err()
        {
            return Ok(());
        }
        tracing::info!(pod = id, "removing the network of a pod that does not exist");
        let _guard = self.plugin_lock.shared();
        self.release(id, NetnsOnError::Take)
    }

    /// Writes a missing libcni cache file: of a pod of an earlier release, or after the directory
    /// was cleared.
    fn restore_cache_file(&self, id: &str) {
        let Some(_pod_lock) = self.pods.try_lock(id) else { return };
        if let Ok(Some(record)) = self.records.read(id)
            && !libcni_cache::exists(&self.config.results_dir, &record)
        {
            self.write_cache_file(&record);
        }
    }

    /// Whether a GC after a detach is due.
    pub fn is_gc_due(&self) -> bool {
        self.plugin_lock.is_due()
    }

    /// Runs the plugins' GC only. All pods with a record are kept.
    pub fn gc(&self) {
        for error in self.run_gc(None) {
            tracing::warn!("CNI garbage collection: {}", with_causes(&error));
        }
    }

    fn run_gc(&self, known: Option<&[String]>) -> Vec<Error> {
        // This is the retry; it may be postponed again below.
        self.plugin_lock.postpone(false);
        let network = match Network::load(&self.config.conf_dir) {
            Ok(network) if network.supports_gc() => network,
            Ok(_) | Err(ConfError::None { .. }) => return Vec::new(),
            Err(e) => return vec![e.into()],
        };
        let Some(permit) = self.plugin_lock.exclusive() else {
            tracing::debug!("CNI GC is postponed because pods are being attached or detached");
            self.plugin_lock.postpone(true);
            return Vec::new();
        };
        let valid = match self.valid_attachments(&network, known) {
            Ok(valid) => valid,
            Err(e) => return vec![e],
        };
        let collected = self.runner.gc(&network, &valid, &|| permit.must_stop());
        self.plugin_lock.postpone(collected.stopped);
        if collected.stopped {
            tracing::warn!("CNI GC was stopped for a waiting pod and is retried later");
        }
        collected.errors.into_iter().map(Error::from).collect()
    }

    /// Container ids and interfaces of all pods that may be on the network.
    fn valid_attachments(
        &self,
        network: &Network,
        known: Option<&[String]>,
    ) -> Result<Vec<(String, String)>, Error> {
        let mut valid = BTreeSet::new();
        let attached_here: Vec<String> = self.attached_here().iter().cloned().collect();
        let is_known =
            |id: &String| known.is_none_or(|k| k.contains(id)) || attached_here.contains(id);
        for id in self.records.ids()?.into_iter().filter(is_known) {
            // A damaged record counts as a pod.
            let interface = match self.records.read(&id) {
                Ok(Some(record)) => record.params.interface,
                _ => self.config.interface.clone(),
            };
            valid.insert((id, interface));
        }
        for id in known.unwrap_or_default().iter().chain(&attached_here) {
            valid.insert((id.clone(), self.config.interface.clone()));
        }
        // Other runtimes may use the same network. nacelle's own pods are already listed by their
        // records.
        let peers = libcni_cache::attachments(&self.config.results_dir, &network.name);
        let peers = peers.map_err(|path| Error::IncompletePodList {
            problem: format!("{} cannot be read", path.display()),
        })?;
        valid.extend(peers.into_iter().filter(|(id, _)| !self.records.exists(id)));
        Ok(valid.into_iter().collect())
    }
}
