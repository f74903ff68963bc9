//! State machine of a pod and its containers, as a plain value: no lock, no I/O, no clock.
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
//! A [`Pod`] changes through [`Pod::apply`] only. Every [`Change`] is journaled before its effect
//! is visible, except observations: they have happened whether they are journaled or not.

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

/// Exit code of a container whose VM died before the exit was reported.
pub(crate) const CODE_LOST: i32 = -1;
/// Exit code of a container whose processes were killed: 128 + SIGKILL.
pub(crate) const CODE_KILLED: i32 = 137;
/// Exit code of a container whose process could not be started (as runc and containerd report it).
pub(crate) const CODE_START_ERROR: i32 = 128;

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Phase {
    Starting,
    Ready,
    Stopping,
    NotReady,
    Removing,
}

/// A change on the host made for the pod. It is in the ledger before it is made until it is undone;
/// the undo is idempotent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Directory of the pod's sockets.
    StateDir { path: PathBuf },
    /// The pod's network ([`crate::ports::Network`]).
    Network,
    /// The leaf cgroup, and those ancestors that were created for it.
    Cgroup { leaf: PathBuf, parents: Vec<PathBuf> },
    /// The VMM, once its pid is known; before that, the undo of the cgroup kills it.
    Vmm { pid: u32, started: u64 },
    /// The pod's scratch disk. A pod without one was started by an earlier release: each container
    /// has a disk for its layer.
    ScratchDisk { path: PathBuf },
    /// The pod's file server; before its pid is known, the undo of the cgroup kills it.
    FileServer { pid: u32, started: u64 },
    /// A container's log sidecar, and its writable layer if that is a file or directory of the
    /// host.
    ContainerFiles { container: ContainerId },
}

impl Effect {
    /// Undone when the pod stops; the others when it is removed.
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
    /// The process's output is in the log, or the wait for it timed out. An exit is reported only
    /// then, and stays reported after a restart of the daemon.
    pub(crate) drained: bool,
    pub(crate) oom: bool,
    pub(crate) log_path: PathBuf,
    pub(crate) resources: LinuxResources,
    pub(crate) user: Option<Identity>,
    /// Shares that the container uses; in the file server until its last user is removed.
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

/// Location of a pod's emptyDirs.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct EmptyDirs {
    /// In the guest; otherwise all of them are shared from the host.
    pub(crate) in_guest: bool,
    /// emptyDirs that are shared from the host because they could not be copied.
    pub(crate) shared: BTreeSet<String>,
}

#[derive(Debug, Clone)]
pub(crate) struct Pod {
    pub(crate) id: PodId,
    pub(crate) spec: Arc<PodSpec>,
    pub(crate) created_at: SystemTime,
    pub(crate) phase: Phase,
    pub(crate) reason: String,
    /// Uid of the VMM, reserved until the pod is removed.
    pub(crate) uid: u32,
    pub(crate) netns: PathBuf,
    pub(crate) ledger: Vec<Effect>,
    pub(crate) attachment: Arc<Attachment>,
    pub(crate) kernel_release: String,
    pub(crate) trace: Vec<TracePhase>,
    pub(crate) empty_dirs: EmptyDirs,
    pub(crate) containers: BTreeMap<ContainerId, Container>,
    /// The record is unreadable: the pod can only be stopped and removed; `reason` has the error.
    pub(crate) unreadable: bool,
}

/// All state changes of a pod.
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
    /// Observation: a full disk must not prevent the stop.
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
    /// Observation: the VMM was killed by the host's OOM killer.
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
    ContainerRemoved {
        id: ContainerId,
    },
}

impl Change {
    /// It has happened or cannot be prevented: kept in memory even if it cannot be journaled yet.
    /// After a crash, recovery observes it again.
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

/// A change that is invalid in the current state: the request came too late or twice.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum TransitionError {
    #[error("pod is {phase:?}")]
    Pod { phase: Phase },
    #[error("no container {id:?} in the pod")]
    NoContainer { id: ContainerId },
    #[error("container {id:?} is {state}")]
    Container { id: ContainerId, state: &'static str },
}

impl Pod {
    pub(crate) fn apply(&mut self, change: Change) -> Result<(), TransitionError> {
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
                self.end_containers(self.exit_without_status("pod was stopped".into(), at));
            }
            Change::Removing => self.phase = Phase::Removing,
            Change::VmDied { reason, at } => {
                if self.phase == Phase::Ready {
                    self.phase = Phase::NotReady;
                    self.end_containers(self.exit_without_status(reason.clone(), at));
                    self.reason = reason;
                }
            }
            Change::OutOfMemory { reason, at } => {
                if self.phase == Phase::Ready {
                    self.phase = Phase::NotReady;
                    self.end_containers(ExitView {
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

    fn apply_to_container(&mut self, change: Change) -> Result<(), TransitionError> {
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
            Change::ContainerRemoved { id } => {
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

    /// Exit of a container whose exit was not reported: it ended with its VM, or its processes were
    /// killed after the agent of a host pod.
    fn exit_without_status(&self, message: String, at: SystemTime) -> ExitView {
        let (code, reason) = match self.spec.host {
            None => (CODE_LOST, "VmDied"),
            Some(_) => (CODE_KILLED, "AgentDied"),
        };
        ExitView { code, oom_killed: false, at, reason: reason.into(), message }
    }

    /// Gives this exit to all containers that have not ended.
    fn end_containers(&mut self, exit: ExitView) {
        for container in self.containers.values_mut() {
            container.exit.get_or_insert_with(|| exit.clone());
            container.drained = true;
        }
    }

    fn expect(&self, phases: &[Phase]) -> Result<(), TransitionError> {
        if phases.contains(&self.phase) {
            Ok(())
        } else {
            Err(TransitionError::Pod { phase: self.phase })
        }
    }

    fn container_mut(&mut self, id: &str) -> Result<&mut Container, TransitionError> {
        self.containers
            .get_mut(id)
            .ok_or_else(|| TransitionError::NoContainer { id: id.to_owned() })
    }

    /// Effects to undo, in reverse order.
    pub(crate) fn to_undo(&self, all: bool) -> Vec<Effect> {
        self.ledger.iter().rev().filter(|e| all || e.ends_with_vm()).cloned().collect()
    }

    pub(crate) fn vmm(&self) -> Option<(u32, u64)> {
        self.ledger.iter().find_map(|e| match e {
            Effect::Vmm { pid, started } => Some((*pid, *started)),
            _ => None,
        })
    }

    /// Leaf cgroup of the pod.
    pub(crate) fn cgroup(&self) -> Option<&Path> {
        self.ledger.iter().find_map(|effect| match effect {
            Effect::Cgroup { leaf, .. } => Some(leaf.as_path()),
            _ => None,
        })
    }

    pub(crate) fn has_scratch_disk(&self) -> bool {
        self.ledger.iter().any(|effect| matches!(effect, Effect::ScratchDisk { .. }))
    }

    /// Pods that are starting or being removed are not listed.
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
            unreadable: self.unreadable,
        }
    }
}

impl Container {
    fn expect_phase(&self, phase: ContainerPhase) -> Result<(), TransitionError> {
        if self.phase == phase {
            return Ok(());
        }
        let state = match self.phase {
            ContainerPhase::Creating => "being created",
            ContainerPhase::Present => "there already",
            ContainerPhase::Removing => "being removed",
        };
        Err(TransitionError::Container { id: self.id.clone(), state })
    }
}

#[cfg(test)]
pub(crate) mod tests;
