//! Registry client (OCI distribution-spec v1.1, "Pull"; Docker's token authentication).
//!
//! Own implementation over reqwest: existing clients do not combine resuming inside a blob, mirrors
//! and byte progress.

mod auth;
mod authority;
mod blob;
mod client;
mod hosts;
mod send;
mod session;

pub use auth::Auth;
pub use blob::run_blocking;
pub use session::{Registries, Session};
