//! What the callers of the server are refused, and what a backend says when it cannot serve.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// What can go wrong at the door: at start, and when a URL is asked for.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("cannot read {path}")]
    Pem { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("certificate {certificate} and key {key} cannot be used")]
    Tls { certificate: PathBuf, key: PathBuf, source: rustls::Error },
    /// The request makes no sense; CRI's InvalidArgument.
    #[error("{0}")]
    Invalid(&'static str),
    /// CRI's ResourceExhausted.
    #[error("{limit} streaming URLs are waiting to be used, which is the limit")]
    TooManyPending { limit: usize },
}
