//! Collecting what belongs to no pod: our own leftovers by their records, then the plugins' by their
//! GC (CNI spec 1.1, sections 2 and 4).
//!
//! A plugin frees all that it is not told of. So it is told of every pod that may be alive, and
//! when that is not known, GC is not spoken at all. The specification forbids ADD and DEL meanwhile:
//! an address given while GC runs would be taken away again.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};
use std::time::{Duration, Instant};

use crate::host::{Error, Host, Leftover, with_causes};
use crate::peers;
use crate::plugin::conf::{ConfError, Network};
use crate::plugin::params::check_id;

/// Who may speak to plugins: any number of ADD and DEL, or one GC.
#[derive(Debug)]
pub struct Turns {
    gate: RwLock<()>,
    interval: Duration,
    last: Mutex<Instant>,
}

impl Turns {
    pub fn new(interval: Duration) -> Self {
        Self { gate: RwLock::default(), interval, last: Mutex::new(Instant::now()) }
    }

    /// For ADD and DEL. Not to be taken twice by one thread: a GC that waits between would be
    /// waited for.
    pub fn shared(&self) -> RwLockReadGuard<'_, ()> {
        self.gate.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn exclusive(&self) -> RwLockWriteGuard<'_, ()> {
        self.gate.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// True once an interval.
    fn is_due(&self) -> bool {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let due = last.elapsed() >= self.interval;
        if due {
            *last = Instant::now();
        }
        due
    }
}

impl Host {
    /// Frees what belongs to pods that nobody knows, then lets the plugins do their own GC. The
    /// records say what is ours: they are older than what they speak of and outlive it, while a
    /// namespace with our prefix may be another daemon's.
    pub fn collect(&self, known: &[String]) -> Result<(), Error> {
        let mut errors: Vec<Error> = Vec::new();
        for damaged in self.damaged() {
            tracing::error!(damaged, "its pod keeps its network until it is removed");
        }
        match self.records.ids() {
            Ok(ids) => errors.extend(ids.iter().filter_map(|id| self.bury(id, known).err())),
            Err(e) => errors.push(e.into()),
        }
        errors.extend(self.collect_by_plugins(Some(known)));
        Error::all(errors)
    }

    fn bury(&self, id: &str, known: &[String]) -> Result<(), Error> {
        // Busy: somebody knows it well.
        let Some(_alone) = self.pods.try_enter(id) else { return Ok(()) };
        // A file of another name is not ours.
        if known.iter().any(|k| k == id) || self.young().contains(id) || check_id(id).is_err() {
            return Ok(());
        }
        tracing::info!(pod = id, "collecting the network of a pod that is no more");
        let _shared = self.turns.shared();
        self.release(id, Leftover::Take)
    }

    /// GC after removals, now and then.
    pub fn is_sweep_due(&self) -> bool {
        self.turns.is_due()
    }

    /// The plugins' GC alone. All that has a record is taken for alive.
    pub fn sweep(&self) {
        for error in self.collect_by_plugins(None) {
            tracing::warn!("CNI garbage collection: {}", with_causes(&error));
        }
    }

    fn collect_by_plugins(&self, known: Option<&[String]>) -> Vec<Error> {
        let network = match Network::load(&self.config.conf_dir) {
            Ok(network) if network.collects() => network,
            Ok(_) | Err(ConfError::None { .. }) => return Vec::new(),
            Err(e) => return vec![e.into()],
        };
        let _exclusive = self.turns.exclusive();
        match self.living(&network, known) {
            Ok(valid) => self.runner.gc(&network, &valid).into_iter().map(Error::from).collect(),
            Err(e) => vec![e],
        }
    }

    /// Container ids and interfaces of all pods that may be on the network.
    fn living(
        &self,
        network: &Network,
        known: Option<&[String]>,
    ) -> Result<Vec<(String, String)>, Error> {
        let mut valid = BTreeSet::new();
        let young: Vec<String> = self.young().iter().cloned().collect();
        let is_known = |id: &String| known.is_none_or(|k| k.contains(id)) || young.contains(id);
        for id in self.records.ids()?.into_iter().filter(is_known) {
            // A damaged record is a pod all the same.
            let interface = match self.records.read(&id) {
                Ok(Some(record)) => record.params.interface,
                _ => self.config.interface.clone(),
            };
            valid.insert((id, interface));
        }
        for id in known.unwrap_or_default().iter().chain(&young) {
            valid.insert((id.clone(), self.config.interface.clone()));
        }
        // Other runtimes may share the network; their pods must live.
        let peers = peers::attachments(&network.name).map_err(|path| Error::Unsure {
            problem: format!("{} cannot be read", path.display()),
        })?;
        valid.extend(peers);
        Ok(valid.into_iter().collect())
    }
}
