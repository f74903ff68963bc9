//! Numbers of the balloon device (virtio 1.2, section 5.5).

/// Section 5.5.3: the driver reports pages that it has no use for (`VIRTIO_BALLOON_F_PAGE_REPORTING`
/// there, `VIRTIO_BALLOON_F_REPORTING` in Linux).
pub(super) const F_REPORTING: u64 = 1 << 5;

/// Queues: inflate, deflate, reporting. Section 5.5.2 numbers the last one 4, after two that exist
/// only with features which are not offered here; drivers (Linux up to 6.12 at least) and devices
/// (QEMU) leave no gap for queues that do not exist.
///
/// Linux reports up to 32 ranges at once and refuses a shorter reporting queue.
pub(super) const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
