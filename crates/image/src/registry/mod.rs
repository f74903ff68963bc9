//! Client of registries (OCI distribution-spec v1.1, "Pull"; Docker's token authentication).
//!
//! Our own, over reqwest: pulls resume inside of a blob, go through mirrors, and count bytes while
//! they come, which the ready-made registry clients do not offer together.

mod auth;
mod blob;
mod client;
mod hosts;
mod send;
mod session;

pub use auth::Auth;
pub use blob::run_blocking;
pub use session::{Registries, Session};
