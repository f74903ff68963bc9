//! A container in its pod's record.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::SystemTime;

use oci_spec::runtime::LinuxResources;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use serde_json::value::{RawValue, to_raw_value};

use super::convert::{all, same_fields, same_variants};
use super::error::BadRecord;
use super::pod_spec::StoredMeta;
use crate::model::{
    Access, BlockDevice, ContainerSpec, ExitView, Identity, PidMode, Propagation, RootfsSpec,
    ShareUse, Volume, VolumeSource,
};
use crate::policy::{Container, ContainerPhase};

/// An object of the OCI runtime spec as JSON; its content is not part of the record's format.
#[derive(Serialize, Deserialize)]
#[serde(transparent)]
struct OciJson(Box<RawValue>);

impl OciJson {
    fn of(object: &impl Serialize) -> Result<Self, serde_json::Error> {
        to_raw_value(object).map(Self)
    }

    fn parse<T: DeserializeOwned>(&self, what: &'static str, id: &str) -> Result<T, BadRecord> {
        serde_json::from_str(self.0.get()).map_err(|source| {
            let container = id.to_owned();
            BadRecord::Oci { what, container, source }
        })
    }
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct StoredContainer {
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
    /// `linux.resources` of the OCI runtime spec.
    #[serde(default)]
    resources: Option<OciJson>,
    user: Option<StoredIdentity>,
    #[serde(default)]
    shares: Vec<StoredShareUse>,
    spec: StoredContainerSpec,
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
struct StoredExit {
    code: i32,
    oom_killed: bool,
    at: SystemTime,
    reason: String,
    message: String,
}

#[derive(Serialize, Deserialize)]
struct StoredIdentity {
    uid: u32,
    gid: u32,
    groups: Vec<u32>,
}

#[derive(Serialize, Deserialize)]
struct StoredShareUse {
    volume: usize,
    name: String,
    source: PathBuf,
    sub_path: String,
    access: StoredAccess,
    propagation: StoredPropagation,
    ids: String,
    strict: bool,
}

#[derive(Serialize, Deserialize)]
struct StoredContainerSpec {
    meta: StoredMeta,
    rootfs: StoredRootfs,
    oci: OciJson,
    user: String,
    pid: StoredPidMode,
    stdin: bool,
    stdin_once: bool,
    tty: bool,
    log_path: String,
    volumes: Vec<StoredVolume>,
    devices: Vec<StoredBlockDevice>,
    strict_groups: bool,
    image_name: String,
    image_id: String,
    stop_signal: u32,
    #[serde(default)]
    strict_volumes: Vec<String>,
    /// The caller's request as JSON; not interpreted.
    origin: Value,
}

#[derive(Serialize, Deserialize)]
struct StoredRootfs {
    image: PathBuf,
    read_only: bool,
    #[serde(default)]
    volumes: Vec<String>,
}

#[derive(Serialize, Deserialize)]
enum StoredPidMode {
    Container,
    Pod,
    Target(String),
    Node,
}

#[derive(Serialize, Deserialize)]
struct StoredVolume {
    container_path: String,
    source: StoredVolumeSource,
    access: StoredAccess,
    propagation: StoredPropagation,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredVolumeSource {
    Copied { host_path: PathBuf },
    Synced { host_path: PathBuf },
    WrittenBack { host_path: PathBuf },
    Shared { host_path: PathBuf },
    Image { image: PathBuf, sub_path: String },
    EmptyDir { host_path: PathBuf, folder: PathBuf, sub_path: String, size_limit: Option<u64> },
    HugePages { name: String },
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(clippy::enum_variant_names)] // names on disk
enum StoredAccess {
    ReadWrite,
    ReadOnly,
    ReadOnlyRecursive,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum StoredPropagation {
    Private,
    HostToContainer,
    Bidirectional,
}

#[derive(Serialize, Deserialize)]
struct StoredBlockDevice {
    host_path: PathBuf,
    container_path: String,
    permissions: String,
}

same_variants!(StoredContainerPhase = ContainerPhase { Creating, Present, Removing });
same_fields!(StoredExit = ExitView { code, oom_killed, at, reason, message });
same_fields!(StoredIdentity = Identity { uid, gid, groups });
same_fields!(StoredRootfs = RootfsSpec { image, read_only, volumes });
same_fields!(StoredBlockDevice = BlockDevice { host_path, container_path, permissions });
same_variants!(StoredAccess = Access { ReadWrite, ReadOnly, ReadOnlyRecursive });
same_variants!(StoredPropagation = Propagation { Private, HostToContainer, Bidirectional });

impl From<PidMode> for StoredPidMode {
    fn from(live: PidMode) -> Self {
        match live {
            PidMode::Container => Self::Container,
            PidMode::Pod => Self::Pod,
            PidMode::Target(id) => Self::Target(id),
            PidMode::Node => Self::Node,
        }
    }
}

impl From<StoredPidMode> for PidMode {
    fn from(stored: StoredPidMode) -> Self {
        match stored {
            StoredPidMode::Container => Self::Container,
            StoredPidMode::Pod => Self::Pod,
            StoredPidMode::Target(id) => Self::Target(id),
            StoredPidMode::Node => Self::Node,
        }
    }
}

impl From<VolumeSource> for StoredVolumeSource {
    fn from(live: VolumeSource) -> Self {
        match live {
            VolumeSource::Copied { host_path } => Self::Copied { host_path },
            VolumeSource::Synced { host_path } => Self::Synced { host_path },
            VolumeSource::WrittenBack { host_path } => Self::WrittenBack { host_path },
            VolumeSource::Shared { host_path } => Self::Shared { host_path },
            VolumeSource::Image { image, sub_path } => Self::Image { image, sub_path },
            VolumeSource::EmptyDir { host_path, directory: folder, sub_path, size_limit } => {
                Self::EmptyDir { host_path, folder, sub_path, size_limit }
            }
            VolumeSource::HugePages { name } => Self::HugePages { name },
        }
    }
}

impl From<StoredVolumeSource> for VolumeSource {
    fn from(stored: StoredVolumeSource) -> Self {
        use StoredVolumeSource as Stored;
        match stored {
            Stored::Copied { host_path } => Self::Copied { host_path },
            Stored::Synced { host_path } => Self::Synced { host_path },
            Stored::WrittenBack { host_path } => Self::WrittenBack { host_path },
            Stored::Shared { host_path } => Self::Shared { host_path },
            Stored::Image { image, sub_path } => Self::Image { image, sub_path },
            Stored::EmptyDir { host_path, folder, sub_path, size_limit } => {
                Self::EmptyDir { host_path, directory: folder, sub_path, size_limit }
            }
            Stored::HugePages { name } => Self::HugePages { name },
        }
    }
}

impl From<Volume> for StoredVolume {
    fn from(live: Volume) -> Self {
        let Volume { container_path, source, access, propagation } = live;
        let (access, propagation) = (access.into(), propagation.into());
        Self { container_path, source: source.into(), access, propagation }
    }
}

impl From<StoredVolume> for Volume {
    fn from(stored: StoredVolume) -> Self {
        let StoredVolume { container_path, source, access, propagation } = stored;
        let (access, propagation) = (access.into(), propagation.into());
        Self { container_path, source: source.into(), access, propagation }
    }
}

impl From<ShareUse> for StoredShareUse {
    fn from(live: ShareUse) -> Self {
        let ShareUse { volume, name, source, sub_path, access, propagation, ids, strict } = live;
        let (access, propagation) = (access.into(), propagation.into());
        Self { volume, name, source, sub_path, access, propagation, ids, strict }
    }
}

impl From<StoredShareUse> for ShareUse {
    fn from(stored: StoredShareUse) -> Self {
        let StoredShareUse { volume, name, source, sub_path, access, propagation, ids, strict } =
            stored;
        let (access, propagation) = (access.into(), propagation.into());
        Self { volume, name, source, sub_path, access, propagation, ids, strict }
    }
}

impl TryFrom<ContainerSpec> for StoredContainerSpec {
    type Error = serde_json::Error;

    fn try_from(live: ContainerSpec) -> Result<Self, serde_json::Error> {
        let ContainerSpec {
            meta,
            rootfs,
            oci,
            user,
            pid,
            stdin,
            stdin_once,
            tty,
            log_path,
            volumes,
            devices,
            strict_groups,
            image_name,
            image_id,
            stop_signal,
            strict_volumes,
            origin,
        } = live;
        Ok(Self {
            meta: meta.into(),
            rootfs: rootfs.into(),
            oci: OciJson::of(&oci)?,
            user,
            pid: pid.into(),
            stdin,
            stdin_once,
            tty,
            log_path,
            volumes: all(volumes),
            devices: all(devices),
            strict_groups,
            image_name,
            image_id,
            stop_signal,
            strict_volumes,
            origin,
        })
    }
}

impl StoredContainerSpec {
    /// `container`: id for the error.
    fn into_live(self, container: &str) -> Result<ContainerSpec, BadRecord> {
        let Self {
            meta,
            rootfs,
            oci,
            user,
            pid,
            stdin,
            stdin_once,
            tty,
            log_path,
            volumes,
            devices,
            strict_groups,
            image_name,
            image_id,
            stop_signal,
            strict_volumes,
            origin,
        } = self;
        Ok(ContainerSpec {
            meta: meta.into(),
            rootfs: rootfs.into(),
            oci: oci.parse("spec", container)?,
            user,
            pid: pid.into(),
            stdin,
            stdin_once,
            tty,
            log_path,
            volumes: all(volumes),
            devices: all(devices),
            strict_groups,
            image_name,
            image_id,
            stop_signal,
            strict_volumes,
            origin,
        })
    }
}

impl TryFrom<Container> for StoredContainer {
    type Error = serde_json::Error;

    fn try_from(live: Container) -> Result<Self, serde_json::Error> {
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
        } = live;
        Ok(Self {
            id,
            phase: phase.into(),
            created_at,
            started_at,
            exit: exit.map(Into::into),
            drained,
            oom,
            log_path,
            resources: Some(OciJson::of(&resources)?),
            user: user.map(Into::into),
            shares: all(shares),
            spec: Arc::unwrap_or_clone(spec).try_into()?,
        })
    }
}

impl TryFrom<StoredContainer> for Container {
    type Error = BadRecord;

    fn try_from(stored: StoredContainer) -> Result<Self, BadRecord> {
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
        let resources: Option<LinuxResources> =
            resources.map(|json| json.parse("resources", &id)).transpose()?;
        Ok(Self {
            spec: Arc::new(spec.into_live(&id)?),
            id,
            phase: phase.into(),
            created_at,
            started_at,
            exit: exit.map(Into::into),
            drained,
            oom,
            log_path,
            resources: resources.unwrap_or_default(),
            user: user.map(Into::into),
            shares: all(shares),
        })
    }
}
