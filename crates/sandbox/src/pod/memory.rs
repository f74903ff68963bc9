//! Resizing a running VM's memory. The VMM asks the guest, which plugs and unplugs asynchronously;
//! the VMM's status shows the progress.

use std::time::Duration;

use vmm_api::VmStatus;

use super::handle::Handle;
use crate::error::Error;

/// Interval between two status requests.
const POLL_INTERVAL: Duration = Duration::from_millis(25);

/// Memory that a guest may keep of what it should unplug, MiB: one unmovable kernel page keeps its
/// block of 2 MiB plugged.
const RESIDUE: u32 = 16;

/// Result of a shrink.
pub(super) enum ShrinkResult {
    Done,
    /// The guest kept this much, MiB.
    Kept(u32),
}

/// Grows the VM to at least `wanted` MiB; returns the previous target. On a timeout the target is
/// reset.
pub(super) async fn grow(handle: &Handle, wanted: u64) -> Result<u32, Error> {
    let status = handle.machine.vmm()?.status().await?;
    let before = status.memory_mib;
    // A VMM without memory hotplug has its boot memory.
    let max = status.max_memory_mib.max(before);
    let wanted = match u32::try_from(wanted) {
        Ok(wanted) if wanted <= max => wanted,
        _ => {
            return Err(Error::OutOfRange {
                message: format!(
                    "{wanted} MiB of memory requested, the pod's VM can have at most {max} MiB: \
                     recreate the pod with a higher max_memory_mib"
                ),
            });
        }
    };
    if status.max_memory_mib == 0 || wanted <= before && wanted <= status.plugged_mib {
        return Ok(before);
    }
    handle.machine.vmm()?.resize_memory(wanted.max(before)).await?;
    let got = match wait_for_memory(handle, |has, wanted| has >= wanted).await {
        Ok(None) => return Ok(before),
        Ok(Some(got)) => Ok(got),
        Err(error) => Err(error),
    };
    revert_growth(handle, before).await;
    let limit = handle.node.config.guest_call_deadline();
    Err(Error::unavailable(format!(
        "the guest plugged {} of the {wanted} MiB of memory within {limit:?}",
        got?
    )))
}

/// Resets the target after a [`grow`]; the guest unplugs what it can.
pub(super) async fn revert_growth(handle: &Handle, before: u32) {
    let Ok(vmm) = handle.machine.vmm() else { return };
    if let Err(error) = vmm.resize_memory(before).await {
        tracing::warn!(pod = handle.id, %error, "cannot reset the VM's memory size");
    }
}

/// Shrinks the VM to `wanted` MiB, but not below its boot memory.
pub(super) async fn shrink(handle: &Handle, wanted: u32) -> Result<ShrinkResult, Error> {
    let status = handle.machine.vmm()?.status().await?;
    if status.max_memory_mib == 0 || wanted >= status.memory_mib.max(status.plugged_mib) {
        return Ok(ShrinkResult::Done);
    }
    handle.machine.vmm()?.resize_memory(wanted).await?;
    // The guest continues to unplug the remainder.
    let kept_mib =
        wait_for_memory(handle, |has, wanted| has <= wanted.saturating_add(RESIDUE)).await?;
    let Some(kept) = kept_mib else { return Ok(ShrinkResult::Done) };
    // Raise the target to the kept size; otherwise the guest would continue to unplug memory that
    // the pod is now recorded to have.
    handle.machine.vmm()?.resize_memory(kept).await?;
    Ok(ShrinkResult::Kept(kept))
}

/// Waits until `suits(plugged, target)` is true; returns the plugged size on a timeout.
async fn wait_for_memory(
    handle: &Handle,
    suits: impl Fn(u32, u32) -> bool,
) -> Result<Option<u32>, Error> {
    let end = tokio::time::Instant::now() + handle.node.config.guest_call_deadline();
    loop {
        let VmStatus { memory_mib, plugged_mib, .. } = handle.machine.vmm()?.status().await?;
        if suits(plugged_mib, memory_mib) {
            return Ok(None);
        }
        if tokio::time::Instant::now() >= end {
            return Ok(Some(plugged_mib));
        }
        tokio::time::sleep(POLL_INTERVAL).await;
    }
}
