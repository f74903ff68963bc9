//! Power-off of the guest.

use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Time for killed processes to exit before the sync.
const GRACE: Duration = Duration::from_millis(500);

/// Kills all processes, syncs and powers off. Returns only if that fails.
pub async fn power_off(populated: impl Fn() -> bool) {
    // All processes except PID 1.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    let deadline = tokio::time::Instant::now() + GRACE;
    while populated() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    unmount_disks();
    // For file systems that could not be unmounted. Matters for volumes only, as the scratch disk
    // ends with the pod.
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    tracing::error!(%error, "cannot power off");
}

/// Unmounts block devices, overlays and the share, newest first.
fn unmount_disks() {
    let mounts = std::fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    for line in mounts.lines().rev() {
        let mut fields = line.split(' ');
        let (Some(source), Some(target)) = (fields.next(), fields.next()) else { continue };
        let is_share = fields.next() == Some("virtiofs");
        if source.starts_with("/dev/") || source == "overlay" || is_share {
            let _ = umount2(target, MntFlags::MNT_DETACH);
        }
    }
}
