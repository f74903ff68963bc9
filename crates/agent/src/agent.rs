//! State of the agent: the pod, its containers and their processes. All tasks run on one thread;
//! the state's lock is never held across an await.
//!
//! ```text
//! container:  (creating) -> Created -> Running -> Ended -> (removed)
//! exec:                                Running -> Ended -> (collected)
//! ```
//! Requests on one container are serialized by `container_locks`; execs of it run concurrently.

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use agent_api::v1;
use nix::errno::Errno;
use tokio::sync::{Notify, OwnedMutexGuard};

use crate::blocking::Pools;
use crate::containers::Container;
use crate::containers::images::Images;
use crate::containers::process::Process;
use crate::error::{Error, Result};
use crate::events::EventLog;
use crate::guest::empty_dirs::EmptyDirs;
use crate::guest::host_mounts::HostMounts;
use crate::guest::huge_pages::HugePages;
use crate::guest::reclaim::Reclaim;
use crate::guest::reserve::Reserve;
use crate::guest::scratch::{self, Scratch};
use crate::guest::share::{self, Share};
use crate::guest::volumes::Volumes;
use crate::oci::cgroup::Cgroup;
use crate::oci::seccomp::Filters;
use crate::oci::userns::UserNamespace;
use crate::reaper::ExitStatus;
use crate::stdio::input::Input;
use crate::stdio::output::Output;

/// Settings that differ between a guest, a pod on the host, and tests.
#[derive(Debug, Clone)]
pub struct Config {
    /// Everything the agent writes is below this directory.
    pub base: PathBuf,
    /// Name of the pod's cgroup below the cgroup v2 mount.
    pub cgroup: String,
    /// Accept `dir:PATH` instead of a disk serial, for tests without disks.
    pub dirs_as_disks: bool,
    /// Set for a pod without a VM.
    pub host: Option<Host>,
    /// Source of the pod's shared volumes.
    pub share: share::Source,
    /// Location of writable layers and emptyDirs.
    pub scratch: scratch::Source,
    /// The machine is the pod's VM and may be powered off.
    pub is_guest: bool,
}

/// Host resources that a pod without a VM uses.
#[derive(Debug, Clone)]
pub struct Host {
    pub mounts: Arc<HostMounts>,
    pub network: bool,
    pub ipc: bool,
}

impl Config {
    /// Returns the host part, or an error for a pod with a VM.
    pub fn host(&self) -> Result<&Host> {
        self.host.as_ref().ok_or_else(|| {
            Error::Precondition("host paths are available to pods without a VM only".to_owned())
        })
    }

    /// Returns an error for a pod without a VM, where the request would change the host itself.
    pub fn require_vm(&self) -> Result<()> {
        match self.host {
            None => Ok(()),
            Some(_) => Err(Error::Precondition(
                "the pod has no VM: disks, network interfaces, CPUs, user namespaces and AppArmor \
                 policies are not available"
                    .to_owned(),
            )),
        }
    }
}

/// Values set by ConfigurePod.
#[derive(Debug, Clone)]
pub struct Pod {
    pub id: String,
    pub hostname: String,
}

/// Role of a child process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Owner {
    Helper,
    PodPid,
    /// Init process if the exec id is empty.
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
    /// Last number given to a container or an exec since boot.
    pub next_number: u64,
    /// PID 1 of the PID namespace that containers share in mode POD.
    pub pod_pid: Option<i32>,
    pids: HashMap<i32, Owner>,
    /// Exits of children whose pid is not registered yet.
    early_exits: HashMap<i32, ExitStatus>,
    /// Helper processes that run now.
    pending_spawns: usize,
}

#[derive(Debug)]
pub struct Agent {
    pub config: Config,
    pub pod_cgroup: Cgroup,
    pub images: tokio::sync::Mutex<Images>,
    pub share: Arc<tokio::sync::Mutex<Share>>,
    pub scratch: Arc<tokio::sync::Mutex<Scratch>>,
    /// Held while the scratch disk's trash is deleted.
    trash_lock: tokio::sync::Mutex<()>,
    /// Lock order: before `scratch`.
    pub empty_dirs: Arc<tokio::sync::Mutex<EmptyDirs>>,
    /// Created with the first container that needs it.
    pub userns: tokio::sync::Mutex<Option<Arc<UserNamespace>>>,
    pub huge_pages: HugePages,
    /// Compiled seccomp filters.
    pub filters: Filters,
    pub reclaim: Arc<Reclaim>,
    reserve: Arc<Reserve>,
    /// Threads for calls that may block on a file system.
    pub pools: Pools,
    /// Serializes the creation of the pod's PID namespace.
    pub pod_pid_lock: tokio::sync::Mutex<()>,
    state: Mutex<State>,
    container_locks: Mutex<HashMap<String, Arc<tokio::sync::Mutex<()>>>>,
    /// Notified when an event was added or a newer event stream replaced the current one.
    pub events_changed: Notify,
    /// Notified when a child was reaped.
    pub reaped: Notify,
    /// Watches of the containers' `memory.events`.
    pub oom: crate::containers::oom::Watch,
}

impl Agent {
    pub fn new(config: Config) -> Result<Arc<Self>> {
        let pod_cgroup = match config.host {
            None => Cgroup::pod(&config.cgroup)?,
            Some(_) => Cgroup::host_pod(&config.cgroup)?,
        };
        let share = Share::new(config.share.clone(), config.base.join("shares"));
        let scratch = Scratch::new(config.scratch.clone(), config.base.join("scratch"));
        let empty_dirs = EmptyDirs::new(config.base.join("empty-dirs"));
        Ok(Arc::new(Self {
            pod_cgroup,
            images: tokio::sync::Mutex::default(),
            share: Arc::new(tokio::sync::Mutex::new(share)),
            scratch: Arc::new(tokio::sync::Mutex::new(scratch)),
            trash_lock: tokio::sync::Mutex::default(),
            empty_dirs: Arc::new(tokio::sync::Mutex::new(empty_dirs)),
            userns: tokio::sync::Mutex::default(),
            huge_pages: HugePages::default(),
            filters: Filters::default(),
            reclaim: Arc::default(),
            reserve: Arc::default(),
            pools: Pools::default(),
            pod_pid_lock: tokio::sync::Mutex::default(),
            state: Mutex::new(State {
                pod: None,
                containers: BTreeMap::new(),
                events: EventLog::default(),
                volumes: Volumes::new(config.base.join("volumes")),
                next_number: 0,
                pod_pid: None,
                pids: HashMap::new(),
                early_exits: HashMap::new(),
                pending_spawns: 0,
            }),
            container_locks: Mutex::default(),
            events_changed: Notify::new(),
            reaped: Notify::new(),
            oom: crate::containers::oom::Watch::new()?,
            config,
        }))
    }

    pub fn lock(&self) -> MutexGuard<'_, State> {
        // Panics abort the process (`panics`), so the lock cannot be poisoned.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps memory free for the agent. In a pod without a VM the kubelet does that for the node.
    pub fn reserve_memory(&self) {
        if self.config.is_guest {
            self.reserve.update(&self.pod_cgroup);
        }
    }

    /// Whether the container exists and its init process has exited.
    pub fn has_exited(&self, container: &str) -> bool {
        self.lock().containers.get(container).is_some_and(|container| container.init.is_stopped())
    }

    /// Locks the container's id for one request.
    pub async fn lock_container(&self, container: &str) -> OwnedMutexGuard<()> {
        let lock = {
            let mut container_locks =
                self.container_locks.lock().unwrap_or_else(PoisonError::into_inner);
            // The host may use any number of ids: unused locks are dropped.
            container_locks.retain(|_, lock| Arc::strong_count(lock) > 1);
            Arc::clone(container_locks.entry(container.to_owned()).or_default())
        };
        lock.lock_owned().await
    }

    /// Keeps the exits of unknown children until the returned guard is dropped. Taken before a
    /// helper is spawned.
    pub fn begin_spawn(&self) -> SpawnGuard<'_> {
        self.lock().pending_spawns += 1;
        SpawnGuard { agent: self }
    }

    pub fn register_helper(&self, pid: i32) {
        self.lock().register(pid, Owner::Helper);
    }

    /// Registers a process. If its exit was reaped before, the exit is handled now.
    pub fn track(&self, pid: i32, owner: Owner) {
        let early_exits = {
            let mut state = self.lock();
            state.pids.insert(pid, owner);
            state.early_exits.remove(&pid)
        };
        if let Some(status) = early_exits {
            self.child_exited(pid, status);
        }
    }

    /// Kills a process that was spawned but will not be registered, with its session. Needs a live
    /// [`SpawnGuard`]: only then can the pid not have been reused.
    pub fn kill_untracked(&self, pid: i32) {
        let state = self.lock();
        if state.early_exits.contains_key(&pid) {
            return;
        }
        // It is a session leader, unless it has not called setsid yet.
        for target in [-pid, pid] {
            match crate::oci::raw_kill(target, libc::SIGKILL) {
                Ok(()) | Err(Errno::ESRCH) => {}
                Err(error) => tracing::error!(pid, %error, "cannot kill an unregistered process"),
            }
        }
    }

    /// Deletes the scratch disk's trash in the background, one tree at a time; a tree may be as
    /// large as the disk.
    pub fn delete_trash(self: &Arc<Self>) {
        let agent = Arc::clone(self);
        tokio::spawn(async move {
            let _guard = agent.trash_lock.lock().await;
            let Some(trash) = agent.scratch.lock().await.trash() else { return };
            let emptied = tokio::task::spawn_blocking(move || scratch::delete_trash(&trash));
            if let Err(error) = emptied.await {
                tracing::error!(%error, "cannot delete the trash");
            }
        });
    }

    /// Called by the reaper for every child that has exited.
    pub fn child_exited(&self, pid: i32, status: ExitStatus) {
        {
            let mut state = self.lock();
            match state.pids.remove(&pid) {
                Some(Owner::Process { container, exec }) => {
                    state.process_exited(&container, &exec, status);
                }
                Some(Owner::PodPid) => {
                    tracing::error!("PID 1 of the pod's PID namespace has exited");
                    state.pod_pid = None;
                }
                Some(Owner::Helper) => {}
                None if state.pending_spawns > 0 => {
                    state.early_exits.insert(pid, status);
                }
                // A re-parented orphan.
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

    /// Drops execs whose exit and output the host has collected.
    pub fn remove_collected_execs(&self) {
        let mut state = self.lock();
        let State { containers, events, .. } = &mut *state;
        for (id, container) in containers {
            container.execs.retain(|exec, process| {
                let keep = events.has_exit(id, exec) || !process.is_collected();
                if !keep {
                    process.close();
                }
                keep
            });
        }
    }
}

/// See [`Agent::begin_spawn`].
#[derive(Debug)]
pub struct SpawnGuard<'a> {
    agent: &'a Agent,
}

impl Drop for SpawnGuard<'_> {
    fn drop(&mut self) {
        let mut state = self.agent.lock();
        state.pending_spawns -= 1;
        if state.pending_spawns == 0 {
            // Orphans, or processes of containers that failed to start.
            state.early_exits.clear();
        }
    }
}

impl State {
    pub fn register(&mut self, pid: i32, owner: Owner) {
        self.early_exits.remove(&pid);
        self.pids.insert(pid, owner);
    }

    pub fn allocate_number(&mut self) -> u64 {
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

    fn process_exited(&mut self, container_id: &str, exec_id: &str, status: ExitStatus) {
        let Some(container) = self.containers.get_mut(container_id) else { return };
        // The OOM event precedes the exit event, so a client that sees the exit knows its cause.
        if let Some(oom) = container.take_oom(container_id) {
            self.events.push(v1::event::Event::Oom(oom));
        }
        if let Some(exit) = container.process_exited(container_id, exec_id, status) {
            self.events.push(v1::event::Event::Exit(exit));
        }
    }
}
