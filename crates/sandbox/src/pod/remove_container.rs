//! RemoveContainer: kills it if it runs, removes it in the guest, unplugs its disks, removes its
//! files.

use std::sync::Arc;
use std::time::Duration;

use agent_api::v1;

use super::create_container::delete_container;
use super::handle::Handle;
use super::stop_container::stop_container;
use super::{disks, shares};
use crate::error::Error;
use crate::policy::{Change, ContainerPhase, Phase};

pub(super) async fn remove_container(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    let container = match handle.container(id) {
        Ok(container) => container,
        Err(Error::NotFound { .. }) => return Ok(()),
        Err(e) => return Err(e),
    };
    if container.phase == ContainerPhase::Creating {
        return Err(Error::precondition(format!("container {id} is being created")));
    }
    let ignore_not_found = |result: Result<(), Error>| match result {
        // A concurrent removal finished first.
        Err(Error::NotFound { .. }) => Ok(()),
        other => other,
    };
    if handle.pod().phase == Phase::Ready {
        if container.is_running() {
            ignore_not_found(stop_container(handle, id, Duration::ZERO).await)?;
        }
        ignore_not_found(
            handle.commit(vec![Change::ContainerRemoving { id: id.to_owned() }]).await,
        )?;
        let freed = tokio::select! {
            result = free_in_guest(handle, id) => result,
            () = handle.stopping.cancelled() => Ok(()),
        };
        // If the VM ended meanwhile, nothing is left to free.
        if handle.pod().phase == Phase::Ready && !handle.stopping.is_cancelled() {
            freed?;
        }
    }
    handle.drop_container_tasks(id);
    ignore_not_found(delete_container(handle, id).await)
}

/// Completes a failed creation or removal. The disk is not deleted while the VM may use it.
pub(super) async fn remove_incomplete(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    tokio::select! {
        freed = free_in_guest(handle, id) => match freed {
            Err(Error::NotFound { .. }) => return Ok(()),
            other => other?,
        },
        // The stop of the VM frees everything.
        () = handle.stopping.cancelled() => return Ok(()),
    }
    handle.drop_container_tasks(id);
    delete_container(handle, id).await
}

/// Also used to complete a removal after a crash of the daemon.
pub(super) async fn free_in_guest(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    let spec = handle.container(id)?.spec;
    let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
    handle
        .guest
        .call("remove the container", |mut c| async move { c.remove_container(request).await })
        .await?;
    shares::remove(handle, id).await;
    if let Err(error) = disks::unplug(handle, id, &spec).await {
        // The disk's slot stays used until the VM ends; the container is removed anyway.
        tracing::warn!(container = id, %error, "cannot unplug a disk");
    }
    Ok(())
}
