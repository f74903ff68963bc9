//! One TCP connection into the pod's loopback interface ([`agent_api::forward`]).

use std::io;

use agent_api::FORWARD_PORT;
use agent_api::forward::{Open, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{AgentAddress, connect};

#[derive(Debug, thiserror::Error)]
pub(crate) enum ForwardError {
    #[error("forwarded connection")]
    Io(#[from] io::Error),
    #[error("the guest replied {0:?}")]
    Status(Status),
}

/// Connects to the listener on `port` in the pod.
pub(crate) async fn forward(address: &AgentAddress, port: u16) -> Result<UnixStream, ForwardError> {
    let mut stream = connect(address, FORWARD_PORT).await?;
    stream.write_all(&Open { port }.encode()).await?;
    match Status::try_from(stream.read_u8().await?) {
        Ok(Status::Ok) => Ok(stream),
        Ok(status) => Err(ForwardError::Status(status)),
        Err(e) => Err(ForwardError::Io(io::Error::new(io::ErrorKind::InvalidData, e))),
    }
}
