//! Constants of the PCI transport (virtio 1.2, sections 2.1 and 4.1).

/// PCI vendor id (section 4.1.2).
pub(super) const VENDOR: u16 = 0x1af4;
/// PCI device id of a non-transitional device minus its virtio device type (section 4.1.2).
pub(super) const DEVICE_BASE: u16 = 0x1040;
/// PCI vendor id (section 4.1.2).1: non-transitional devices have revision 1 or higher, subsystem
/// 0x40 or higher.
pub(super) const REVISION: u8 = 1;
pub(super) const SUBSYSTEM: u16 = 0x40;

/// Device status bits (section 2.1).
pub(super) mod status {
    pub(crate) const ACKNOWLEDGE: u8 = 1;
    pub(crate) const DRIVER: u8 = 2;
    pub(crate) const DRIVER_OK: u8 = 4;
    pub(crate) const FEATURES_OK: u8 = 8;
    pub(crate) const NEEDS_RESET: u8 = 64;
    pub(crate) const FAILED: u8 = 128;
    /// Bits that the driver may set.
    pub(crate) const DRIVER_BITS: u8 = ACKNOWLEDGE | DRIVER | DRIVER_OK | FEATURES_OK | FAILED;
}

/// Section 4.1.4: `struct virtio_pci_cap`, as the body of a vendor capability.
pub(super) const CAP_VENDOR: u8 = 0x09;
pub(super) const CAP_MSIX: u8 = 0x11;
pub(super) const CFG_COMMON: u8 = 1;
pub(super) const CFG_NOTIFY: u8 = 2;
pub(super) const CFG_ISR: u8 = 3;
pub(super) const CFG_DEVICE: u8 = 4;
pub(super) const CFG_PCI: u8 = 5;

/// Offsets in `struct virtio_pci_common_cfg` (section 4.1.4.3).
pub(super) mod common {
    pub(crate) const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub(crate) const DEVICE_FEATURE: u64 = 0x04;
    pub(crate) const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub(crate) const DRIVER_FEATURE: u64 = 0x0c;
    pub(crate) const CONFIG_VECTOR: u64 = 0x10;
    pub(crate) const NUM_QUEUES: u64 = 0x12;
    pub(crate) const DEVICE_STATUS: u64 = 0x14;
    pub(crate) const CONFIG_GENERATION: u64 = 0x15;
    pub(crate) const QUEUE_SELECT: u64 = 0x16;
    pub(crate) const QUEUE_SIZE: u64 = 0x18;
    pub(crate) const QUEUE_VECTOR: u64 = 0x1a;
    pub(crate) const QUEUE_ENABLE: u64 = 0x1c;
    pub(crate) const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub(crate) const QUEUE_DESC: u64 = 0x20;
    pub(crate) const QUEUE_DRIVER: u64 = 0x28;
    pub(crate) const QUEUE_DEVICE: u64 = 0x30;
    /// Bytes of the structure, including two fields of features that are not offered.
    pub(crate) const SIZE: u64 = 0x3c;
}

/// `VIRTIO_MSI_NO_VECTOR` (section 4.1.5.1.2).
pub(super) const NO_VECTOR: u16 = 0xffff;
/// ISR bits (section 4.1.4.5).
pub(super) const ISR_QUEUE: u8 = 1;
pub(super) const ISR_CONFIG: u8 = 2;

/// BAR 0: one page per structure, so that each could be mapped separately.
pub(super) mod layout {
    pub(crate) const BAR: u8 = 0;
    pub(crate) const PAGE: u64 = 0x1000;
    pub(crate) const COMMON: u64 = 0;
    pub(crate) const ISR: u64 = PAGE;
    pub(crate) const DEVICE: u64 = 2 * PAGE;
    pub(crate) const NOTIFY: u64 = 3 * PAGE;
    pub(crate) const MSIX_TABLE: u64 = 4 * PAGE;
    pub(crate) const MSIX_PENDING: u64 = 5 * PAGE;
    pub(crate) const SIZE: u64 = 8 * PAGE;
    /// `notify_off_multiplier`: bytes between the doorbells of two queues.
    pub(crate) const NOTIFY_STRIDE: u32 = 4;
}

const _: () = assert!(layout::SIZE.is_power_of_two());
