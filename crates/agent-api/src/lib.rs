//! The guest protocol: messages and gRPC stubs generated from `proto/agent/v1/agent.proto`, and
//! the framing of process streams and forwarded connections.
//!
//! Knows no KVM, no CRI, no transport: it is handed byte streams.

pub mod forward;
pub mod host_pod;
pub mod stdio;

/// Generated from `proto/agent/v1/agent.proto`.
#[allow(clippy::all, unreachable_pub, unused_qualifications, missing_docs)]
pub mod v1 {
    tonic::include_proto!("nacelle.agent.v1");
}

/// Version of the protocol in [`v1::HelloRequest`].
pub const PROTOCOL: u32 = 1;
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
