//! A pod as it stands on disk. These types change with [`VERSION`] only; the live ones
//! ([`crate::policy`]) may change at will, and forgetting a field does not compile: both directions
//! name every one.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::runtime::LinuxResources;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::model::{ContainerSpec, ExitView, Identity, Meta, PodSpec, ShareUse, TracePhase};
use crate::policy::{Container, ContainerPhase, Effect, EmptyDirs, Phase, Pod};
use crate::ports::Attachment;

/// Of this layout. A record of another one is not read, and its pod is shown as not ready.
const VERSION: u32 = 2;

#[derive(Debug, thiserror::Error)]
pub(crate) enum BadRecord {
    #[error("record is of version {got}, this release reads {VERSION}")]
    Version { got: u32 },
    #[error("record is unreadable")]
    Json(#[from] serde_json::Error),
}

#[derive(Serialize, Deserialize)]
struct Head {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    /// Of the host, when the record was written.
    boot_id: String,
    id: String,
    created_at: SystemTime,
    phase: StoredPhase,
    #[serde(default)]
    reason: String,
    uid: u32,
    netns: PathBuf,
    ledger: Vec<StoredEffect>,
    #[serde(default)]
    attachment: Attachment,
    #[serde(default)]
    kernel_release: String,
    #[serde(default)]
    trace: Vec<TracePhase>,
    /// Pods of former releases have all of them shared.
    #[serde(default)]
    empty_dirs: StoredEmptyDirs,
    spec: PodSpec,
    containers: Vec<StoredContainer>,
}

#[derive(Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredEmptyDirs {
    in_guest: bool,
    shared: BTreeSet<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredPhase {
    Starting,
    Ready,
    Stopping,
    NotReady,
    Removing,
}

#[derive(Serialize, Deserialize)]
#[serde(tag = "effect", rename_all = "snake_case")]
enum StoredEffect {
    StateDir { path: PathBuf },
    Network,
    Cgroup { leaf: PathBuf, parents: Vec<PathBuf> },
    Vmm { pid: u32, started: u64 },
    ScratchDisk { path: PathBuf },
    FileServer { pid: u32, started: u64 },
    ContainerFiles { container: String },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredContainerPhase {
    Creating,
    Present,
    Removing,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredContainer {
    id: String,
    phase: StoredContainerPhase,
    created_at: SystemTime,
    started_at: Option<SystemTime>,
    exit: Option<StoredExit>,
    #[serde(default)]
    drained: bool,
    #[serde(default)]
    oom: bool,
    #[serde(default)]
    log_path: PathBuf,
    #[serde(default)]
    resources: LinuxResources,
    user: Option<Identity>,
    #[serde(default)]
    shares: Vec<ShareUse>,
    spec: ContainerSpec,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredExit {
    code: i32,
    oom_killed: bool,
    at: SystemTime,
    reason: String,
    message: String,
}

pub(crate) fn encode(pod: &Pod, boot_id: &str) -> io::Result<Vec<u8>> {
    let Pod {
        id,
        spec,
        created_at,
        phase,
        reason,
        uid,
        netns,
        ledger,
        attachment,
        kernel_release,
        trace,
        empty_dirs: EmptyDirs { in_guest, shared },
        containers,
        // Such a pod is never written.
        unread: _,
    } = pod.clone();
    let record = Record {
        version: VERSION,
        boot_id: boot_id.to_owned(),
        id,
        created_at,
        phase: phase.into(),
        reason,
        uid,
        netns,
        ledger: ledger.into_iter().map(Into::into).collect(),
        attachment: (*attachment).clone(),
        kernel_release,
        trace,
        empty_dirs: StoredEmptyDirs { in_guest, shared },
        spec: (*spec).clone(),
        containers: containers.into_values().map(Into::into).collect(),
    };
    Ok(serde_json::to_vec(&record)?)
}

/// The pod and the id of the boot in which it was written.
pub(crate) fn decode(bytes: &[u8]) -> Result<(Pod, String), BadRecord> {
    let Head { version } = serde_json::from_slice(bytes)?;
    if version != VERSION {
        return Err(BadRecord::Version { got: version });
    }
    let Record {
        version: _,
        boot_id,
        id,
        created_at,
        phase,
        reason,
        uid,
        netns,
        ledger,
        attachment,
        kernel_release,
        trace,
        empty_dirs: StoredEmptyDirs { in_guest, shared },
        spec,
        containers,
    } = serde_json::from_slice(bytes)?;
    let pod = Pod {
        id,
        spec: Arc::new(spec),
        created_at,
        phase: phase.into(),
        reason,
        uid,
        netns,
        ledger: ledger.into_iter().map(Into::into).collect(),
        attachment: Arc::new(attachment),
        kernel_release,
        trace,
        empty_dirs: EmptyDirs { in_guest, shared },
        containers: containers.into_iter().map(|c| (c.id.clone(), c.into())).collect(),
        unread: false,
    };
    Ok((pod, boot_id))
}

/// What single fields of a record say that is otherwise not understood.
#[derive(Debug, Default)]
pub(crate) struct Rescued {
    pub(crate) boot_id: Option<String>,
    pub(crate) created_at: Option<SystemTime>,
    pub(crate) uid: Option<u32>,
    pub(crate) netns: Option<PathBuf>,
    /// Those effects that are understood.
    pub(crate) ledger: Vec<Effect>,
    pub(crate) attachment: Option<Attachment>,
    pub(crate) meta: Option<Meta>,
    pub(crate) spec: Option<PodSpec>,
}

pub(crate) fn rescue(bytes: &[u8], id: &str) -> Rescued {
    fn field<T: DeserializeOwned>(record: &Value, name: &str) -> Option<T> {
        T::deserialize(record.get(name)?).ok()
    }
    let Ok(record) = serde_json::from_slice::<Value>(bytes) else { return Rescued::default() };
    if record.get("id").and_then(Value::as_str) != Some(id) {
        return Rescued::default();
    }
    let ledger: Vec<Value> = field(&record, "ledger").unwrap_or_default();
    let known = ledger.into_iter().filter_map(|effect| StoredEffect::deserialize(effect).ok());
    Rescued {
        boot_id: field(&record, "boot_id"),
        created_at: field(&record, "created_at"),
        uid: field(&record, "uid"),
        netns: field(&record, "netns"),
        ledger: known.map(Effect::from).collect(),
        attachment: field(&record, "attachment"),
        meta: record.get("spec").and_then(|spec| field(spec, "meta")),
        spec: field(&record, "spec"),
    }
}

impl From<Phase> for StoredPhase {
    fn from(phase: Phase) -> Self {
        match phase {
            Phase::Starting => Self::Starting,
            Phase::Ready => Self::Ready,
            Phase::Stopping => Self::Stopping,
            Phase::NotReady => Self::NotReady,
            Phase::Removing => Self::Removing,
        }
    }
}

impl From<StoredPhase> for Phase {
    fn from(phase: StoredPhase) -> Self {
        match phase {
            StoredPhase::Starting => Self::Starting,
            StoredPhase::Ready => Self::Ready,
            StoredPhase::Stopping => Self::Stopping,
            StoredPhase::NotReady => Self::NotReady,
            StoredPhase::Removing => Self::Removing,
        }
    }
}

impl From<Effect> for StoredEffect {
    fn from(effect: Effect) -> Self {
        match effect {
            Effect::StateDir { path } => Self::StateDir { path },
            Effect::Network => Self::Network,
            Effect::Cgroup { leaf, parents } => Self::Cgroup { leaf, parents },
            Effect::Vmm { pid, started } => Self::Vmm { pid, started },
            Effect::ScratchDisk { path } => Self::ScratchDisk { path },
            Effect::FileServer { pid, started } => Self::FileServer { pid, started },
            Effect::ContainerFiles { container } => Self::ContainerFiles { container },
        }
    }
}

impl From<StoredEffect> for Effect {
    fn from(effect: StoredEffect) -> Self {
        match effect {
            StoredEffect::StateDir { path } => Self::StateDir { path },
            StoredEffect::Network => Self::Network,
            StoredEffect::Cgroup { leaf, parents } => Self::Cgroup { leaf, parents },
            StoredEffect::Vmm { pid, started } => Self::Vmm { pid, started },
            StoredEffect::ScratchDisk { path } => Self::ScratchDisk { path },
            StoredEffect::FileServer { pid, started } => Self::FileServer { pid, started },
            StoredEffect::ContainerFiles { container } => Self::ContainerFiles { container },
        }
    }
}

impl From<Container> for StoredContainer {
    fn from(container: Container) -> Self {
        let Container {
            id,
            spec,
            phase,
            created_at,
            started_at,
            exit,
            drained,
            oom,
            log_path,
            resources,
            user,
            shares,
        } = container;
        let phase = match phase {
            ContainerPhase::Creating => StoredContainerPhase::Creating,
            ContainerPhase::Present => StoredContainerPhase::Present,
            ContainerPhase::Removing => StoredContainerPhase::Removing,
        };
        let exit = exit.map(|ExitView { code, oom_killed, at, reason, message }| StoredExit {
            code,
            oom_killed,
            at,
            reason,
            message,
        });
        let spec = (*spec).clone();
        Self {
            id,
            phase,
            created_at,
            started_at,
            exit,
            drained,
            oom,
            log_path,
            resources,
            user,
            shares,
            spec,
        }
    }
}

impl From<StoredContainer> for Container {
    fn from(stored: StoredContainer) -> Self {
        let StoredContainer {
            id,
            phase,
            created_at,
            started_at,
            exit,
            drained,
            oom,
            log_path,
            resources,
            user,
            shares,
            spec,
        } = stored;
        let phase = match phase {
            StoredContainerPhase::Creating => ContainerPhase::Creating,
            StoredContainerPhase::Present => ContainerPhase::Present,
            StoredContainerPhase::Removing => ContainerPhase::Removing,
        };
        let exit = exit.map(|StoredExit { code, oom_killed, at, reason, message }| ExitView {
            code,
            oom_killed,
            at,
            reason,
            message,
        });
        Self {
            id,
            spec: Arc::new(spec),
            phase,
            created_at,
            started_at,
            exit,
            drained,
            oom,
            log_path,
            resources,
            user,
            shares,
        }
    }
}
