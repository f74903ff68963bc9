//! RemoveContainer: killed if it runs, freed in the guest, its disks pulled, its files removed.

use std::sync::Arc;
use std::time::Duration;

use agent_api::v1;

use super::create_container::forget;
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
    let gone = |result: Result<(), Error>| match result {
        // Another removal was quicker.
        Err(Error::NotFound { .. }) => Ok(()),
        other => other,
    };
    if handle.pod().phase == Phase::Ready {
        if container.is_running() {
            gone(stop_container(handle, id, Duration::ZERO).await)?;
        }
        gone(handle.commit(vec![Change::ContainerRemoving { id: id.to_owned() }]).await)?;
        let freed = tokio::select! {
            result = free_in_guest(handle, id) => result,
            () = handle.closing.cancelled() => Ok(()),
        };
        // With the VM gone meanwhile, there is nothing left to free.
        if handle.pod().phase == Phase::Ready && !handle.closing.is_cancelled() {
            freed?;
        }
    }
    handle.drop_live(id);
    gone(forget(handle, id).await)
}

/// The end of a creation or a removal that failed half-way. Its disk is not deleted while the VM may
/// have it.
pub(super) async fn remove_left(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    tokio::select! {
        freed = free_in_guest(handle, id) => match freed {
            Err(Error::NotFound { .. }) => return Ok(()),
            other => other?,
        },
        // With the VM it goes all at once.
        () = handle.closing.cancelled() => return Ok(()),
    }
    handle.drop_live(id);
    forget(handle, id).await
}

/// Also the end of a removal that a crash of the daemon cut short.
pub(super) async fn free_in_guest(handle: &Arc<Handle>, id: &str) -> Result<(), Error> {
    let spec = handle.container(id)?.spec;
    let request = v1::RemoveContainerRequest { container_id: id.to_owned() };
    handle
        .guest
        .call("remove the container", |mut c| async move { c.remove_container(request).await })
        .await?;
    shares::remove(handle, id).await;
    if let Err(error) = disks::unplug(handle, id, &spec).await {
        // The disk's slot stays taken until the VM ends; the container is gone all the same.
        tracing::warn!(container = id, %error, "a disk stays in the VM");
    }
    Ok(())
}
