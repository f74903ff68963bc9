//! A connection to nacelled.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use cri::v1::image_service_client::ImageServiceClient;
use cri::v1::runtime_service_client::RuntimeServiceClient;
use hyper_util::rt::TokioIo;
use tonic::Status;
use tonic::transport::{Channel, Endpoint};

use crate::api::debug_client::DebugClient;
use crate::settings::SOCKET_NAME;

/// Both streams of an ExecSync reply at their limit.
const MAX_REPLY: usize = 64 << 20;

pub(super) struct Client {
    /// The socket that it is connected to.
    pub(super) socket: PathBuf,
    pub(super) runtime: RuntimeServiceClient<Channel>,
    pub(super) images: ImageServiceClient<Channel>,
    pub(super) debug: DebugClient<Channel>,
}

impl Client {
    /// Connects to the given socket; without one, to the default socket, then to that of a private
    /// nacelled.
    pub(super) async fn connect(socket: Option<&Path>) -> Result<Self> {
        let named = socket.map(Path::to_owned);
        let candidates = match &named {
            Some(path) => vec![path.clone()],
            None => vec![default_socket(), private_socket()],
        };
        for path in &candidates {
            if let Ok(client) = Self::dial(path).await {
                return Ok(client);
            }
        }
        let path = candidates[0].clone();
        let why = match std::os::unix::net::UnixStream::connect(&path) {
            Err(error) => error.to_string(),
            Ok(_) => "the process that listens there does not speak gRPC".into(),
        };
        let advice = match std::os::unix::net::UnixStream::connect(&path) {
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                "Run this as root (sudo)"
            }
            _ => {
                "Start it (systemctl start nacelled, or nacelled as root), or give its socket with \
                 --socket"
            }
        };
        Err(anyhow!("cannot connect to nacelled at {}: {why}. {advice}", path.display()))
    }

    pub(super) async fn dial(path: &Path) -> Result<Self> {
        let owned = path.to_owned();
        let connector = tower::service_fn(move |_| {
            let path = owned.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(TokioIo::new) }
        });
        // HTTP/2 needs an authority; the connector ignores it.
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

/// Sockets and logs of a private nacelled.
pub(super) const PRIVATE_STATE: &str = "/run/nacelle-private";

pub(super) fn private_socket() -> PathBuf {
    Path::new(PRIVATE_STATE).join(SOCKET_NAME)
}

pub(super) fn default_socket() -> PathBuf {
    Path::new("/run/nacelle").join(SOCKET_NAME)
}

/// A command that could not be started in a container.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub(super) struct CommandFailed {
    /// What nacelle exits with.
    pub(super) code: u8,
    message: String,
}

/// The error of a failed call: nacelled's message, without the gRPC code.
pub(super) fn call_error(status: Status) -> anyhow::Error {
    if status.code() == tonic::Code::Unavailable && status.message().is_empty() {
        return anyhow!("the connection to nacelled was lost: see journalctl -u nacelled");
    }
    let message = status.message().to_string();
    match command_failure(status.code(), &message) {
        Some(code) => CommandFailed { code, message }.into(),
        None => anyhow!(message),
    }
}

/// 127 if a command was not found, 126 if it cannot be executed, none for any other failure. The CRI
/// has no code for these, so the message distinguishes them; the agent uses runc's text, and docker
/// matches the same text.
fn command_failure(code: tonic::Code, message: &str) -> Option<u8> {
    let (_, failure) = message.split_once("exec: \"")?;
    if code != tonic::Code::FailedPrecondition {
        return None;
    }
    let missing = ["executable file not found in $PATH", "no such file or directory"];
    let missing = missing.iter().any(|reason| failure.ends_with(reason))
        || failure.ends_with("not a directory");
    Some(if missing { 127 } else { 126 })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exit_codes_follow_the_reason_why_a_command_was_not_started() {
        use tonic::Code::{FailedPrecondition, InvalidArgument, NotFound};
        let table = [
            (FailedPrecondition, r#"exec: "x": executable file not found in $PATH"#, Some(127)),
            (FailedPrecondition, r#"exec: "/x": stat /x: no such file or directory"#, Some(127)),
            (FailedPrecondition, r#"exec: "/a/x": stat /a/x: not a directory"#, Some(127)),
            (FailedPrecondition, r#"exec: "/x": stat /x: permission denied"#, Some(126)),
            (FailedPrecondition, r#"exec: "/x": exec format error"#, Some(126)),
            (
                FailedPrecondition,
                r#"guest: run a command: exec: "x": executable file not found in $PATH"#,
                Some(127),
            ),
            (FailedPrecondition, r#"exec: "/": stat /: is a directory"#, Some(126)),
            (FailedPrecondition, "container \"x\" is not running", None),
            (NotFound, r#"no container "x""#, None),
            (InvalidArgument, r#"exec: "x": no such file or directory"#, None),
        ];
        for (code, message, expected) in table {
            assert_eq!(command_failure(code, message), expected, "{message}");
        }
    }
}
