//! The life cycle of pods and containers: every pod a microVM with an owner task of its own.
//!
//! Has never heard of gRPC servers, CRI, containerd, CNI, registries or KVM. It meets the host's
//! network through [`ports::Network`], the guest through `agent-api`, the VMM through `vmm-api`.
//!
//! Where to begin: [`Sandboxes`] is the door, `policy` says what a pod may do, `pod` does it, and
//! `journal` makes it survive us.

mod api;
pub mod apparmor;
mod config;
#[cfg(any(test, feature = "crowd"))]
pub mod crowd;
mod error;
mod failpoint;
pub mod forward;
mod guest;
mod host;
mod journal;
pub mod launcher;
mod logs;
mod machine;
pub mod model;
mod node;
pub mod observe;
mod open;
mod pod;
mod policy;
pub mod ports;
mod registry;
mod rescue;
pub mod session;
pub mod stats;
#[cfg(test)]
mod tests;
mod vmm;

pub use api::Sandboxes;
pub use config::{Config, EmptyDirPlace};
pub use error::Error;
pub use session::{AttachSession, ExecSession, ProcessControl};
