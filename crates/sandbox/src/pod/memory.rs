//! Memory of a pod's VM while it runs. The VMM asks the guest, which plugs and unplugs in its own
//! time: the VMM's status tells how far it has come.

use std::time::Duration;

use vmm_api::VmStatus;

use super::handle::Handle;
use crate::error::Error;

/// How often a guest's progress is looked at.
const LOOK: Duration = Duration::from_millis(25);

/// What a guest may keep of the memory it gives back, MiB: a page of its kernel's own that came to
/// lie in a block holds that block (of 2 MiB) for as long as it lives.
const RESIDUE: u32 = 16;

/// How a wish ended for less memory than the VM has.
pub(super) enum Shrunk {
    Done,
    /// The guest uses this much and did not let go of it, MiB.
    Kept(u32),
}

/// Sees to it that the VM has `wanted` MiB at least; answers what it was to have before. What the
/// guest does not take in time is not left for it to take later.
pub(super) async fn grow(handle: &Handle, wanted: u64) -> Result<u32, Error> {
    let status = handle.machine.vmm()?.status().await?;
    let before = status.memory_mib;
    // A VMM that does not know of growing has what it was started with.
    let most = status.max_memory_mib.max(before);
    let wanted = match u32::try_from(wanted) {
        Ok(wanted) if wanted <= most => wanted,
        _ => {
            return Err(Error::OutOfRange {
                message: format!(
                    "{wanted} MiB of memory are wanted, the pod's VM can have {most} MiB: the pod \
                     has to be made anew (max_memory_mib)"
                ),
            });
        }
    };
    if status.max_memory_mib == 0 || wanted <= before && wanted <= status.plugged_mib {
        return Ok(before);
    }
    handle.machine.vmm()?.resize_memory(wanted.max(before)).await?;
    let got = match settle(handle, |has, wanted| has >= wanted).await {
        Ok(None) => return Ok(before),
        Ok(Some(got)) => Ok(got),
        Err(error) => Err(error),
    };
    ungrow(handle, before).await;
    let limit = handle.node.config.guest_call_deadline();
    Err(Error::unavailable(format!(
        "guest has {} of the {wanted} MiB of memory it was to have within {limit:?}",
        got?
    )))
}

/// Undoes a [`grow`], as far as the guest does.
pub(super) async fn ungrow(handle: &Handle, before: u32) {
    let Ok(vmm) = handle.machine.vmm() else { return };
    if let Err(error) = vmm.resize_memory(before).await {
        tracing::warn!(pod = handle.id, %error, "guest keeps memory that nobody wants");
    }
}

/// Lets the guest give back what it has beyond `wanted` MiB, or beyond what its VM was started with.
pub(super) async fn shrink(handle: &Handle, wanted: u32) -> Result<Shrunk, Error> {
    let status = handle.machine.vmm()?.status().await?;
    if status.max_memory_mib == 0 || wanted >= status.memory_mib.max(status.plugged_mib) {
        return Ok(Shrunk::Done);
    }
    handle.machine.vmm()?.resize_memory(wanted).await?;
    // What is left of it the guest goes on trying to give back.
    let settled = settle(handle, |has, wanted| has <= wanted.saturating_add(RESIDUE)).await?;
    let Some(kept) = settled else { return Ok(Shrunk::Done) };
    // It would go on trying, and take from itself what the pod is now said to have.
    handle.machine.vmm()?.resize_memory(kept).await?;
    Ok(Shrunk::Kept(kept))
}

/// Waits until what the guest has (the first) suits what was asked of it; answers what it has if that
/// does not happen.
async fn settle(handle: &Handle, suits: impl Fn(u32, u32) -> bool) -> Result<Option<u32>, Error> {
    let end = tokio::time::Instant::now() + handle.node.config.guest_call_deadline();
    loop {
        let VmStatus { memory_mib, plugged_mib, .. } = handle.machine.vmm()?.status().await?;
        if suits(plugged_mib, memory_mib) {
            return Ok(None);
        }
        if tokio::time::Instant::now() >= end {
            return Ok(Some(plugged_mib));
        }
        tokio::time::sleep(LOOK).await;
    }
}
