//! Constants of the balloon device (virtio 1.2, section 5.5).

/// Section 5.5.3: free page reporting (`VIRTIO_BALLOON_F_PAGE_REPORTING`; in Linux
/// `VIRTIO_BALLOON_F_REPORTING`).
pub(super) const F_REPORTING: u64 = 1 << 5;

/// Queues: inflate, deflate, reporting. Section 5.5.2 numbers the last one 4, after two queues of
/// features that are not offered here; drivers (Linux up to 6.12 at least) and devices (QEMU)
/// number only the queues that exist.
///
/// Linux reports up to 32 ranges per report and refuses a shorter reporting queue.
pub(super) const QUEUE_SIZES: [u16; 3] = [16, 16, 32];
