//! The end of the guest.

use std::time::Duration;

use nix::mount::{MntFlags, umount2};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// For killed processes to go, before file systems are written out.
const GRACE: Duration = Duration::from_millis(500);

/// Kills everything, writes everything out, and powers off. Returns only if power-off fails.
pub async fn power_off(populated: impl Fn() -> bool) {
    // From PID 1: everything but itself.
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
    let deadline = tokio::time::Instant::now() + GRACE;
    while populated() && tokio::time::Instant::now() < deadline {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    unmount_disks();
    // `data=ordered` journals of what could not be unmounted. Scratch disks die with the pod, so
    // this matters for volumes only.
    nix::unistd::sync();
    let Err(error) = reboot(RebootMode::RB_POWER_OFF);
    tracing::error!(%error, "cannot power off");
}

/// Unmounts what stands on block devices and on the host's folders, the newest first.
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
