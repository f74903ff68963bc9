//! The runtime's name.

/// Runtime type as configured in containerd; the binary's name is derived from it.
pub(crate) const RUNTIME: &str = "io.containerd.nacelle.v2";
