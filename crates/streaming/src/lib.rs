//! Exec, attach and port-forward for clients of Kubernetes' remote command protocols: one HTTP
//! server whose one-use URLs are handed out by [`Server`], and which speaks SPDY/3.1 and
//! WebSocket on them.
//!
//! This crate carries bytes. Where they come from and go to is behind [`Backend`]; it has never
//! heard of pods' life cycles, CRI messages or VMs.
//!
//! ```text
//!  client ── TCP or TLS ── http: token, negotiation ──┬─ SPDY link ─────────────┐
//!                                                     └─ WebSocket link ──┐     │
//!                                                        (or SPDY inside) ┴─────┤
//!                          remote_command / port_forward  <── Incoming, Outgoing┘
//!                                     │
//!                                  Backend
//! ```
//! A link is two tasks, one that reads and one that writes, joined to the session by short bounded
//! queues: who does not read or write is held up by TCP, and holds up nobody else.

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
