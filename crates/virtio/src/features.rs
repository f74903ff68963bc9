//! Feature bits of all device types (virtio 1.2, section 6).

/// The driver may use indirect descriptors.
pub const RING_INDIRECT_DESC: u64 = 1 << 28;
/// `used_event` and `avail_event` suppress notifications (section 2.7.7).
pub const RING_EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device; the driver must accept it.
pub const VERSION_1: u64 = 1 << 32;

/// Offered by every device here.
pub const COMMON: u64 = RING_INDIRECT_DESC | RING_EVENT_IDX | VERSION_1;
