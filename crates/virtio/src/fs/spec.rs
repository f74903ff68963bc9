//! Constants of the file system device (virtio 1.2, section 5.11), of the vhost-user protocol (QEMU
//! `docs/interop/vhost-user.rst`), and of the two FUSE headers (linux/fuse.h) that are needed to
//! answer requests after the back end has exited.

/// Section 5.11.4: UTF-8, padded with NULs, not terminated where it fills the field.
pub const TAG_LEN: usize = 36;
/// `struct virtio_fs_config` without the field of a feature that is not offered.
pub(super) const CONFIG_LEN: usize = TAG_LEN + 4;

/// Section 5.11.2: the hiprio queue and up to 15 request queues. The event loop has no tokens for more.
pub(super) const QUEUES_MAX: usize = 16;

/// vhost-user: message types of the front end.
pub(super) mod request {
    pub(crate) const GET_FEATURES: u32 = 1;
    pub(crate) const SET_FEATURES: u32 = 2;
    pub(crate) const SET_OWNER: u32 = 3;
    pub(crate) const SET_MEM_TABLE: u32 = 5;
    pub(crate) const SET_VRING_NUM: u32 = 8;
    pub(crate) const SET_VRING_ADDR: u32 = 9;
    pub(crate) const SET_VRING_BASE: u32 = 10;
    pub(crate) const GET_VRING_BASE: u32 = 11;
    pub(crate) const SET_VRING_KICK: u32 = 12;
    pub(crate) const SET_VRING_CALL: u32 = 13;
    pub(crate) const SET_VRING_ENABLE: u32 = 18;
}

/// Header: type, flags, payload size; 32 bits each in native byte order.
pub(super) const HEADER_LEN: usize = 12;
/// Flags of a message: version 1. A reply also has the reply flag.
pub(super) const FLAGS_VERSION: u32 = 1;
pub(super) const FLAGS_REPLY: u32 = FLAGS_VERSION | 4;
/// Payload length of all replies used here: a u64, or a `struct vhost_vring_state`.
pub(super) const REPLY_PAYLOAD: usize = 8;
/// `VHOST_USER_F_PROTOCOL_FEATURES`: rings start disabled, until SET_VRING_ENABLE.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// `struct fuse_in_header`: offset of `unique`, after length and opcode.
pub(super) const FUSE_IN_UNIQUE: usize = 8;
/// Length of `struct fuse_out_header`: length, error, unique.
pub(super) const FUSE_OUT_LEN: usize = 16;
