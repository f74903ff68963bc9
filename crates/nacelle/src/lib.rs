//! The two programs that an operator starts: `nacelled`, the daemon ([`daemon`]: wiring,
//! configuration, signals), and `nacelle`, the command line client ([`cli`]) on its socket.

// print! and println! panic when the reader has closed the pipe.
#![deny(clippy::print_stdout)]

use std::io::Write;

pub mod cli;
pub mod daemon;
pub mod settings;

/// Pods with this annotation and the value "true" are attached to the built-in network where the
/// node has no CNI configuration. `nacelle run` sets it. It has no effect on a kubelet's pods.
pub(crate) const DEFAULT_NETWORK_ANNOTATION: &str = "nacelle.dev/default-network";

/// Prints a line to standard output.
pub(crate) fn say(line: std::fmt::Arguments<'_>) -> std::io::Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_fmt(line)?;
    out.write_all(b"\n")
}

/// Whether an error comes from a reader that has closed the pipe early (`| head`), which is not a
/// failure.
pub(crate) fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| error.kind() == std::io::ErrorKind::BrokenPipe)
    })
}

/// The service that extends the CRI, generated from proto/nacelle/v1/nacelle.proto.
#[allow(unreachable_pub, unused_qualifications, clippy::all)]
pub mod api {
    tonic::include_proto!("nacelle.v1");
}
