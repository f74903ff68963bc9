//! What the server is told, and its caps. Whoever holds a URL may be a user with no more rights
//! than to exec into one pod: nothing that such a client sends may cost others memory or time.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

#[derive(Clone, Debug)]
pub struct Config {
    /// Port 0 takes a free one.
    pub address: SocketAddr,
    pub tls: Option<Tls>,
    /// A connection on which nothing moves for this long is closed.
    pub stream_idle_timeout: Duration,
    /// A URL that nobody uses for this long is forgotten.
    pub url_ttl: Duration,
    pub limits: Limits,
}

/// PEM files; the certificate file may hold a chain.
#[derive(Clone, Debug)]
pub struct Tls {
    pub certificate: PathBuf,
    pub key: PathBuf,
}

#[derive(Clone, Debug)]
pub struct Limits {
    /// URLs handed out and not yet used: else a caller that never uses them grows the table.
    pub pending_urls: usize,
    /// Connections at once; further ones wait in the listener's queue.
    pub connections: usize,
    /// A request line with its headers. hyper has a floor of 8 KiB.
    pub http_header_bytes: usize,
    /// From the connection's start to the end of the request's headers, TLS handshake included
    /// once more: else idle connections use up the above.
    pub http_header_time: Duration,
    /// Streams open at once on one SPDY connection; each may hold some 64 KiB.
    pub streams: usize,
    /// Payload of one SPDY control frame; data frames are not gathered, so they need no cap.
    pub control_frame_bytes: usize,
    /// One header block after inflation: else 16 KiB of zlib become 16 MiB.
    pub header_block_bytes: usize,
    /// How long a client may take to open the streams that it asked for.
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
