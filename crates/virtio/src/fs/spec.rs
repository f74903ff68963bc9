//! Numbers of the file system device (virtio 1.2, section 5.11), of the vhost-user protocol that its
//! backend speaks (QEMU `docs/interop/vhost-user.rst`), and the two FUSE headers (linux/fuse.h) that
//! are needed to answer for a backend that is gone.

/// Section 5.11.4: UTF-8, padded with NULs, not terminated where it fills the field.
pub const TAG_LEN: usize = 36;
/// `struct virtio_fs_config` without the field of a feature that is not offered.
pub(super) const CONFIG_LEN: usize = TAG_LEN + 4;

/// Section 5.11.2: the first queue is for requests that must not wait behind others, those after it
/// are for requests. As many as their tokens leave room for.
pub(super) const QUEUES_MAX: usize = 16;

/// vhost-user, frontend message types.
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

/// Header: type, flags, payload size, each 32 bits in the machine's order.
pub(super) const HEADER_LEN: usize = 12;
/// Flags of a message, and those of a reply.
pub(super) const FLAGS_VERSION: u32 = 1;
pub(super) const FLAGS_REPLY: u32 = FLAGS_VERSION | 4;
/// Payload of every reply that is asked for here: a 64-bit number, or a queue and a 32-bit number.
pub(super) const REPLY_PAYLOAD: usize = 8;
/// Feature bit of the protocol itself; with it rings start only when they are enabled.
pub(super) const F_PROTOCOL_FEATURES: u64 = 1 << 30;

/// `struct fuse_in_header`: length, opcode, unique, and more that does not matter here.
pub(super) const FUSE_IN_UNIQUE: usize = 8;
/// `struct fuse_out_header`: length, error, unique.
pub(super) const FUSE_OUT_LEN: usize = 16;
