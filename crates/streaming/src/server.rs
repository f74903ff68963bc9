//! The listening socket, TLS, and the issuing of URLs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::task::AbortOnDropHandle;

use crate::backend::{AttachParams, Backend, ExecParams, PortForwardParams};
use crate::config::{Config, Tls};
use crate::error::Error;
use crate::http::{self, Shared};
use crate::link::Peer;
use crate::pending::{Pending, Request};

/// Backlog of listen(2).
const BACKLOG: u32 = 256;
/// Delay after a failed accept, usually EMFILE.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves until it is dropped, which ends all sessions.
pub struct Server {
    address: SocketAddr,
    base_url: String,
    pending: Arc<Pending>,
    _accept: AbortOnDropHandle<()>,
}

impl Server {
    /// Starts to listen. Must be called in a tokio runtime.
    pub fn bind(config: Config, backend: Arc<dyn Backend>) -> Result<Server, Error> {
        let tls = config.tls.as_ref().map(acceptor).transpose()?;
        let requested = config.address;
        let (listener, address) =
            listen(requested).map_err(|source| Error::Bind { address: requested, source })?;
        let scheme = if tls.is_some() { "https" } else { "http" };
        let base_url = format!("{scheme}://{address}");
        let pending = Arc::new(Pending::new(config.url_ttl, config.limits.pending_urls));
        let shared = Arc::new(Shared { config, pending: pending.clone(), backend });
        let accept = tokio::spawn(accept(listener, tls, shared));
        Ok(Server { address, base_url, pending, _accept: AbortOnDropHandle::new(accept) })
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// URL of the server, without a slash at the end.
    pub fn base_url(&self) -> &str {
        &self.base_url
    }

    pub fn exec_url(&self, params: ExecParams) -> Result<String, Error> {
        let ExecParams { container, command, tty, stdin, stdout, stderr } = &params;
        check(container, *tty, [*stdin, *stdout, *stderr])?;
        if command.is_empty() {
            return Err(Error::Invalid("the command is empty"));
        }
        self.url(Request::Exec(params))
    }

    pub fn attach_url(&self, params: AttachParams) -> Result<String, Error> {
        let AttachParams { container, tty, stdin, stdout, stderr } = &params;
        check(container, *tty, [*stdin, *stdout, *stderr])?;
        self.url(Request::Attach(params))
    }

    pub fn port_forward_url(&self, params: PortForwardParams) -> Result<String, Error> {
        if params.pod.is_empty() {
            return Err(Error::Invalid("the pod id is empty"));
        }
        if params.ports.contains(&0) {
            return Err(Error::Invalid("port 0 cannot be forwarded"));
        }
        self.url(Request::PortForward(params))
    }

    fn url(&self, request: Request) -> Result<String, Error> {
        let path = self.pending.add(request)?;
        Ok(format!("{}{path}", self.base_url))
    }
}

fn check(container: &str, tty: bool, [stdin, stdout, stderr]: [bool; 3]) -> Result<(), Error> {
    if container.is_empty() {
        return Err(Error::Invalid("the container id is empty"));
    }
    if tty && stderr {
        return Err(Error::Invalid(
            "tty and stderr cannot both be true, as a terminal has one output",
        ));
    }
    if !stdin && !stdout && !stderr {
        return Err(Error::Invalid("one of stdin, stdout and stderr must be true"));
    }
    Ok(())
}

fn listen(address: SocketAddr) -> std::io::Result<(TcpListener, SocketAddr)> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?;
    // Inherited by connections: detects peers that disappear without closing.
    socket.set_keepalive(true)?;
    socket.bind(address)?;
    let listener = socket.listen(BACKLOG)?;
    let address = listener.local_addr()?;
    Ok((listener, address))
}

fn acceptor(tls: &Tls) -> Result<TlsAcceptor, Error> {
    let Tls { certificate, key } = tls;
    let pem = |path: &std::path::Path| {
        let path = path.to_owned();
        |source| Error::Pem { path, source }
    };
    let chain = CertificateDer::pem_file_iter(certificate)
        .and_then(Iterator::collect::<Result<Vec<_>, _>>)
        .map_err(pem(certificate))?;
    let private = PrivateKeyDer::from_pem_file(key).map_err(pem(key))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .and_then(|builder| builder.with_no_client_auth().with_single_cert(chain, private))
        .map_err(|source| Error::Tls {
            certificate: certificate.clone(),
            key: key.clone(),
            source,
        })?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, shared: Arc<Shared>) {
    let semaphore = Arc::new(Semaphore::new(shared.config.limits.connections));
    let mut connections = JoinSet::new();
    loop {
        let Ok(permit) = semaphore.clone().acquire_owned().await else { return };
        let accepted = loop {
            tokio::select! {
                accepted = listener.accept() => break accepted,
                Some(ended) = connections.join_next() => report(ended),
            }
        };
        match accepted {
            Ok((socket, _)) => {
                let (tls, shared) = (tls.clone(), shared.clone());
                connections.spawn(async move {
                    let _permit = permit;
                    if let Err(error) = connection(socket, tls, shared).await {
                        tracing::debug!(%error, "streaming connection");
                    }
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept streaming connections");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

fn report(ended: Result<(), tokio::task::JoinError>) {
    if let Err(error) = ended {
        tracing::error!(%error, "streaming connection");
    }
}

async fn connection(
    socket: TcpStream,
    tls: Option<TlsAcceptor>,
    shared: Arc<Shared>,
) -> std::io::Result<()> {
    socket.set_nodelay(true)?;
    let peer = Peer::of(&socket)?;
    match tls {
        None => exchange(socket, &shared, peer).await,
        Some(tls) => {
            let limit = shared.config.limits.http_header_time;
            let socket = tokio::time::timeout(limit, tls.accept(socket)).await??;
            exchange(socket, &shared, peer).await
        }
    }
}

/// Handles one request and its session.
async fn exchange(
    socket: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    shared: &Arc<Shared>,
    peer: Peer,
) -> std::io::Result<()> {
    let (upgrades, mut upgraded) = mpsc::channel(1);
    let service = service_fn(|request| http::respond(request, shared.clone(), upgrades.clone()));
    let limits = &shared.config.limits;
    http1::Builder::new()
        .max_buf_size(limits.http_header_bytes)
        .timer(TokioTimer::new())
        .header_read_timeout(limits.http_header_time)
        .serve_connection(TokioIo::new(socket), service)
        .with_upgrades()
        .await
        .map_err(std::io::Error::other)?;
    if let Ok(upgrade) = upgraded.try_recv() {
        http::run(upgrade, shared, peer).await;
    }
    Ok(())
}
