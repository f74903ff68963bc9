//! The runtime's side of the Container Network Interface, versions 0.3.0 to 1.1.0
//! (<https://github.com/containernetworking/cni/blob/main/SPEC.md>): network configurations
//! ([`conf`], section 1), running plugins ([`exec`], sections 2 and 3), their answers ([`reply`],
//! section 5), what they are told beside the configuration ([`params`]), and chains of them
//! ([`chain`], section 3 and 4). Knows processes and JSON, has never heard of namespaces or taps.

pub mod chain;
pub mod conf;
pub mod exec;
pub mod params;
mod quantity;
pub mod reply;
