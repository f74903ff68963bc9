//! The guest protocol: messages and gRPC stubs generated from `proto/agent/v1/agent.proto`, and the
//! framing of process streams and forwarded connections.
//!
//! Knows nothing of KVM, CRI or transports: callers provide byte streams.

use std::ops::RangeInclusive;

pub mod forward;
pub mod host_pod;
pub mod stdio;

/// Generated from `proto/agent/v1/agent.proto`.
#[allow(clippy::all, unreachable_pub, unused_qualifications, missing_docs)]
pub mod v1 {
    tonic::include_proto!("nacelle.agent.v1");
}

/// Newest protocol version of this release; a host sends its own in [`v1::HelloRequest`]. Guests
/// outlive daemons, so the previous version stays supported.
pub const PROTOCOL: u32 = 1;
/// Oldest supported protocol version.
pub const MIN_PROTOCOL: u32 = 1;
/// vsock port of the gRPC service.
pub const CONTROL_PORT: u32 = 1024;
/// vsock port of process streams.
pub const STDIO_PORT: u32 = 1025;
/// vsock port of forwarded connections ([`forward`]).
pub const FORWARD_PORT: u32 = 1026;
/// Tag of the pod's virtio-fs device; its top-level entries are the shared volumes.
pub const SHARE_TAG: &str = "nacelle";
/// virtio-blk serial of the pod's scratch disk (ext4 with project quotas).
pub const SCRATCH_SERIAL: &str = "scratch";
/// vsock CID of every guest. CIDs are local to a VMM here, so one value is enough.
pub const GUEST_CID: u64 = 3;
/// Maximum size of a gRPC message in both directions, bytes. A hostile peer can make the other side
/// buffer this much for each connection.
pub const MAX_MESSAGE: usize = 4 << 20;

/// The version that an agent supporting `own` replies to a host whose newest version is `newest`:
/// that version if it is supported, otherwise the agent's newest.
pub fn negotiate(newest: u32, own: RangeInclusive<u32>) -> u32 {
    if own.contains(&newest) { newest } else { *own.end() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_common_version_is_chosen() {
        for (newest, own, chosen) in [
            (1, 1..=1, 1),
            // A guest of the previous release, and a daemon of the previous release.
            (2, 1..=1, 1),
            (1, 1..=2, 1),
            (2, 1..=2, 2),
            // No common version; 0 is a host that sends none.
            (1, 2..=3, 3),
            (0, 1..=2, 2),
        ] {
            assert_eq!(negotiate(newest, own.clone()), chosen, "{newest} {own:?}");
        }
    }

    #[test]
    fn the_version_of_the_previous_release_is_supported() {
        assert!((MIN_PROTOCOL..=PROTOCOL).contains(&1), "running guests speak version 1");
    }
}
