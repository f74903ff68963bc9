//! The life cycle of pods and containers: every pod a microVM with an owner task of its own.
//!
//! Has never heard of gRPC servers, CRI, containerd, CNI, registries or KVM. It meets the host's
//! network through [`ports::Network`], the guest through `agent-api`, the VMM through `vmm-api`.

mod api;
mod config;
mod error;
pub mod launcher;
pub mod model;
pub mod ports;
pub mod session;
pub mod stats;

pub use api::Sandboxes;
pub use config::Config;
pub use error::Error;
pub use session::{AttachSession, ExecSession};
