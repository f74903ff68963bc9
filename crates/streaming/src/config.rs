//! Configuration and limits of the server. A client with a URL may have no more rights than exec
//! into one pod, so nothing that it sends may cost others memory or time.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Config {
    /// Port 0 selects a free port.
    pub address: SocketAddr,
    pub tls: Option<Tls>,
    /// A connection without data for this time is closed.
    pub stream_idle_timeout: Duration,
    /// Validity of a URL that is not used.
    pub url_ttl: Duration,
    pub limits: Limits,
}

/// PEM files; the certificate file may contain a chain.
#[derive(Clone, Debug)]
pub struct Tls {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone, Debug)]
pub struct Limits {
    /// Maximum URLs that are issued and not used.
    pub pending_urls: usize,
    /// Maximum connections; further ones wait in the listen backlog.
    pub connections: usize,
    /// Maximum size of the request line with headers, bytes. hyper's minimum is 8 KiB.
    pub http_header_bytes: usize,
    /// Time from the start of a connection to the end of the request's headers; the same again for
    /// a TLS handshake. Bounds how long idle connections take up `connections`.
    pub http_header_time: Duration,
    /// Maximum open streams on one SPDY connection; each may hold about 64 KiB.
    pub streams: usize,
    /// Maximum payload of a SPDY control frame, bytes. Data frames are not buffered whole, so they
    /// have no limit.
    pub control_frame_bytes: usize,
    /// Maximum size of an inflated header block, bytes: 16 KiB of zlib could inflate to 16 MiB.
    pub header_block_bytes: usize,
    /// Time for a client to open the streams of its request.
    pub stream_creation: Duration,
}

impl Default for Config {
    fn default() -> Self {
        Config {
            address: SocketAddr::from(([127, 0, 0, 1], 0)),
            tls: None,
            stream_idle_timeout: Duration::from_secs(4 * 60 * 60),
            url_ttl: Duration::from_secs(60),
            limits: Limits::default(),
        }
    }
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            pending_urls: 1000,
            connections: 4096,
            http_header_bytes: 16 << 10,
            http_header_time: Duration::from_secs(10),
            streams: 1024,
            control_frame_bytes: 16 << 10,
            header_block_bytes: 64 << 10,
            stream_creation: Duration::from_secs(30),
        }
    }
}
