//! Volumes of a container: how each kind gets into the guest.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use agent_api::v1;

use super::handle::Handle;
use super::sync::{self, Synced};
use super::volume_ids::{ETC_VOLUME, volume_id};
use super::{disks, empty_dirs, shares, write_back};
use crate::error::Error;
use crate::host::pool::BlockingPool;
use crate::host::volumes::{SourceKind, source_kind};
use crate::host::{empty_dir, etc, mounts};
use crate::model::{Access, ContainerSpec, Propagation, ShareUse, Volume, VolumeSource};

/// Most volumes of a container; each is a mount, and many need a device or a task.
const MAX_VOLUMES: usize = 256;

/// Most submounts of a share sent to the guest.
const MAX_SUBMOUNTS: usize = 256;

/// Mounts for the guest, and volumes to be updated later.
pub(super) struct Prepared {
    pub(super) mounts: Vec<v1::VolumeMount>,
    pub(super) synced: Vec<Synced>,
    /// The lower layer of the root file system, if it is a host directory
    /// ([`RootfsSpec::image`](crate::model::RootfsSpec::image)).
    pub(super) lower: Option<Lower>,
}

#[derive(Debug, Default)]
pub(super) struct Lower {
    pub(super) share: String,
    pub(super) sub_path: String,
    pub(super) ids_mapped: bool,
}

/// Prepares a container's volumes in the guest; its disks are plugged already. A failure is undone
/// with the container.
pub(super) async fn prepare(
    handle: &Arc<Handle>,
    id: &str,
    spec: &ContainerSpec,
) -> Result<Prepared, Error> {
    if spec.volumes.len() > MAX_VOLUMES {
        let got = spec.volumes.len();
        return Err(Error::invalid(format!("{got} volumes, the limit is {MAX_VOLUMES}")));
    }
    let mut prepared = Prepared { mounts: Vec::new(), synced: Vec::new(), lower: None };
    let shares = shares::prepare(handle, id, spec).await?;
    let mut taken: HashSet<PathBuf> =
        spec.oci.mounts().iter().flatten().map(|m| m.destination().clone()).collect();
    for (n, volume) in spec.volumes.iter().enumerate() {
        if volume.is_lower_layer(&spec.rootfs) {
            let share = shares.get(&n).ok_or_else(|| {
                Error::invalid("a host directory as root file system needs a pod with a VM")
            })?;
            prepared.lower = Some(Lower {
                share: share.name.clone(),
                sub_path: share.sub_path.clone(),
                ids_mapped: !share.ids.is_empty(),
            });
            continue;
        }
        taken.insert(PathBuf::from(&volume.container_path));
        prepared.add(handle, id, (n, volume), shares.get(&n)).await?;
    }
    for (name, destination) in etc::FILES {
        if !taken.contains(Path::new(destination)) {
            prepared.mounts.push(v1::VolumeMount {
                volume_id: ETC_VOLUME.to_owned(),
                destination: destination.to_owned(),
                sub_path: name.to_owned(),
                read_only: spec.rootfs.read_only,
                ..Default::default()
            });
        }
    }
    Ok(prepared)
}

impl Prepared {
    async fn add(
        &mut self,
        handle: &Arc<Handle>,
        container: &str,
        (n, volume): (usize, &Volume),
        share: Option<&ShareUse>,
    ) -> Result<(), Error> {
        let id = volume_id(container, n);
        let mut mount = v1::VolumeMount {
            volume_id: id.clone(),
            destination: volume.container_path.clone(),
            read_only: volume.access != Access::ReadWrite,
            recursive_read_only: volume.access == Access::ReadOnlyRecursive,
            ..Default::default()
        };
        match &volume.source {
            VolumeSource::Copied { host_path } => {
                mount.sub_path = sub_path(&handle.lookups, host_path).await?;
                disks::copy_volume(handle, &id, host_path).await?;
            }
            VolumeSource::Synced { host_path } => {
                self.synced.push(sync::initial_copy(handle, id, host_path.clone()).await?);
            }
            VolumeSource::WrittenBack { host_path } => {
                write_back::open(handle, container, n, host_path).await?;
                mount.sub_path = sub_path(&handle.lookups, host_path).await?;
                disks::copy_volume(handle, &id, host_path).await?;
            }
            VolumeSource::Shared { host_path } if handle.machine.host().is_some() => {
                mount.volume_id = path_text(host_path)?;
                mount.set_source(v1::VolumeSource::Host);
                mount.set_propagation(propagation(volume.propagation));
            }
            VolumeSource::Shared { host_path } => {
                let Some(share) = share else {
                    return Err(Error::Internal(anyhow::anyhow!("a volume without a share")));
                };
                mount.volume_id = share.name.clone();
                mount.sub_path = share.sub_path.clone();
                mount.set_source(v1::VolumeSource::Share);
                if volume.propagation == Propagation::HostToContainer {
                    mount.set_propagation(v1::Propagation::Slave);
                }
                mount.ids_mapped = !share.ids.is_empty();
                if volume.access == Access::ReadOnly {
                    mount.submounts = submounts(&handle.lookups, host_path).await?;
                }
            }
            VolumeSource::EmptyDir { host_path, directory, sub_path, .. } => {
                mount.volume_id = empty_dirs::name(directory)?;
                mount.set_source(v1::VolumeSource::EmptyDir);
                mount.set_propagation(propagation(volume.propagation));
                if !sub_path.is_empty() {
                    mount.sub_path = sub_path.clone();
                    let path = host_path.clone();
                    let what = format!("access {}", host_path.display());
                    let owner =
                        handle.lookups.run_with_limit(&*what, move || empty_dir::owner(&path));
                    let owner = owner.await?.map_err(|e| Error::io(what, e))?;
                    (mount.uid, mount.gid, mount.mode) = (owner.uid, owner.gid, owner.mode);
                }
            }
            VolumeSource::HugePages { name } => {
                mount.volume_id = name.clone();
                mount.set_source(v1::VolumeSource::HugePages);
            }
            VolumeSource::Image { image, sub_path } => {
                mount.volume_id = handle.machine.image(image);
                mount.set_source(v1::VolumeSource::Image);
                mount.sub_path = sub_path.clone();
                mount.read_only = true;
            }
        }
        self.mounts.push(mount);
        Ok(())
    }
}

fn propagation(propagation: Propagation) -> v1::Propagation {
    match propagation {
        Propagation::Private => v1::Propagation::Private,
        Propagation::HostToContainer => v1::Propagation::Slave,
        Propagation::Bidirectional => v1::Propagation::Shared,
    }
}

/// The path as sent to the agent.
fn path_text(path: &Path) -> Result<String, Error> {
    let text = path.to_str().map(str::to_owned);
    text.ok_or_else(|| Error::invalid(format!("{} is not UTF-8", path.display())))
}

/// Submounts of a read-only share, which keep their own access.
async fn submounts(lookups: &BlockingPool, source: &Path) -> Result<Vec<String>, Error> {
    let path = source.to_owned();
    let what = format!("list mounts below {}", source.display());
    let found =
        lookups.run_with_limit(&*what, move || mounts::submounts(&path, MAX_SUBMOUNTS)).await?;
    found.map_err(|e| Error::io(what, e))
}

/// For a copied volume: a file is mounted by its name in the volume.
async fn sub_path(lookups: &BlockingPool, source: &Path) -> Result<String, Error> {
    let what = format!("access {}", source.display());
    let source = source.to_owned();
    Ok(match lookups.run_with_limit(what, move || source_kind(&source)).await?? {
        SourceKind::File { name } => name,
        SourceKind::Directory => String::new(),
    })
}
