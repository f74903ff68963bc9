//! The work itself, blocking. The order of an attach, each step undone by [`Host::detach`]:
//!
//! 1. what an earlier, half-done attach left is taken away
//! 2. the record of what the pod will be given is written, then the file for other runtimes
//! 3. the network namespace is made
//! 4. the plugins run; the record and the file get their result
//! 5. each interface is joined to a tap
//!
//! Two calls for one pod never overlap, also when the caller of the first has given up waiting.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::alone::Queue;
use crate::config::Config;
use crate::default;
use crate::garbage::Turns;
use crate::model::{Attachment, Pod};
use crate::netns::{self, NetnsError};
use crate::nic::{self, NicError};
use crate::peers;
use crate::plugin::chain::{AddError, PluginError, Runner};
use crate::plugin::conf::{ConfError, Network};
use crate::plugin::params::{Params, PodError, check_id};
use crate::plugin::reply::Success;
use crate::record::{Record, RecordError, Records};
use crate::tap;

/// Tells people which namespaces are pods of ours.
pub const PREFIX: &str = "nacelle-";

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error(transparent)]
    Pod(#[from] PodError),
    #[error(transparent)]
    Conf(#[from] ConfError),
    #[error(transparent)]
    Plugin(#[from] PluginError),
    #[error(transparent)]
    Netns(#[from] NetnsError),
    #[error(transparent)]
    Nic(#[from] NicError),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("plugins collect no garbage now, the pods of the network are not all known: {problem}")]
    Unsure { problem: String },
    #[error("the plugins' stored result is damaged: {problem}")]
    Result { problem: String },
    #[error("cannot take back what tells other runtimes of the pod in {}", .dir.display())]
    Results { dir: PathBuf, source: std::io::Error },
    #[error("the pod {id} is not attached to a network")]
    Unattached { id: String },
    /// A clean-up goes on past failures; these are all of them.
    #[error("{}", join(.0))]
    Several(Vec<Error>),
    #[error("the worker thread of a network operation panicked")]
    Panicked,
}

impl Error {
    /// The same call may go well later, without anybody changing anything.
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Plugin(e) => e.is_passing(),
            Self::Several(all) => all.iter().all(Self::is_passing),
            _ => false,
        }
    }

    pub(crate) fn all(mut errors: Vec<Error>) -> Result<(), Error> {
        match errors.len() {
            0 => Ok(()),
            1 => Err(errors.remove(0)),
            _ => Err(Self::Several(errors)),
        }
    }
}

fn join(errors: &[Error]) -> String {
    errors.iter().map(|e| with_causes(e)).collect::<Vec<_>>().join("; and ")
}

/// An error and what it came from, on one line.
pub fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}

/// A step of an attach that failed, and how many plugins have to be undone.
struct Failed {
    error: Error,
    reached: usize,
}

impl Failed {
    fn before(error: impl Into<Error>) -> Self {
        Self { error: error.into(), reached: 0 }
    }
}

/// What becomes of the namespace when a plugin did not take back what it gave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Leftover {
    /// Somebody will call again, and the plugin may need it then to find what it has to undo.
    Keep,
    /// Nobody may ever call again.
    Take,
}

#[derive(Debug)]
pub struct Host {
    pub(crate) config: Config,
    pub(crate) runner: Runner,
    pub(crate) records: Records,
    /// Calls for one pod wait for each other.
    pub(crate) pods: Queue,
    pub(crate) turns: Turns,
    /// Attached by this process: younger than any list of known pods that a caller of
    /// [`Host::collect`] may hold.
    young: Mutex<BTreeSet<String>>,
}

impl Host {
    pub fn new(config: Config) -> Self {
        Self {
            runner: Runner::new(&config),
            records: Records::new(&config.cache_dir),
            pods: Queue::default(),
            turns: Turns::new(Duration::from_millis(config.gc_interval_ms)),
            young: Mutex::default(),
            config,
        }
    }

    pub fn netns_path(&self, id: &str) -> PathBuf {
        self.config.netns_dir.join(format!("{PREFIX}{id}"))
    }

    pub fn attach(&self, pod: &Pod) -> Result<Attachment, Error> {
        let path = self.netns_path(&pod.id);
        let params = Params::new(pod, &self.config.interface, &path)?;
        let _alone = self.pods.enter(&pod.id);
        let _shared = self.turns.shared();
        if self.records.exists(&pod.id) || path.exists() {
            self.release(&pod.id, Leftover::Take)?;
        }
        let network = self.network(pod.default_network)?;
        self.runner.check_binaries(&network)?;
        for capability in params.unserved(&network) {
            tracing::warn!(
                pod = pod.id,
                network = network.name,
                "the pod asks for {capability}, but no plugin of {} has this capability: it gets none",
                network.path.display()
            );
        }
        let mut record = Record { network, params, result: None };
        self.records.write(&record)?;
        self.young().insert(pod.id.clone());
        self.announce(&record);
        self.build(&path, &mut record, pod.native).map_err(|Failed { error, reached }| {
            let undone = self.undo(&record, reached);
            self.young().remove(&pod.id);
            if let Err(e) = undone {
                // Told here, because the caller wants to hear of the first failure.
                tracing::warn!(
                    pod = pod.id,
                    "after a failed attach, something is left and will be collected later: {}",
                    with_causes(&e)
                );
            }
            error
        })
    }

    fn build(&self, path: &Path, record: &mut Record, native: bool) -> Result<Attachment, Failed> {
        netns::create(path).map_err(Failed::before)?;
        netns::within(path, nic::set_up_loopback).map_err(Failed::before)?;
        let Record { network, params, .. } = &*record;
        let success = self.runner.add(network, params).map_err(|AddError { error, reached }| {
            // The plugin that failed may have done half of its work.
            Failed { error: error.into(), reached: reached + 1 }
        })?;
        let all = network.plugins.len();
        let after = |error: Error| Failed { error, reached: all };
        if self.config.check_after_add {
            self.runner.check(network, params, &success.raw).map_err(|e| after(e.into()))?;
        }
        record.result = Some(success.raw.clone());
        self.records.write(record).map_err(|e| after(e.into()))?;
        self.announce(record);
        let primary = record.params.interface.as_str();
        let join = if native { nic::look } else { nic::join };
        netns::within(path, || join(path, primary, &success)).map_err(|e| after(e.into()))
    }

    /// After a failed attach. The namespace goes in any case, since nothing has run in it; the
    /// record stays while a plugin owes us something.
    fn undo(&self, record: &Record, reached: usize) -> Result<(), Error> {
        let Record { network, params, result } = record;
        let mut errors: Vec<Error> = self
            .runner
            .del(network, params, result.as_ref(), reached)
            .into_iter()
            .map(Error::from)
            .collect();
        if errors.is_empty() {
            errors.extend(self.forget(record).err());
        }
        errors.extend(netns::remove(&params.netns).err().map(Error::from));
        Error::all(errors)
    }

    /// The last step of giving back: nothing is owed any more.
    fn forget(&self, record: &Record) -> Result<(), Error> {
        let dir = &self.config.results_dir;
        peers::withdraw(dir, record)
            .map_err(|source| Error::Results { dir: dir.clone(), source })?;
        Ok(self.records.remove(&record.params.container_id)?)
    }

    /// Tells other runtimes of the pod. The pod does not depend on it.
    pub(crate) fn announce(&self, record: &Record) {
        let dir = &self.config.results_dir;
        if let Err(e) = peers::announce(dir, record) {
            tracing::warn!(
                pod = record.params.container_id,
                "{} cannot be written, and the GC of another runtime may free the pod's address: {e}",
                dir.display()
            );
        }
    }

    pub fn open_taps(&self, id: &str, attachment: &Attachment) -> Result<Vec<OwnedFd>, Error> {
        check_id(id)?;
        let path = self.netns_path(id);
        Ok(netns::within(&path, || nic::open_taps(&attachment.interfaces))?)
    }

    pub fn detach(&self, id: &str) -> Result<(), Error> {
        check_id(id)?;
        let _alone = self.pods.enter(id);
        let _shared = self.turns.shared();
        self.release(id, Leftover::Keep)?;
        self.young().remove(id);
        Ok(())
    }

    /// Gives back what a pod was given. When a plugin fails, the others run all the same, and the
    /// record stays so that the next call tries again; `leftover` says whether the namespace stays
    /// with it.
    pub(crate) fn release(&self, id: &str, leftover: Leftover) -> Result<(), Error> {
        let path = self.netns_path(id);
        let mut errors: Vec<Error> = Vec::new();
        if path.exists() && !netns::is_mounted(&path) {
            // Cut short between the file and the mount, or a reboot that kept /run.
            errors.extend(netns::remove(&path).err().map(Error::from));
        }
        let mut damaged = false;
        let record = match self.records.read(id) {
            Ok(record) => record,
            Err(e) => {
                tracing::warn!(
                    pod = id,
                    "{}; the present configuration has to serve",
                    with_causes(&e)
                );
                damaged = true;
                Some(self.substitute(id, &path)?)
            }
        };
        let mut owing = false;
        if let Some(Record { network, params, result }) = &record {
            let count = network.plugins.len();
            let failed = self.runner.del(network, params, result.as_ref(), count);
            owing = !failed.is_empty();
            errors.extend(failed.into_iter().map(Error::from));
        }
        if !owing || leftover == Leftover::Take {
            errors.extend(netns::remove(&path).err().map(Error::from));
        }
        if errors.is_empty() && damaged {
            let dir = &self.config.results_dir;
            let withdrawn = peers::withdraw_by_id(dir, id, &path);
            errors
                .extend(withdrawn.err().map(|source| Error::Results { dir: dir.clone(), source }));
        }
        if errors.is_empty() {
            errors.extend(match &record {
                _ if damaged => self.records.set_aside(id).err().map(Error::from),
                Some(record) => self.forget(record).err(),
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

    fn substitute(&self, id: &str, path: &Path) -> Result<Record, Error> {
        Ok(Record {
            // Without a configuration, the pod was on the built-in network.
            network: self.network(true)?,
            params: Params::bare(id, &self.config.interface, path)?,
            result: None,
        })
    }

    /// Whether the pod's network still is as it was made: the joints, and the plugins' own CHECK.
    pub fn check(&self, id: &str, attachment: &Attachment) -> Result<(), Error> {
        check_id(id)?;
        let path = self.netns_path(id);
        netns::within(&path, || nic::check(&attachment.interfaces))?;
        let unattached = || Error::Unattached { id: id.to_owned() };
        let record = self.records.read(id)?.ok_or_else(unattached)?;
        let result = record.result.as_ref().ok_or_else(unattached)?;
        Success::from_value(result.clone()).map_err(|problem| Error::Result { problem })?;
        Ok(self.runner.check(&record.network, &record.params, result)?)
    }

    /// Records that cannot be read, in words.
    pub fn damaged(&self) -> Vec<String> {
        match self.records.damaged() {
            Ok(damaged) => damaged.iter().map(|e| with_causes(e)).collect(),
            Err(e) => vec![with_causes(&e)],
        }
    }

    /// Whether the host has a CNI configuration, sound or not.
    pub fn is_configured(&self) -> bool {
        !matches!(Network::load(&self.config.conf_dir), Err(ConfError::None { .. }))
    }

    /// What keeps pods from being attached, in words; with `default`, pods that may be attached to
    /// the built-in network.
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

    pub(crate) fn young(&self) -> MutexGuard<'_, BTreeSet<String>> {
        self.young.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
