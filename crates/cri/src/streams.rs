//! Backend of the streaming server: commands, containers and ports of this node's
//! pods. Bytes flow between the client and the guest; nothing here keeps them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use sandbox::Sandboxes;
use sandbox::model::{ExecSpec, ExitView};
use sandbox::session::{AttachProcess, ExecProcess};
use serde::{Deserialize, Serialize};
use streaming::{
    AttachParams, Backend, BackendError, ByteReader, ByteStream, ExecParams, Process, Server,
    Session, StdinEnd, Tls, TtySize,
};

/// Settings of the streaming server.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Streaming {
    pub address: IpAddr,
    /// 0: a free one.
    pub port: u16,
    /// PEM files; both empty: no TLS, which is for loopback only.
    pub tls_certificate: PathBuf,
    pub tls_key: PathBuf,
    /// A session on which nothing moves for this long is closed.
    pub idle_timeout_seconds: u32,
}

impl Default for Streaming {
    fn default() -> Self {
        Self {
            address: IpAddr::V4(Ipv4Addr::LOCALHOST),
            port: 0,
            tls_certificate: PathBuf::new(),
            tls_key: PathBuf::new(),
            idle_timeout_seconds: 4 * 60 * 60,
        }
    }
}

#[derive(Debug, thiserror::Error)]
pub enum StreamsError {
    #[error("tls_certificate and tls_key go together; only one is given")]
    HalfTls,
    #[error("streaming on {0} needs tls_certificate and tls_key: only loopback is private without")]
    Exposed(IpAddr),
    #[error(transparent)]
    Server(#[from] streaming::Error),
}

/// Listens, until the server is dropped. Inside of a tokio runtime only.
pub fn bind(settings: &Streaming, sandboxes: Sandboxes) -> Result<Server, StreamsError> {
    let config = config(settings)?;
    Ok(Server::bind(config, Arc::new(Streams { sandboxes }))?)
}

fn config(settings: &Streaming) -> Result<streaming::Config, StreamsError> {
    let Streaming { address, port, tls_certificate, tls_key, idle_timeout_seconds } =
        settings.clone();
    let given = [&tls_certificate, &tls_key].map(|path| !path.as_os_str().is_empty());
    let tls = match given {
        [true, true] => Some(Tls { certificate: tls_certificate, key: tls_key }),
        [false, false] if address.is_loopback() => None,
        [false, false] => return Err(StreamsError::Exposed(address)),
        _ => return Err(StreamsError::HalfTls),
    };
    Ok(streaming::Config {
        address: SocketAddr::new(address, port),
        tls,
        stream_idle_timeout: Duration::from_secs(idle_timeout_seconds.max(1).into()),
        ..streaming::Config::default()
    })
}

struct Streams {
    sandboxes: Sandboxes,
}

fn backend_error(error: sandbox::Error) -> BackendError {
    BackendError::new(error.to_string())
}

/// Discards output that was not requested: a process blocks when nobody reads its output.
fn if_requested(stream: Option<ByteReader>, requested: bool) -> Option<ByteReader> {
    match stream {
        Some(mut unread) if !requested => {
            tokio::spawn(async move {
                let _ = tokio::io::copy(&mut unread, &mut tokio::io::sink()).await;
            });
            None
        }
        stream => stream,
    }
}

#[async_trait]
impl Backend for Streams {
    async fn exec(
        &self,
        params: ExecParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError> {
        let ExecParams { container, command, tty, stdin, stdout, stderr } = params;
        let spec = ExecSpec {
            command,
            tty,
            stdin,
            env: vec![],
            user: String::new(),
            cwd: String::new(),
            tty_size: size.map(|TtySize { width, height }| (width, height)),
        };
        let session = self.sandboxes.exec(&container, spec).await.map_err(backend_error)?;
        Ok(Session {
            stdin: session.stdin,
            stdout: if_requested(session.stdout, stdout),
            stderr: if_requested(session.stderr, stderr),
            stdin_end: StdinEnd::Close,
            process: Box::new(Command(session.process)),
        })
    }

    async fn attach(
        &self,
        params: AttachParams,
        size: Option<TtySize>,
    ) -> Result<Session, BackendError> {
        let AttachParams { container, tty, stdin, stdout, stderr } = params;
        let view = self.sandboxes.container(&container).map_err(backend_error)?;
        let session = self.sandboxes.attach(&view.id, stdin).await.map_err(backend_error)?;
        if let Some(TtySize { width, height }) = size.filter(|_| tty) {
            session.process.resize(width, height).await.map_err(backend_error)?;
        }
        let once = view.spec.stdin_once && !view.spec.tty;
        Ok(Session {
            stdin: session.stdin,
            stdout: session.stdout.filter(|_| stdout),
            stderr: session.stderr.filter(|_| stderr),
            stdin_end: if once { StdinEnd::Close } else { StdinEnd::Detach },
            process: Box::new(Container(session.process)),
        })
    }

    async fn port_forward(&self, pod: &str, port: u16) -> Result<ByteStream, BackendError> {
        let stream = self.sandboxes.port_forward(pod, port).await.map_err(backend_error)?;
        Ok(Box::pin(stream))
    }
}

struct Command(ExecProcess);
struct Container(AttachProcess);

fn code(exit: Result<ExitView, sandbox::Error>) -> Result<i32, BackendError> {
    exit.map(|exit| exit.code).map_err(backend_error)
}

#[async_trait]
impl Process for Command {
    async fn resize(&mut self, size: TtySize) -> Result<(), BackendError> {
        self.0.resize(size.width, size.height).await.map_err(backend_error)
    }

    async fn wait(&mut self) -> Result<i32, BackendError> {
        code(self.0.wait().await)
    }
}

#[async_trait]
impl Process for Container {
    async fn resize(&mut self, size: TtySize) -> Result<(), BackendError> {
        self.0.resize(size.width, size.height).await.map_err(backend_error)
    }

    async fn wait(&mut self) -> Result<i32, BackendError> {
        code(self.0.wait().await)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn other_addresses_than_loopback_need_tls_with_both_its_files() {
        let plain = Streaming::default();
        let made = config(&plain).unwrap();
        assert!(made.tls.is_none() && made.address.ip().is_loopback());
        assert_eq!(made.stream_idle_timeout, Duration::from_secs(4 * 60 * 60));
        let open = Streaming { address: "0.0.0.0".parse().unwrap(), ..plain.clone() };
        assert!(matches!(config(&open), Err(StreamsError::Exposed(_))));
        let half = Streaming { tls_key: "/k".into(), ..plain };
        assert!(matches!(config(&half), Err(StreamsError::HalfTls)));
        let whole = Streaming { tls_certificate: "/c".into(), tls_key: "/k".into(), ..open };
        assert!(config(&whole).unwrap().tls.is_some());
    }
}
