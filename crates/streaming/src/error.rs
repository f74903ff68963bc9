//! Errors of the server's start and of URL requests.

use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

/// Errors of [`crate::Server::bind`] and of URL requests.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("cannot listen on {address}")]
    Bind { address: SocketAddr, source: io::Error },
    #[error("cannot read {path}")]
    Pem { path: PathBuf, source: rustls::pki_types::pem::Error },
    #[error("cannot use certificate {certificate} with key {key}")]
    Tls { certificate: PathBuf, key: PathBuf, source: rustls::Error },
    /// Invalid parameters; CRI's InvalidArgument.
    #[error("{0}")]
    Invalid(&'static str),
    /// CRI's ResourceExhausted.
    #[error("the maximum of {limit} unused streaming URLs is reached")]
    TooManyPending { limit: usize },
}
