//! What a pod may do, as a plain value: no lock, no I/O, no clock.
//!
//! ```text
//! pod         Starting ──ready──> Ready ──stop──> Stopping ──stopped──> NotReady
//!                │                  │                                     ^   │
//!                │                  └──────── VM died ────────────────────┘   │
//!                └─fails, cancelled──> Removing <───────────── remove ────────┘ (from any)
//!                                         └──> gone
//! container   Creating ──created──> Created ──started──> Running ──ended──> Exited
//!                └─fails──> gone       └────────── remove ──> Removing <──────┘
//! ```
//!
//! A [`Pod`] changes through [`Pod::apply`] only. Every [`Change`] is journaled before anybody sees
//! its effect, except those that are observations: they have happened, or will, written down or not.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::runtime::LinuxResources;

use crate::model::{
    ContainerId, ContainerSpec, ContainerState, ContainerView, ExitView, Identity, PodId,
    PodResources, PodSpec, PodState, PodView, ShareUse, TracePhase,
};
use crate::ports::Attachment;

/// Exit code of a container whose VM died with it.
pub(crate) const CODE_LOST: i32 = -1;
/// Exit code of a container whose processes were killed: 128 + SIGKILL.
pub(crate) const CODE_KILLED: i32 = 137;
/// Exit code of a container whose process could not be started (as runc and containerd say it).
pub(crate) const CODE_START_ERROR: i32 = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    Starting,
    Ready,
    Stopping,
    NotReady,
    Removing,
}

/// Something on the host that exists because of the pod. It is in the ledger before it exists and
/// until it is gone; undoing is idempotent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Folder of the pod's sockets.
    StateDir { path: PathBuf },
    /// Whatever the network port makes.
    Network,
    /// The leaf, and those ancestors that were made for it.
    Cgroup { leaf: PathBuf, parents: Vec<PathBuf> },
    /// The VMM, once its pid is known; before that, killing the cgroup finds it.
    Vmm { pid: u32, started: u64 },
    /// The pod's scratch disk. A pod without one was started by a former release: its containers'
    /// layers are disks of their own.
    ScratchDisk { path: PathBuf },
    /// The pod's file server; before its pid is known, killing the cgroup finds it.
    FileServer { pid: u32, started: u64 },
    /// A container's log's sidecar, and its writable layer where that is a file or folder of the host.
    ContainerFiles { container: ContainerId },
}

impl Effect {
    /// Freed when the pod stops; the others live until they are removed.
    pub(crate) fn ends_with_vm(&self) -> bool {
        !matches!(self, Self::ContainerFiles { .. })
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum ContainerPhase {
    Creating,
    Present,
    Removing,
}

#[derive(Debug, Clone)]
pub(crate) struct Container {
    pub(crate) id: ContainerId,
    pub(crate) spec: Arc<ContainerSpec>,
    pub(crate) phase: ContainerPhase,
    pub(crate) created_at: SystemTime,
    pub(crate) started_at: Option<SystemTime>,
    pub(crate) exit: Option<ExitView>,
    /// What the process printed stands in the log, or was waited for long enough; an exit is shown to
    /// others only then, and stays shown over a restart of the daemon.
    pub(crate) drained: bool,
    pub(crate) oom: bool,
    pub(crate) log_path: PathBuf,
    pub(crate) resources: LinuxResources,
    pub(crate) user: Option<Identity>,
    /// In the file server as long as a container needs them.
    pub(crate) shares: Vec<ShareUse>,
}

impl Container {
    pub(crate) fn is_running(&self) -> bool {
        self.started_at.is_some() && self.exit.is_none()
    }

    pub(crate) fn state(&self) -> ContainerState {
        match (&self.exit, self.started_at) {
            (Some(_), _) if self.drained => ContainerState::Exited,
            (_, Some(_)) => ContainerState::Running,
            (Some(_), None) => ContainerState::Exited,
            (None, None) => ContainerState::Created,
        }
    }

    pub(crate) fn view(&self, pod: &PodId) -> ContainerView {
        let state = self.state();
        ContainerView {
            id: self.id.clone(),
            pod: pod.clone(),
            spec: self.spec.clone(),
            state,
            created_at: self.created_at,
            started_at: self.started_at,
            exit: self.exit.clone().filter(|_| state == ContainerState::Exited),
            log_path: self.log_path.clone(),
            resources: self.resources.clone(),
            user: self.user.clone(),
        }
    }
}

/// Where a pod's emptyDirs are.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EmptyDirs {
    /// In the guest; else all of them are shared from the host.
    pub(crate) in_guest: bool,
    /// Names of those that are shared all the same, as they could not be copied.
    pub(crate) shared: BTreeSet<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) id: PodId,
    pub(crate) spec: Arc<PodSpec>,
    pub(crate) created_at: SystemTime,
    pub(crate) phase: Phase,
    pub(crate) reason: String,
    /// Lease of a uid for the VMM's jail; ends with the pod.
    pub(crate) uid: u32,
    pub(crate) netns: PathBuf,
    pub(crate) ledger: Vec<Effect>,
    pub(crate) attachment: Arc<Attachment>,
    pub(crate) kernel_release: String,
    pub(crate) trace: Vec<TracePhase>,
    pub(crate) empty_dirs: EmptyDirs,
    pub(crate) containers: BTreeMap<ContainerId, Container>,
    /// Its record could not be read: it can be stopped and removed, and `reason` says what is wrong.
    pub(crate) unread: bool,
}

/// The only ways in which a pod changes.
#[derive(Debug, Clone)]
pub(crate) enum Change {
    Planned(Vec<Effect>),
    /// Observation.
    Undone(Effect),
    VmmStarted {
        pid: u32,
        started: u64,
    },
    Ready {
        attachment: Arc<Attachment>,
        kernel_release: String,
        trace: Vec<TracePhase>,
    },
    Resized {
        change: PodResources,
    },
    /// Observation: a full disk must not keep a pod alive.
    Stopping,
    /// Observation.
    Stopped {
        at: SystemTime,
    },
    Removing,
    /// Observation.
    VmDied {
        reason: String,
        at: SystemTime,
    },
    /// Observation: the same, by the host's OOM killer.
    OutOfMemory {
        reason: String,
        at: SystemTime,
    },
    FileServerStarted {
        pid: u32,
        started: u64,
    },
    EmptyDirShared {
        name: String,
    },
    ContainerPlanned(Box<Container>),
    ContainerShares {
        id: ContainerId,
        shares: Vec<ShareUse>,
    },
    ContainerCreated {
        id: ContainerId,
        user: Identity,
    },
    /// Observation.
    ContainerStarted {
        id: ContainerId,
        at: SystemTime,
    },
    /// Observation.
    ContainerOom {
        id: ContainerId,
    },
    /// Observation.
    ContainerEnded {
        id: ContainerId,
        exit: ExitView,
    },
    /// Observation.
    LogsDrained {
        id: ContainerId,
    },
    ContainerResources {
        id: ContainerId,
        resources: Box<LinuxResources>,
    },
    ContainerRemoving {
        id: ContainerId,
    },
    ContainerGone {
        id: ContainerId,
    },
}

impl Change {
    /// It has happened, or will whatever the disk says: kept in memory even when it cannot be
    /// written down yet. After a crash recovery finds it out again.
    pub(crate) fn is_observation(&self) -> bool {
        matches!(
            self,
            Self::Stopping
                | Self::Undone(_)
                | Self::Stopped { .. }
                | Self::VmDied { .. }
                | Self::OutOfMemory { .. }
                | Self::ContainerStarted { .. }
                | Self::ContainerOom { .. }
                | Self::ContainerEnded { .. }
                | Self::LogsDrained { .. }
        )
    }
}

/// A change that does not fit the state; the caller's request came too late or twice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Misfit {
    #[error("pod is {phase:?}")]
    Pod { phase: Phase },
    #[error("no container {id:?} in the pod")]
    NoContainer { id: ContainerId },
    #[error("container {id:?} is {state}")]
    Container { id: ContainerId, state: &'static str },
}

impl Pod {
    pub(crate) fn apply(&mut self, change: Change) -> Result<(), Misfit> {
        match change {
            Change::Planned(effects) => {
                for effect in effects {
                    if !self.ledger.contains(&effect) {
                        self.ledger.push(effect);
                    }
                }
            }
            Change::Undone(effect) => self.ledger.retain(|e| *e != effect),
            Change::VmmStarted { pid, started } => {
                self.expect(&[Phase::Starting])?;
                self.ledger.push(Effect::Vmm { pid, started });
            }
            Change::Ready { attachment, kernel_release, trace } => {
                self.expect(&[Phase::Starting])?;
                self.phase = Phase::Ready;
                self.attachment = attachment;
                self.kernel_release = kernel_release;
                self.trace = trace;
            }
            Change::Resized { change } => {
                self.expect(&[Phase::Ready])?;
                let spec = Arc::make_mut(&mut self.spec);
                let PodResources { vcpus, memory_mib, cpu } = change;
                spec.vcpus = vcpus.or(spec.vcpus);
                spec.memory_mib = memory_mib.or(spec.memory_mib);
                spec.cpu = cpu.unwrap_or(spec.cpu);
            }
            Change::Stopping => {
                self.expect(&[Phase::Ready, Phase::NotReady, Phase::Stopping])?;
                self.phase = Phase::Stopping;
            }
            Change::Stopped { at } => {
                self.expect(&[Phase::Stopping])?;
                self.phase = Phase::NotReady;
                self.lose_containers(self.lost("pod was stopped".into(), at));
            }
            Change::Removing => self.phase = Phase::Removing,
            Change::VmDied { reason, at } => {
                if self.phase == Phase::Ready {
                    self.phase = Phase::NotReady;
                    self.lose_containers(self.lost(reason.clone(), at));
                    self.reason = reason;
                }
            }
            Change::OutOfMemory { reason, at } => {
                if self.phase == Phase::Ready {
                    self.phase = Phase::NotReady;
                    self.lose_containers(ExitView {
                        code: CODE_KILLED,
                        oom_killed: true,
                        at,
                        reason: "OOMKilled".into(),
                        message: reason.clone(),
                    });
                    self.reason = reason;
                }
            }
            Change::FileServerStarted { pid, started } => {
                self.expect(&[Phase::Ready])?;
                self.ledger.push(Effect::FileServer { pid, started });
            }
            Change::EmptyDirShared { name } => {
                self.expect(&[Phase::Ready])?;
                self.empty_dirs.shared.insert(name);
            }
            other => self.apply_to_container(other)?,
        }
        Ok(())
    }

    fn apply_to_container(&mut self, change: Change) -> Result<(), Misfit> {
        match change {
            Change::ContainerPlanned(container) => {
                self.expect(&[Phase::Ready])?;
                let id = container.id.clone();
                self.ledger.push(Effect::ContainerFiles { container: id.clone() });
                self.containers.insert(id, *container);
            }
            Change::ContainerShares { id, shares } => {
                let container = self.container_mut(&id)?;
                container.expect_phase(ContainerPhase::Creating)?;
                container.shares = shares;
            }
            Change::ContainerCreated { id, user } => {
                self.expect(&[Phase::Ready])?;
                let container = self.container_mut(&id)?;
                container.expect_phase(ContainerPhase::Creating)?;
                container.phase = ContainerPhase::Present;
                container.user = Some(user);
            }
            Change::ContainerStarted { id, at } => {
                let container = self.container_mut(&id)?;
                container.expect_phase(ContainerPhase::Present)?;
                container.started_at.get_or_insert(at);
            }
            Change::ContainerOom { id } => self.container_mut(&id)?.oom = true,
            Change::ContainerEnded { id, mut exit } => {
                let container = self.container_mut(&id)?;
                if container.oom && !exit.oom_killed {
                    exit.oom_killed = exit.code == 137;
                }
                if exit.oom_killed {
                    exit.reason = "OOMKilled".into();
                }
                container.exit.get_or_insert(exit);
            }
            Change::LogsDrained { id } => self.container_mut(&id)?.drained = true,
            Change::ContainerResources { id, resources } => {
                self.container_mut(&id)?.resources = *resources;
            }
            Change::ContainerRemoving { id } => {
                self.container_mut(&id)?.phase = ContainerPhase::Removing;
            }
            Change::ContainerGone { id } => {
                self.containers.remove(&id);
                let files = Effect::ContainerFiles { container: id };
                self.ledger.retain(|e| *e != files);
            }
            Change::Planned(_)
            | Change::Undone(_)
            | Change::VmmStarted { .. }
            | Change::Ready { .. }
            | Change::Resized { .. }
            | Change::Stopping
            | Change::Stopped { .. }
            | Change::Removing
            | Change::FileServerStarted { .. }
            | Change::EmptyDirShared { .. }
            | Change::VmDied { .. }
            | Change::OutOfMemory { .. } => {}
        }
        Ok(())
    }

    /// The end of a container that nobody has seen: its VM went with it; on a host, its processes
    /// were killed after those of its agent.
    fn lost(&self, message: String, at: SystemTime) -> ExitView {
        let (code, reason) = match self.spec.host {
            None => (CODE_LOST, "VmDied"),
            Some(_) => (CODE_KILLED, "AgentDied"),
        };
        ExitView { code, oom_killed: false, at, reason: reason.into(), message }
    }

    /// What has not ended by now never will say how.
    fn lose_containers(&mut self, exit: ExitView) {
        for container in self.containers.values_mut() {
            container.exit.get_or_insert_with(|| exit.clone());
            container.drained = true;
        }
    }

    fn expect(&self, phases: &[Phase]) -> Result<(), Misfit> {
        if phases.contains(&self.phase) { Ok(()) } else { Err(Misfit::Pod { phase: self.phase }) }
    }

    fn container_mut(&mut self, id: &str) -> Result<&mut Container, Misfit> {
        self.containers.get_mut(id).ok_or_else(|| Misfit::NoContainer { id: id.to_owned() })
    }

    /// What undoing the pod comes to, last effect first.
    pub(crate) fn to_undo(&self, all: bool) -> Vec<Effect> {
        self.ledger.iter().rev().filter(|e| all || e.ends_with_vm()).cloned().collect()
    }

    pub(crate) fn vmm(&self) -> Option<(u32, u64)> {
        self.ledger.iter().find_map(|e| match e {
            Effect::Vmm { pid, started } => Some((*pid, *started)),
            _ => None,
        })
    }

    /// Leaf of the pod in the host's cgroups.
    pub(crate) fn cgroup(&self) -> Option<&Path> {
        self.ledger.iter().find_map(|effect| match effect {
            Effect::Cgroup { leaf, .. } => Some(leaf.as_path()),
            _ => None,
        })
    }

    pub(crate) fn has_scratch_disk(&self) -> bool {
        self.ledger.iter().any(|effect| matches!(effect, Effect::ScratchDisk { .. }))
    }

    /// Pods that are not there yet, or no longer, are in no listing.
    pub(crate) fn is_listed(&self) -> bool {
        !matches!(self.phase, Phase::Starting | Phase::Removing)
    }

    pub(crate) fn state(&self) -> PodState {
        match self.phase {
            Phase::Starting => PodState::Reserved,
            Phase::Ready => PodState::Ready,
            Phase::Stopping | Phase::NotReady | Phase::Removing => PodState::NotReady,
        }
    }

    pub(crate) fn view(&self) -> PodView {
        PodView {
            id: self.id.clone(),
            spec: self.spec.clone(),
            state: self.state(),
            created_at: self.created_at,
            reason: self.reason.clone(),
            addresses: self.attachment.addresses.clone(),
            netns: Some(self.netns.clone()).filter(|p| !p.as_os_str().is_empty()),
            vmm_pid: self.vmm().map(|(pid, _)| pid),
            kernel_release: self.kernel_release.clone(),
            unread: self.unread,
        }
    }
}

impl Container {
    fn expect_phase(&self, phase: ContainerPhase) -> Result<(), Misfit> {
        if self.phase == phase {
            return Ok(());
        }
        let state = match self.phase {
            ContainerPhase::Creating => "being created",
            ContainerPhase::Present => "there already",
            ContainerPhase::Removing => "being removed",
        };
        Err(Misfit::Container { id: self.id.clone(), state })
    }
}

#[cfg(test)]
pub(crate) mod tests;
