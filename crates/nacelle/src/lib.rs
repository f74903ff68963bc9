//! The two programs for people: `nacelled`, the node's daemon ([`daemon`]: wiring, configuration,
//! signals), and `nacelle`, the command ([`cli`]), which talks to it over its socket.

pub mod cli;
pub mod daemon;
pub mod settings;

/// The service beside the CRI, generated from proto/nacelle/v1/nacelle.proto.
#[allow(unreachable_pub, unused_qualifications, clippy::all)]
pub mod api {
    tonic::include_proto!("nacelle.v1");
}
