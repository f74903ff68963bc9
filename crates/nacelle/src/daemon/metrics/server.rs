//! The HTTP server of the metrics. Clients are not trusted: few at a time, each with a deadline for all of
//! its connection.

use std::convert::Infallible;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::prometheus_text;
use prometheus_client::registry::Registry;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::settings::Listen;

/// Connections at a time; others wait in the socket's backlog.
pub(super) const MAX_CONNECTIONS: usize = 8;
/// From accept to the end of the reply. A connection serves one request.
const CONNECTION_LIMIT: Duration = Duration::from_secs(10);
/// Of a request's line and headers, bytes; 8 KiB is the least that hyper accepts.
const MAX_HEAD: usize = 8 << 10;
/// After a failed accept (no free descriptor).
const PAUSE: Duration = Duration::from_millis(100);

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

enum Listener {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    async fn accept(&self) -> io::Result<Box<dyn Stream>> {
        Ok(match self {
            Self::Unix(listener) => Box::new(listener.accept().await?.0),
            Self::Tcp(listener) => Box::new(listener.accept().await?.0),
        })
    }
}

/// Serves until it is dropped.
pub(crate) struct Server {
    _task: JoinSet<()>,
    #[cfg(test)]
    pub(super) slots: Arc<Semaphore>,
    /// Removed at the end.
    socket: Option<PathBuf>,
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(socket) = &self.socket {
            let _ = std::fs::remove_file(socket);
        }
    }
}

impl Server {
    /// None if metrics are off.
    pub(crate) async fn start(
        listen: &Listen,
        registry: impl FnOnce() -> Arc<Registry>,
    ) -> Result<Option<Self>> {
        Self::start_with(listen, registry, CONNECTION_LIMIT).await
    }

    pub(super) async fn start_with(
        listen: &Listen,
        registry: impl FnOnce() -> Arc<Registry>,
        limit: Duration,
    ) -> Result<Option<Self>> {
        let (listener, socket) = match listen {
            Listen::Off => return Ok(None),
            Listen::Unix(path) => (Listener::Unix(cri::listen(path)?), Some(path.clone())),
            Listen::Tcp(address) => {
                let listener = TcpListener::bind(address).await;
                (Listener::Tcp(listener.with_context(|| format!("listening on {address}"))?), None)
            }
        };
        let mut task = JoinSet::new();
        let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
        task.spawn(serve(listener, registry(), slots.clone(), limit));
        tracing::info!(%listen, "metrics are served");
        Ok(Some(Self {
            _task: task,
            #[cfg(test)]
            slots,
            socket,
        }))
    }
}

async fn serve(
    listener: Listener,
    registry: Arc<Registry>,
    slots: Arc<Semaphore>,
    limit: Duration,
) {
    // Ended with this task.
    let mut connections = JoinSet::new();
    loop {
        while connections.try_join_next().is_some() {}
        let Ok(slot) = slots.clone().acquire_owned().await else { return };
        let stream = match listener.accept().await {
            Ok(stream) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection for metrics");
                tokio::time::sleep(PAUSE).await;
                continue;
            }
        };
        let registry = registry.clone();
        connections.spawn(async move {
            let _slot = slot;
            let connection = http1::Builder::new()
                .keep_alive(false)
                .timer(TokioTimer::new())
                .header_read_timeout(limit)
                .max_buf_size(MAX_HEAD)
                .serve_connection(
                    TokioIo::new(stream),
                    service_fn(|request| reply(registry.clone(), request)),
                );
            match tokio::time::timeout(limit, connection).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => tracing::debug!(%error, "metrics: connection failed"),
                Err(_) => tracing::debug!("metrics: connection took too long and was closed"),
            }
        });
    }
}

async fn reply(
    registry: Arc<Registry>,
    request: Request<Incoming>,
) -> Result<Response<Full<Bytes>>, Infallible> {
    if request.uri().path() != "/metrics" {
        return Ok(text(StatusCode::NOT_FOUND, "the metrics are at /metrics\n"));
    }
    if !matches!(*request.method(), Method::GET | Method::HEAD) {
        let mut refused = text(StatusCode::METHOD_NOT_ALLOWED, "GET and HEAD only\n");
        refused.headers_mut().insert(ALLOW, "GET, HEAD".parse().expect("a valid value"));
        return Ok(refused);
    }
    // Reads /proc, and may take milliseconds on a full node.
    let encoded = tokio::task::spawn_blocking(move || {
        let mut encoded = String::new();
        prometheus_text::encode(&mut encoded, &registry).map(|()| encoded)
    });
    let Ok(Ok(encoded)) = encoded.await else {
        return Ok(text(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be encoded\n"));
    };
    let mut reply = Response::new(Full::from(encoded));
    let kind = prometheus_text::CONTENT_TYPE.parse().expect("a valid value");
    reply.headers_mut().insert(CONTENT_TYPE, kind);
    Ok(reply)
}

fn text(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut reply = Response::new(Full::from(text));
    *reply.status_mut() = status;
    reply
}
