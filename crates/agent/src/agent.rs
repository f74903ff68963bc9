//! The agent's state: the pod, its containers and their processes. One thread; the lock is held
//! for look-ups and changes only, never across an await.
//!
//! ```text
//! container:  (creating) -> Created -> Running -> Ended -> (removed)
//! exec:                                Running -> Ended -> (collected)
//! ```
//! Verbs on one container follow one another (`verbs`); execs run beside each other.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::v1;
use nix::errno::Errno;
use tokio::sync::{Notify, OwnedMutexGuard};

use crate::containers::Container;
use crate::containers::images::Images;
use crate::containers::process::Process;
use crate::error::{Error, Result};
use crate::events::EventLog;
use crate::guest::empty_dirs::EmptyDirs;
use crate::guest::host_mounts::HostMounts;
use crate::guest::huge_pages::HugePages;
use crate::guest::reclaim::Reclaim;
use crate::guest::scratch::{self, Scratch};
use crate::guest::share::{self, Share};
use crate::guest::volumes::Volumes;
use crate::lanes::Lanes;
use crate::oci::cgroup::Cgroup;
use crate::oci::userns::UserNamespace;
use crate::reaper::Ended;
use crate::stdio::input::Input;
use crate::stdio::output::Output;

/// What differs between a guest and a test on a development machine.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything the agent writes is below this folder.
    pub base: PathBuf,
    /// Name of the pod's cgroup below the cgroup v2 mount.
    pub cgroup: String,
    /// `dir:` instead of a disk's serial, for tests without disks.
    pub folders_as_disks: bool,
    /// None: a VM's kernel is the pod's own.
    pub host: Option<Host>,
    /// Where the pod's shared volumes come from.
    pub share: share::Source,
    /// Where writable layers and emptyDirs are.
    pub scratch: scratch::Source,
    /// The machine is the agent's own: it may be powered off.
    pub is_guest: bool,
}

/// What a pod without a VM has of the host.
#[derive(Debug, Clone)]
pub struct Host {
    pub mounts: Arc<HostMounts>,
    pub network: bool,
    pub ipc: bool,
}

impl Config {
    /// Refuses what only a pod without a VM can have.
    pub fn host(&self) -> Result<&Host> {
        self.host.as_ref().ok_or_else(|| {
            Error::Precondition("the pod has a VM: it knows no paths of the host".to_owned())
        })
    }

    /// Refuses what would be done to the machine itself, which must be a VM.
    pub fn has_devices(&self) -> Result<()> {
        match self.host {
            None => Ok(()),
            Some(_) => Err(Error::Precondition(
                "the pod has no VM: disks, cards, CPUs, user namespaces and AppArmor policy are not \
                 its own"
                    .to_owned(),
            )),
        }
    }
}

/// What ConfigurePod has set.
#[derive(Debug, Clone)]
pub struct Pod {
    pub id: String,
    pub hostname: String,
}

/// Whose process a pid is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    Helper,
    PodPid,
    /// Empty exec id: the container's init.
    Process {
        container: String,
        exec: String,
    },
}

#[derive(Debug)]
pub struct State {
    pub pod: Option<Pod>,
    pub containers: BTreeMap<String, Container>,
    pub events: EventLog,
    pub volumes: Volumes,
    /// Numbers the containers and execs of this boot.
    pub next_number: u64,
    /// PID 1 of the PID namespace that containers share in mode POD.
    pub pod_pid: Option<i32>,
    pids: HashMap<i32, Owner>,
    /// Children that ended before their helper had told their pids.
    early: HashMap<i32, Ended>,
    /// Helpers at work.
    expected: usize,
}

#[derive(Debug)]
pub struct Agent {
    pub config: Config,
    pub pod_cgroup: Cgroup,
    pub images: tokio::sync::Mutex<Images>,
    pub share: Arc<tokio::sync::Mutex<Share>>,
    pub scratch: Arc<tokio::sync::Mutex<Scratch>>,
    /// Held while discarded files are deleted.
    cleaning: tokio::sync::Mutex<()>,
    /// Taken before `scratch`, never after it.
    pub empty_dirs: Arc<tokio::sync::Mutex<EmptyDirs>>,
    /// Made when the first container asks for it.
    pub userns: tokio::sync::Mutex<Option<Arc<UserNamespace>>>,
    pub huge_pages: HugePages,
    pub reclaim: Arc<Reclaim>,
    /// Threads for what may block on a file system.
    pub lanes: Lanes,
    /// Makes the pod's PID namespace once.
    pub pod_pid_making: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    verbs: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// An event was added, or a newer stream of events replaces the former.
    pub events_changed: Notify,
    /// A child was reaped.
    pub reaped: Notify,
    /// Cgroups to watch for OOM kills have changed.
    pub oom: crate::containers::oom::Watch,
}

impl Agent {
    pub fn new(config: Config) -> Result<Arc<Self>> {
        let pod_cgroup = match config.host {
            None => Cgroup::pod(&config.cgroup)?,
            Some(_) => Cgroup::pod_of_host(&config.cgroup)?,
        };
        let share = Share::new(config.share.clone(), config.base.join("shares"));
        let scratch = Scratch::new(config.scratch.clone(), config.base.join("scratch"));
        let empty_dirs = EmptyDirs::new(config.base.join("empty-dirs"));
        Ok(Arc::new(Self {
            pod_cgroup,
            images: tokio::sync::Mutex::default(),
            share: Arc::new(tokio::sync::Mutex::new(share)),
            scratch: Arc::new(tokio::sync::Mutex::new(scratch)),
            cleaning: tokio::sync::Mutex::default(),
            empty_dirs: Arc::new(tokio::sync::Mutex::new(empty_dirs)),
            userns: tokio::sync::Mutex::default(),
            huge_pages: HugePages::default(),
            reclaim: Arc::default(),
            lanes: Lanes::default(),
            pod_pid_making: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                pod: None,
                containers: BTreeMap::new(),
                events: EventLog::default(),
                volumes: Volumes::new(config.base.join("volumes")),
                next_number: 0,
                pod_pid: None,
                pids: HashMap::new(),
                early: HashMap::new(),
                expected: 0,
            }),
            verbs: Mutex::default(),
            events_changed: Notify::new(),
            reaped: Notify::new(),
            oom: crate::containers::oom::Watch::new()?,
            config,
        }))
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // A panic ends the process (`panics`), so a poisoned lock is not seen.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a container is known and its program has run to its end.
    pub fn has_ended(&self, container: &str) -> bool {
        self.lock().containers.get(container).is_some_and(|container| container.init.is_ended())
    }

    /// Waits for its turn with a container's verbs.
    pub async fn verb(&self, container: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut verbs = self.verbs.lock().unwrap_or_else(PoisonError::into_inner);
            // Ids come from the host without end; only those in use are kept.
            verbs.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(verbs.entry(container.to_owned()).or_default())
        };
        turn.lock_owned().await
    }

    /// Announces a helper: until the guard is dropped, unknown children's ends are kept.
    pub fn expect_child(&self) -> Expecting<'_> {
        self.lock().expected += 1;
        Expecting { agent: self }
    }

    pub fn know_helper(&self, pid: i32) {
        self.lock().know(pid, Owner::Helper);
    }

    /// Takes charge of a process. If it has ended already, its end is handled now.
    pub fn adopt(&self, pid: i32, owner: Owner) {
        let early = {
            let mut state = self.lock();
            state.pids.insert(pid, owner);
            state.early.remove(&pid)
        };
        if let Some(status) = early {
            self.child_ended(pid, status);
        }
    }

    /// Kills a helper's child of which nobody will take charge, with what it has started. An
    /// [`Expecting`] must still stand: only then is it known whether the pid is still its own.
    pub fn give_up(&self, pid: i32) {
        let state = self.lock();
        if state.early.contains_key(&pid) {
            return;
        }
        // It leads a session, unless it has not come that far.
        for target in [-pid, pid] {
            match crate::oci::raw_kill(target, libc::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => tracing::error!(pid, %error, "cannot kill a process given up"),
            }
        }
    }

    /// Deletes in the background what was discarded on the scratch disk, one tree after the other: it
    /// may be as large as the disk.
    pub fn empty_trash(self: &Arc<Self>) {
        let agent = Arc::clone(self);
        tokio::spawn(async move {
            let _one_at_a_time = agent.cleaning.lock().await;
            let Some(trash) = agent.scratch.lock().await.trash() else { return };
            let emptied = tokio::task::spawn_blocking(move || scratch::empty_trash(&trash));
            if let Err(error) = emptied.await {
                tracing::error!(%error, "cannot empty the trash");
            }
        });
    }

    /// Called by the reaper for every child that has ended.
    pub fn child_ended(&self, pid: i32, status: Ended) {
        {
            let mut state = self.lock();
            match state.pids.remove(&pid) {
                Some(Owner::Process { container, exec }) => {
                    state.process_ended(&container, &exec, status);
                }
                Some(Owner::PodPid) => {
                    tracing::error!("PID 1 of the pod's PID namespace has died");
                    state.pod_pid = None;
                }
                Some(Owner::Helper) => {}
                None if state.expected > 0 => {
                    state.early.insert(pid, status);
                }
                // An orphan that was re-parented here.
                None => {}
            }
        }
        self.reaped.notify_waiters();
        self.events_changed.notify_waiters();
    }

    pub fn input(&self, container: &str, exec: &str) -> Option<Arc<Input>> {
        self.lock().process(container, exec).ok()?.stdin.clone()
    }

    pub fn output(&self, container: &str, exec: &str, stderr: bool) -> Option<Arc<Output>> {
        let state = self.lock();
        let process = state.process(container, exec).ok()?;
        if stderr { process.stderr.clone() } else { process.stdout.clone() }
    }

    /// Forgets execs that nobody will ask for any more.
    pub fn sweep_execs(&self) {
        let mut state = self.lock();
        let State { containers, events, .. } = &mut *state;
        for (id, container) in containers {
            container.execs.retain(|exec, process| {
                let keep = events.holds_exit(id, exec) || !process.is_collected();
                if !keep {
                    process.close();
                }
                keep
            });
        }
    }
}

/// See [`Agent::expect_child`].
#[derive(Debug)]
pub struct Expecting<'a> {
    agent: &'a Agent,
}

impl Drop for Expecting<'_> {
    fn drop(&mut self) {
        let mut state = self.agent.lock();
        state.expected -= 1;
        if state.expected == 0 {
            // Orphans, or the remains of containers that failed to come up.
            state.early.clear();
        }
    }
}

impl State {
    pub fn know(&mut self, pid: i32, owner: Owner) {
        self.early.remove(&pid);
        self.pids.insert(pid, owner);
    }

    pub fn number(&mut self) -> u64 {
        self.next_number += 1;
        self.next_number
    }

    pub fn container(&self, id: &str) -> Result<&Container> {
        self.containers.get(id).ok_or_else(|| Error::container(id))
    }

    pub fn container_mut(&mut self, id: &str) -> Result<&mut Container> {
        self.containers.get_mut(id).ok_or_else(|| Error::container(id))
    }

    pub fn process(&self, container: &str, exec: &str) -> Result<&Process> {
        let container = self.container(container)?;
        if exec.is_empty() {
            return Ok(&container.init);
        }
        container
            .execs
            .get(exec)
            .ok_or_else(|| Error::NotFound { what: "exec", id: exec.to_owned() })
    }

    fn process_ended(&mut self, container_id: &str, exec_id: &str, status: Ended) {
        let Some(container) = self.containers.get_mut(container_id) else { return };
        // The verdict before the exit, so that whoever sees the exit knows why.
        if let Some(oom) = container.new_oom(container_id) {
            self.events.push(v1::event::Event::Oom(oom));
        }
        if let Some(exit) = container.process_ended(container_id, exec_id, status) {
            self.events.push(v1::event::Event::Exit(exit));
        }
    }
}
