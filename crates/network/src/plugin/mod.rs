//! Runtime side of CNI, versions 0.3.0 to 1.1.0
//! (<https://github.com/containernetworking/cni/blob/main/SPEC.md>): network configurations
//! ([`conf`], section 1), running plugins ([`exec`], sections 2 and 3), parameters ([`params`]),
//! results ([`reply`], section 5), and plugin chains ([`chain`], sections 3 and 4). Knows processes
//! and JSON, nothing of namespaces or taps.

pub mod chain;
pub mod conf;
pub mod error;
pub mod exec;
pub mod params;
mod quantity;
pub mod reply;
