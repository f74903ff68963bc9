//! The life cycle of pods and containers: every pod is a microVM with its own owner task.
//!
//! Independent of gRPC servers, CRI, containerd, CNI, registries and KVM: it uses the host's
//! network through [`ports::Network`], the guest through `agent-api` and the VMM through `vmm-api`.
//!
//! Where to start reading: [`Sandboxes`] is the public API, `policy` is the state machine of a pod,
//! `pod` executes it, and `journal` stores it for the next start of the daemon.

mod api;
pub mod apparmor;
mod byte_stream;
mod config;
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
mod reservation;
pub mod session;
pub mod stats;
#[cfg(any(test, feature = "synthetic-pods"))]
pub mod synthetic_pods;
mod template;
#[cfg(test)]
mod tests;
mod unreadable;
mod vmm;

pub use api::Sandboxes;
pub use config::{Config, EmptyDirLocation};
pub use error::Error;
pub use session::{AttachSession, ExecSession, ProcessControl};
