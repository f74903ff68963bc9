//! The two programs that an operator starts: `nacelled`, the daemon ([`daemon`]: wiring,
//! configuration, signals), and `nacelle`, the command line client ([`cli`]) on its socket.

pub mod cli;
pub mod daemon;
pub mod settings;

/// Pods with this annotation and the value "true" are attached to the built-in network where the
/// node has no CNI configuration. `nacelle run` sets it. A kubelet starts no such pod there, because
/// the node's NetworkReady condition stays false.
pub(crate) const DEFAULT_NETWORK_ANNOTATION: &str = "nacelle.dev/default-network";

/// The service that extends the CRI, generated from proto/nacelle/v1/nacelle.proto.
#[allow(unreachable_pub, unused_qualifications, clippy::all)]
pub mod api {
    tonic::include_proto!("nacelle.v1");
}
