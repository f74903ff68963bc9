//! The CRI services for kubelets and crictl: RuntimeService and ImageService of the Kubernetes CRI v1
//! (proto/cri/v1/api.proto) on a unix socket. Conversion in, conversion out: the life cycle is in
//! `sandbox`, images are in `image`, and [`errors`] is the one place that knows gRPC status codes.
//!
//! The rule for requests: each field is applied, or the request is rejected with its name and a
//! reason. Nothing is ignored silently. See [`convert`] for what is rejected and why.

pub mod config;
pub mod convert;
pub mod errors;
mod images;
pub mod observe;
mod runtime;
mod server;
mod streams;
#[cfg(test)]
mod tests;

pub use config::{Config, DefaultSeccomp};
pub use images::Image;
pub use runtime::{Health, Runtime};
pub use server::{ListenError, MAX_MESSAGE, Shutdown, listen, serve};
pub use streams::{Streaming, StreamsError, bind as bind_streams};

/// Types, servers and clients generated from proto/cri/v1/api.proto.
#[allow(unreachable_pub, unused_qualifications, clippy::all)]
pub mod v1 {
    tonic::include_proto!("runtime.v1");
}
