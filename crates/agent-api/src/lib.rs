//! The guest protocol: messages and gRPC stubs generated from `proto/agent/v1/agent.proto`, and
//! the framing of process streams and forwarded connections.
//!
//! Knows no KVM, no CRI, no transport: it is handed byte streams.

use std::ops::RangeInclusive;

pub mod forward;
pub mod host_pod;
pub mod stdio;

/// Generated from `proto/agent/v1/agent.proto`.
#[allow(clippy::all, unreachable_pub, unused_qualifications, missing_docs)]
pub mod v1 {
    tonic::include_proto!("nacelle.agent.v1");
}

/// Newest version of the protocol that this release speaks; a host names its own in
/// [`v1::HelloRequest`]. Guests outlive daemons, so a new version is spoken beside the one before.
pub const PROTOCOL: u32 = 1;
/// Oldest version that this release speaks.
pub const MIN_PROTOCOL: u32 = 1;
/// vsock port of the gRPC service.
pub const CONTROL_PORT: u32 = 1024;
/// vsock port of process streams.
pub const STDIO_PORT: u32 = 1025;
/// vsock port of forwarded connections ([`forward`]).
pub const FORWARD_PORT: u32 = 1026;
/// Tag of the pod's virtio-fs device, whose top-level entries are the shared volumes.
pub const SHARE_TAG: &str = "nacelle";
/// virtio-blk serial of the pod's scratch disk: ext4 with project quotas, empty at first.
pub const SCRATCH_SERIAL: &str = "scratch";
/// vsock CID of every guest. CIDs are private to a VMM here, so one value serves all.
pub const GUEST_CID: u64 = 3;
/// Largest gRPC message either side takes, bytes. A hostile peer can make the other side hold this
/// much, once a connection.
pub const MAX_MESSAGE: usize = 4 << 20;

/// What an agent that speaks `own` answers to a host whose newest version is `newest`: the newest
/// that both speak, if the host speaks it; with none in common, its own newest.
pub fn negotiate(newest: u32, own: RangeInclusive<u32>) -> u32 {
    if own.contains(&newest) { newest } else { *own.end() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_that_both_speak_is_chosen() {
        for (newest, own, chosen) in [
            (1, 1..=1, 1),
            // A guest of the release before, and a daemon of the release before.
            (2, 1..=1, 1),
            (1, 1..=2, 1),
            (2, 1..=2, 2),
            // Nothing in common; 0: a host that names none.
            (1, 2..=3, 3),
            (0, 1..=2, 2),
        ] {
            assert_eq!(negotiate(newest, own.clone()), chosen, "{newest} {own:?}");
        }
    }

    #[test]
    fn the_release_before_is_spoken_to() {
        assert!((MIN_PROTOCOL..=PROTOCOL).contains(&1), "running guests speak version 1");
    }
}
