//! SPDY/3.1 as used by Kubernetes clients (moby/spdystream): streams opened by the client, with
//! half-close. Flow control windows are neither sent nor enforced, as spdystream ignores them; TCP
//! is the only flow control, so a stream that its session does not read blocks the others of the
//! connection.
//!
//! Specification: SPDY Protocol, Draft 3.1, sections 2.2 (frames) and 2.6 (control frames).

mod dictionary;
pub(crate) mod frame;
pub(crate) mod headers;
mod link;

pub(crate) use headers::Headers;
pub(crate) use link::{Options, Stream, start};
