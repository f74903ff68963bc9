//! SPDY/3.1 as far as Kubernetes' clients use it (moby/spdystream): streams that the client opens,
//! both directions of each closed on their own. Windows are neither kept nor enforced, as that
//! library ignores them: TCP is the only flow control. So a stream that its session does not read
//! holds up the others of its connection.
//!
//! Specification: SPDY Protocol, Draft 3.1, sections 2.2 (frames) and 2.6 (control frames).

mod dictionary;
pub(crate) mod frame;
pub(crate) mod headers;
mod link;

pub(crate) use headers::Headers;
pub(crate) use link::{Options, Stream, start};
