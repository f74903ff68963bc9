//! RemovePod; also undoes a failed start, and completes a removal after a crash. The owner removes
//! the record afterwards, so that no later write restores it.

use std::sync::Arc;

use super::handle::Handle;
use super::stop_pod::end_guest;
use super::undo::undo;
use crate::error::Error;
use crate::policy::{Change, Phase};

pub(super) async fn remove_pod(handle: &Arc<Handle>) -> Result<(), Error> {
    let phase = handle.pod().phase;
    handle.stopping.cancel();
    if phase == Phase::Ready {
        end_guest(handle).await;
    }
    if phase != Phase::Removing && !handle.pod().ledger.is_empty() {
        let removing = handle.commit(vec![Change::Removing]).await;
        // A full disk must not prevent the removal, which frees space.
        if let Err(error) = removing {
            tracing::warn!(pod = handle.id, %error, "removal is not journaled, continuing");
        }
    }
    // Jobs on containers were cancelled; wait for them, so that they create no files afterwards.
    let _no_jobs = handle.jobs_lock.write().await;
    let (done, result) = undo(handle, true).await;
    if let Err(error) = result {
        let _ = handle.commit(done).await;
        return Err(error);
    }
    Ok(())
}
