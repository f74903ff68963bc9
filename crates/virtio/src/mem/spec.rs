//! Constants of the memory device (virtio 1.2, section 5.15).

/// Section 5.15.3: the driver must not access unplugged memory, not even read it.
pub(super) const F_UNPLUGGED_INACCESSIBLE: u64 = 1 << 1;

/// `struct virtio_mem_config` (section 5.15.4).
pub(super) const CONFIG_LEN: usize = 56;

/// `struct virtio_mem_req` (section 5.15.6): type, padding, address, blocks, padding.
pub(super) const REQUEST_LEN: usize = 24;
/// `struct virtio_mem_resp`: type, padding, state.
pub(super) const RESPONSE_LEN: usize = 10;

pub(super) mod request {
    pub(crate) const PLUG: u16 = 0;
    pub(crate) const UNPLUG: u16 = 1;
    pub(crate) const UNPLUG_ALL: u16 = 2;
    pub(crate) const STATE: u16 = 3;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Response {
    Ack = 0,
    /// The request would exceed `requested_size`.
    Nack = 1,
    Error = 3,
}

/// State in the response to [`request::STATE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Plugged {
    All = 0,
    None = 1,
    Some = 2,
}
