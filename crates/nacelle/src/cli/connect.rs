//! A connection to nacelled.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use cri::v1::image_service_client::ImageServiceClient;
use cri::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use super::private;
use crate::api::debug_client::DebugClient;
use crate::settings::SOCKET_NAME;

/// Two streams of ExecSync at their limit.
const MAX_REPLY: usize = 64 << 20;

pub(super) struct Client {
    /// Where it answers.
    pub(super) socket: PathBuf,
    pub(super) runtime: RuntimeServiceClient<Channel>,
    pub(super) images: ImageServiceClient<Channel>,
    pub(super) debug: DebugClient<Channel>,
}

impl Client {
    /// The socket that is named, else the node's, else that of a private nacelled that runs.
    pub(super) async fn connect(socket: Option<&Path>) -> Result<Self> {
        let named = socket.map(Path::to_owned);
        let candidates = match &named {
            Some(path) => vec![path.clone()],
            None => vec![default_socket(), private::socket()],
        };
        for path in &candidates {
            if let Ok(client) = Self::dial(path).await {
                return Ok(client);
            }
        }
        let path = candidates[0].clone();
        let why = match std::os::unix::net::UnixStream::connect(&path) {
            Err(error) => error.to_string(),
            Ok(_) => "it does not speak gRPC".into(),
        };
        Err(anyhow!(
            "no nacelled at {}: {why}. Start it (systemctl start nacelled, or nacelled as root), \
             or name its socket with --socket",
            path.display()
        ))
    }

    pub(super) async fn dial(path: &Path) -> Result<Self> {
        let owned = path.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = owned.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // The name is for HTTP/2 only; the connector knows where to go.
        let channel = Endpoint::from_static("http://localhost")
            .connect_with_connector(connector)
            .await
            .with_context(|| format!("connecting to {}", path.display()))?;
        Ok(Self {
            socket: path.to_owned(),
            runtime: RuntimeServiceClient::new(channel.clone())
                .max_decoding_message_size(MAX_REPLY),
            images: ImageServiceClient::new(channel.clone()).max_decoding_message_size(MAX_REPLY),
            debug: DebugClient::new(channel).max_decoding_message_size(MAX_REPLY),
        })
    }
}

pub(super) fn default_socket() -> PathBuf {
    Path::new("/run/nacelle").join(SOCKET_NAME)
}

/// What nacelled says about a failure; its code is for programs.
pub(super) fn told(status: Status) -> anyhow::Error {
    match status.code() {
        tonic::Code::Unavailable if status.message().is_empty() => {
            anyhow!("nacelled has gone away: see its log (journalctl -u nacelled)")
        }
        _ => anyhow!("{}", status.message()),
    }
}
