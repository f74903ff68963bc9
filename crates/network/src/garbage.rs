//! Collecting what belongs to no pod: our own leftovers by their records, then the plugins' by their
//! GC (CNI spec 1.1, sections 2 and 4).
//!
//! A plugin frees all that it is not told of. So it is told of every pod that may be alive, and
//! when that is not known, GC is not run at all. The specification forbids ADD and DEL during GC: an
//! address that is given while GC runs would be taken away again.
//!
//! Pods come first. A GC starts only in a moment without any ADD or DEL, and does not keep new ones
//! out while it waits for that moment. A GC that runs is ended early when an ADD or DEL has waited
//! for it for [`GRACE`]. A GC that did not come to its end is tried again later.

use std::collections::BTreeSet;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::host::{Error, Host, Leftover, with_causes};
use crate::peers;
use crate::plugin::conf::{ConfError, Network};
use crate::plugin::params::check_id;

/// How long an ADD or DEL waits for a GC before the GC is ended.
const GRACE: Duration = Duration::from_secs(3);
/// How long a GC waits for a moment without ADD and DEL before it is put off.
const PATIENCE: Duration = Duration::from_secs(5);

/// Who may run plugins: any number of ADD and DEL, or one GC.
#[derive(Debug)]
pub struct Turns {
    state: Mutex<State>,
    changed: Condvar,
    interval: Duration,
    grace: Duration,
    patience: Duration,
}

#[derive(Debug)]
struct State {
    /// ADDs and DELs under way.
    pods: usize,
    collecting: bool,
    /// ADDs and DELs that wait for the GC under way, and since when the first of them does.
    waiting: usize,
    waiting_since: Option<Instant>,
    last: Instant,
    /// The last GC did not come to its end.
    postponed: bool,
    /// Somebody tries a GC that was put off again.
    retried: bool,
}

/// The right to ADD and DEL.
#[derive(Debug)]
pub struct Shared<'a>(&'a Turns);

/// The right to GC.
#[derive(Debug)]
pub struct Exclusive<'a>(&'a Turns);

impl Turns {
    pub fn new(interval: Duration) -> Self {
        Self::with_limits(interval, GRACE, PATIENCE)
    }

    fn with_limits(interval: Duration, grace: Duration, patience: Duration) -> Self {
        let state = State {
            pods: 0,
            collecting: false,
            waiting: 0,
            waiting_since: None,
            last: Instant::now(),
            postponed: false,
            retried: false,
        };
        Self { state: Mutex::new(state), changed: Condvar::new(), interval, grace, patience }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// For ADD and DEL. Waits for a GC under way only.
    pub fn shared(&self) -> Shared<'_> {
        let mut state = self.state();
        if state.collecting {
            state.waiting += 1;
            state.waiting_since.get_or_insert_with(Instant::now);
            while state.collecting {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
            state.waiting -= 1;
            if state.waiting == 0 {
                state.waiting_since = None;
            }
        }
        state.pods += 1;
        Shared(self)
    }

    /// For GC. None when there was no moment without ADD and DEL.
    fn exclusive(&self) -> Option<Exclusive<'_>> {
        let busy = |state: &mut State| state.collecting || state.pods > 0 || state.waiting > 0;
        let (mut state, _) = self
            .changed
            .wait_timeout_while(self.state(), self.patience, busy)
            .unwrap_or_else(PoisonError::into_inner);
        if busy(&mut state) {
            return None;
        }
        state.collecting = true;
        Some(Exclusive(self))
    }

    /// True once an interval.
    fn is_due(&self) -> bool {
        let mut state = self.state();
        let due = state.last.elapsed() >= self.interval;
        if due {
            state.last = Instant::now();
        }
        due
    }

    fn postpone(&self, postponed: bool) {
        self.state().postponed = postponed;
    }

    /// True for the one caller that has to try a GC again that was put off.
    pub fn begin_retry(&self) -> bool {
        let mut state = self.state();
        state.postponed && !std::mem::replace(&mut state.retried, true)
    }

    /// False while there still is a GC to try again.
    pub fn end_retry(&self) -> bool {
        let mut state = self.state();
        if !state.postponed {
            state.retried = false;
        }
        !state.postponed
    }

    /// The longest pause between two tries of one GC.
    pub fn interval(&self) -> Duration {
        self.interval
    }
}

impl Exclusive<'_> {
    /// An ADD or DEL has waited for long enough.
    fn is_in_the_way(&self) -> bool {
        self.0.state().waiting_since.is_some_and(|since| since.elapsed() >= self.0.grace)
    }
}

impl Drop for Shared<'_> {
    fn drop(&mut self) {
        self.0.state().pods -= 1;
        self.0.changed.notify_all();
    }
}

impl Drop for Exclusive<'_> {
    fn drop(&mut self) {
        self.0.state().collecting = false;
        self.0.changed.notify_all();
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
            Ok(ids) => {
                errors.extend(ids.iter().filter_map(|id| self.bury(id, known).err()));
                ids.iter().for_each(|id| self.announce_again(id));
            }
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

    /// For pods of a release that told other runtimes nothing, and after somebody has emptied the
    /// folder.
    fn announce_again(&self, id: &str) {
        let Some(_alone) = self.pods.try_enter(id) else { return };
        if let Ok(Some(record)) = self.records.read(id)
            && !peers::is_announced(&self.config.results_dir, &record)
        {
            self.announce(&record);
        }
    }

    /// GC after removals, now and then.
    pub fn is_sweep_due(&self) -> bool {
        self.turns.is_due()
    }

    /// The plugins' GC alone. All that has a record is taken to be alive.
    pub fn sweep(&self) {
        for error in self.collect_by_plugins(None) {
            tracing::warn!("CNI garbage collection: {}", with_causes(&error));
        }
    }

    fn collect_by_plugins(&self, known: Option<&[String]>) -> Vec<Error> {
        // This is the other try; whether there has to be one more is told below.
        self.turns.postpone(false);
        let network = match Network::load(&self.config.conf_dir) {
            Ok(network) if network.collects() => network,
            Ok(_) | Err(ConfError::None { .. }) => return Vec::new(),
            Err(e) => return vec![e.into()],
        };
        let Some(turn) = self.turns.exclusive() else {
            tracing::debug!("pods are being attached and detached; CNI GC is tried again later");
            self.turns.postpone(true);
            return Vec::new();
        };
        let valid = match self.living(&network, known) {
            Ok(valid) => valid,
            Err(e) => return vec![e],
        };
        let collected = self.runner.gc(&network, &valid, &|| turn.is_in_the_way());
        self.turns.postpone(collected.gave_way);
        if collected.gave_way {
            tracing::warn!("CNI GC was ended because a pod waited for it; it is tried again later");
        }
        collected.errors.into_iter().map(Error::from).collect()
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
        // Other runtimes may share the network; their pods must live. Of our own pods the records
        // have told already.
        let peers = peers::attachments(&self.config.results_dir, &network.name);
        let peers = peers.map_err(|path| Error::Unsure {
            problem: format!("{} cannot be read", path.display()),
        })?;
        valid.extend(peers.into_iter().filter(|(id, _)| !self.records.exists(id)));
        Ok(valid.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    fn turns(grace_ms: u64, patience_ms: u64) -> Turns {
        let ms = Duration::from_millis;
        Turns::with_limits(ms(0), ms(grace_ms), ms(patience_ms))
    }

    #[test]
    fn a_waiting_collection_keeps_nobody_out_and_gives_up() {
        let turns = turns(60_000, 400);
        let hung = turns.shared();
        std::thread::scope(|scope| {
            let collection = scope.spawn(|| turns.exclusive().is_none());
            let (done, others) = mpsc::channel();
            let turns = &turns;
            scope.spawn(move || {
                std::thread::sleep(Duration::from_millis(100));
                drop(turns.shared());
                let _ = done.send(());
            });
            // Unblocks everything when the test has failed.
            let passed = others.recv_timeout(Duration::from_secs(10)).is_ok();
            let gave_up = collection.join().unwrap();
            drop(hung);
            assert!(passed && gave_up, "others passed: {passed}, the GC gave up: {gave_up}");
        });
        assert!(turns.exclusive().is_some());
    }

    #[test]
    fn a_collection_is_asked_to_end_only_when_somebody_waits_for_it() {
        let turns = turns(200, 60_000);
        let collection = turns.exclusive().unwrap();
        std::thread::sleep(Duration::from_millis(300));
        assert!(!collection.is_in_the_way());
        std::thread::scope(|scope| {
            let pod = scope.spawn(|| drop(turns.shared()));
            let started = Instant::now();
            while !collection.is_in_the_way() && started.elapsed() < Duration::from_secs(10) {
                std::thread::sleep(Duration::from_millis(10));
            }
            assert!(collection.is_in_the_way());
            assert!(started.elapsed() >= Duration::from_millis(150));
            drop(collection);
            pod.join().unwrap();
        });
        // Nobody waits any more.
        assert!(!turns.exclusive().unwrap().is_in_the_way());
    }

    #[test]
    fn a_collection_that_was_put_off_is_tried_again_by_one() {
        let turns = turns(0, 0);
        assert!(!turns.begin_retry());
        turns.postpone(true);
        assert!(turns.begin_retry());
        assert!(!turns.begin_retry());
        assert!(!turns.end_retry());
        turns.postpone(false);
        assert!(turns.end_retry());
        turns.postpone(true);
        assert!(turns.begin_retry());
    }
}
