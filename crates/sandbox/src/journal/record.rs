//! On-disk form of a pod. These types change with [`VERSION`] only. The in-memory types
//! ([`crate::policy`], [`crate::model`], [`crate::ports`]) may change freely; both conversions name
//! every field, so a forgotten field does not compile. A record has no in-memory type and none of
//! another crate, except std; the OCI runtime spec is stored as JSON ([`container`]).

mod container;
mod convert;
mod error;
mod network;
mod pod_spec;

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use self::container::StoredContainer;
use self::convert::{all, same_fields, same_variants};
pub(crate) use self::error::BadRecord;
use self::error::VERSION;
use self::network::StoredAttachment;
use self::pod_spec::{StoredMeta, StoredPodSpec};
use crate::model::{Meta, PodSpec, TracePhase};
use crate::policy::{Container, Effect, EmptyDirs, Phase, Pod};
use crate::ports::Attachment;

#[derive(Serialize, Deserialize)]
struct RecordVersion {
    version: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Record {
    version: u32,
    /// Boot id of the host when the record was written.
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
    attachment: StoredAttachment,
    #[serde(default)]
    kernel_release: String,
    #[serde(default)]
    trace: Vec<StoredTracePhase>,
    /// Missing in records of earlier releases: all emptyDirs are shared.
    #[serde(default)]
    empty_dirs: StoredEmptyDirs,
    spec: StoredPodSpec,
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
struct StoredTracePhase {
    name: String,
    start_us: u64,
    duration_us: u64,
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
        empty_dirs,
        containers,
        // Such a pod is not written.
        unreadable: _,
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
        ledger: all(ledger),
        attachment: Arc::unwrap_or_clone(attachment).into(),
        kernel_release,
        trace: all(trace),
        empty_dirs: empty_dirs.into(),
        spec: Arc::unwrap_or_clone(spec).into(),
        containers: containers
            .into_values()
            .map(StoredContainer::try_from)
            .collect::<Result<Vec<_>, _>>()?,
    };
    Ok(serde_json::to_vec(&record)?)
}

/// The pod and the boot id of its record.
pub(crate) fn decode(bytes: &[u8]) -> Result<(Pod, String), BadRecord> {
    let RecordVersion { version } = serde_json::from_slice(bytes)?;
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
        empty_dirs,
        spec,
        containers,
    } = serde_json::from_slice(bytes)?;
    let containers = containers.into_iter().map(Container::try_from);
    let containers = containers.map(|container| container.map(|c| (c.id.clone(), c)));
    let pod = Pod {
        id,
        spec: Arc::new(spec.into()),
        created_at,
        phase: phase.into(),
        reason,
        uid,
        netns,
        ledger: all(ledger),
        attachment: Arc::new(attachment.into()),
        kernel_release,
        trace: all(trace),
        empty_dirs: empty_dirs.into(),
        containers: containers.collect::<Result<_, _>>()?,
        unreadable: false,
    };
    Ok((pod, boot_id))
}

/// Readable fields of a record that is otherwise unreadable.
#[derive(Debug, Default)]
pub(crate) struct PartialRecord {
    pub(crate) boot_id: Option<String>,
    pub(crate) created_at: Option<SystemTime>,
    pub(crate) uid: Option<u32>,
    pub(crate) netns: Option<PathBuf>,
    /// The readable effects.
    pub(crate) ledger: Vec<Effect>,
    pub(crate) attachment: Option<Attachment>,
    pub(crate) meta: Option<Meta>,
    pub(crate) spec: Option<PodSpec>,
}

pub(crate) fn decode_partial(bytes: &[u8], id: &str) -> PartialRecord {
    fn field<T: DeserializeOwned>(record: &Value, name: &str) -> Option<T> {
        T::deserialize(record.get(name)?).ok()
    }
    let Ok(record) = serde_json::from_slice::<Value>(bytes) else {
        return PartialRecord::default();
    };
    if record.get("id").and_then(Value::as_str) != Some(id) {
        return PartialRecord::default();
    }
    let ledger: Vec<Value> = field(&record, "ledger").unwrap_or_default();
    let known = ledger.into_iter().filter_map(|effect| StoredEffect::deserialize(effect).ok());
    PartialRecord {
        boot_id: field(&record, "boot_id"),
        created_at: field(&record, "created_at"),
        uid: field(&record, "uid"),
        netns: field(&record, "netns"),
        ledger: known.map(Effect::from).collect(),
        attachment: field::<StoredAttachment>(&record, "attachment").map(Into::into),
        meta: record.get("spec").and_then(|spec| field::<StoredMeta>(spec, "meta")).map(Into::into),
        spec: field::<StoredPodSpec>(&record, "spec").map(Into::into),
    }
}

same_variants!(StoredPhase = Phase { Starting, Ready, Stopping, NotReady, Removing });
same_fields!(StoredEmptyDirs = EmptyDirs { in_guest, shared });
same_fields!(StoredTracePhase = TracePhase { name, start_us, duration_us });

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
