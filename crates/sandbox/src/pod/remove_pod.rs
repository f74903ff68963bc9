//! RemovePod, the unwinding of a failed start, and the end of a removal that a crash cut short.
//! What is left then is the record; the owner removes it itself, so that nothing is written behind
//! it.

use std::sync::Arc;

use super::handle::Handle;
use super::stop_pod::end_guest;
use super::undo::undo;
use crate::error::Error;
use crate::policy::{Change, Phase};

pub(super) async fn remove_pod(handle: &Arc<Handle>) -> Result<(), Error> {
    let phase = handle.pod().phase;
    handle.closing.cancel();
    if phase == Phase::Ready {
        end_guest(handle).await;
    }
    if phase != Phase::Removing && !handle.pod().ledger.is_empty() {
        let removing = handle.commit(vec![Change::Removing]).await;
        // A full disk must not keep a pod alive: its removal makes room.
        if let Err(error) = removing {
            tracing::warn!(pod = handle.id, %error, "removal is not journaled, goes on");
        }
    }
    // Work on containers has been told to give up; their files must not be made anew behind us.
    let _nobody_works = handle.gate.write().await;
    let (done, result) = undo(handle, true).await;
    if let Err(error) = result {
        let _ = handle.commit(done).await;
        return Err(error);
    }
    Ok(())
}
