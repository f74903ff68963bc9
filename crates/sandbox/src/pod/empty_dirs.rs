//! emptyDirs: created in the guest with the attributes of the kubelet's directory on the host, once
//! for all containers of the pod, and kept as long as the guest. One that cannot be created there
//! is shared from the host instead until the pod is removed.

use std::path::Path;
use std::sync::Arc;

use agent_api::v1;

use super::handle::Handle;
use crate::error::Error;
use crate::host::empty_dir::{self, EmptyDirInfo};
use crate::host::volumes::{self, Limits};
use crate::model::VolumeSource;
use crate::policy::{Change, Container};

/// Name in the guest: the kubelet's volume name.
pub(super) fn name(directory: &Path) -> Result<String, Error> {
    let name = directory.file_name().and_then(|name| name.to_str()).map(str::to_owned);
    name.ok_or_else(|| Error::invalid(format!("emptyDir {} has no name", directory.display())))
}

/// Creates a new container's emptyDirs in the guest; those that must be shared become shared
/// volumes.
pub(super) async fn resolve(handle: &Handle, container: &mut Container) -> Result<(), Error> {
    let is_one = |source: &VolumeSource| matches!(source, VolumeSource::EmptyDir { .. });
    if !container.spec.volumes.iter().any(|volume| is_one(&volume.source)) {
        return Ok(());
    }
    let mut made = handle.empty_dirs.lock().await;
    for volume in &mut Arc::make_mut(&mut container.spec).volumes {
        let VolumeSource::EmptyDir { host_path, directory, size_limit, .. } = &volume.source else {
            continue;
        };
        let name = name(directory)?;
        let places = handle.pod().empty_dirs.clone();
        let in_guest = handle.machine.host().is_none()
            && places.in_guest
            && !places.shared.contains(&name)
            && (made.contains(&name) || make(handle, &name, directory, *size_limit).await?);
        if in_guest {
            made.insert(name);
        } else {
            volume.source = VolumeSource::Shared { host_path: host_path.clone() };
        }
    }
    Ok(())
}

/// Returns whether it is in the guest.
async fn make(
    handle: &Handle,
    name: &str,
    directory: &Path,
    size_limit: Option<u64>,
) -> Result<bool, Error> {
    let info = {
        let directory = directory.to_owned();
        let what = format!("access {}", directory.display());
        handle.lookups.run_with_limit(what, move || empty_dir::inspect(&directory)).await??
    };
    let mut request = request(name, &info, size_limit);
    if prepare(handle, request.clone()).await? {
        return Ok(true);
    }
    request.begin = false;
    match fill(handle, directory, &request).await {
        Ok(()) => Ok(true),
        Err(Error::Unsupported { message }) => {
            tracing::warn!(
                pod = handle.id,
                volume = name,
                reason = message,
                "sharing an emptyDir from the host: its content cannot be copied into the guest"
            );
            handle.commit(vec![Change::EmptyDirShared { name: name.to_owned() }]).await?;
            Ok(false)
        }
        Err(error) => Err(error),
    }
}

fn request(name: &str, info: &EmptyDirInfo, size_limit: Option<u64>) -> v1::PrepareEmptyDirRequest {
    let EmptyDirInfo { memory, size_limit: of_directory, owned, is_empty } = info;
    let size_limit = match (size_limit, of_directory) {
        (Some(requested), 0) => requested,
        (Some(requested), of_directory) => requested.min(*of_directory),
        (None, of_directory) => *of_directory,
    };
    v1::PrepareEmptyDirRequest {
        volume_id: name.to_owned(),
        memory: *memory,
        size_limit,
        uid: owned.uid,
        gid: owned.gid,
        mode: owned.mode,
        begin: true,
        files: Vec::new(),
        done: *is_empty,
    }
}

async fn prepare(handle: &Handle, request: v1::PrepareEmptyDirRequest) -> Result<bool, Error> {
    let call = handle
        .guest
        .call("prepare an emptyDir", |mut c| async move { c.prepare_empty_dir(request).await });
    Ok(call.await?.ready)
}

/// Copies the existing content.
async fn fill(
    handle: &Handle,
    directory: &Path,
    request: &v1::PrepareEmptyDirRequest,
) -> Result<(), Error> {
    let config = &handle.node.config;
    let limits = Limits { bytes: config.volume_bytes, files: config.volume_files };
    let mut copy = volumes::Copy::of(&handle.lookups, directory.to_owned(), limits);
    while let Some(files) = copy.next().await? {
        prepare(handle, v1::PrepareEmptyDirRequest { files, ..request.clone() }).await?;
    }
    let last = v1::PrepareEmptyDirRequest { done: true, ..request.clone() };
    match prepare(handle, last).await? {
        true => Ok(()),
        false => Err(Error::Internal(anyhow::anyhow!("the guest did not complete an emptyDir"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::host::empty_dir::Ownership;

    #[test]
    fn the_smaller_of_two_limits_applies() {
        let limit = |of_directory, requested| {
            let owned = Ownership { uid: 1, gid: 2, mode: 0o777 };
            let info =
                EmptyDirInfo { memory: false, size_limit: of_directory, owned, is_empty: true };
            request("v", &info, requested).size_limit
        };
        assert_eq!(limit(0, None), 0);
        assert_eq!(limit(0, Some(5)), 5);
        assert_eq!(limit(7, None), 7);
        assert_eq!(limit(7, Some(5)), 5);
        assert_eq!(limit(4, Some(5)), 4);
    }
}
