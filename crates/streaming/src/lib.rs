//! Exec, attach and port-forward with the streaming protocols of Kubernetes: an HTTP server with
//! one-use URLs, issued by [`Server`], that supports SPDY/3.1 and WebSocket.
//!
//! The crate transfers bytes; processes and ports are behind [`Backend`]. It knows nothing of pod
//! life cycles, CRI messages or VMs.
//!
//! ```text
//!  client ── TCP or TLS ── http: token, negotiation ──┬─ SPDY link ─────────────┐
//!                                                     └─ WebSocket link ──┐     │
//!                                                        (or SPDY inside) ┴─────┤
//!                          remote_command / port_forward  <── Incoming, Outgoing┘
//!                                     │
//!                                  Backend
//! ```
//! A link has a reader and a writer task, connected with the session by bounded queues: a client or
//! process that does not read is throttled by TCP flow control and delays no other connection.

mod backend;
#[cfg(any(test, feature = "client"))]
pub mod client;
mod config;
mod error;
mod http;
mod io;
mod link;
mod pending;
mod port_forward;
mod remote_command;
mod resize;
mod server;
mod spdy;
mod status;
#[cfg(test)]
mod tests;
mod websocket;

pub use backend::{
    AttachParams, Backend, BackendError, ByteReader, ByteStream, ByteWriter, ExecParams,
    PortForwardParams, Process, ReadWrite, Session, StdinEnd, TtySize,
};
pub use config::{Config, Limits, Tls};
pub use error::Error;
pub use server::Server;
