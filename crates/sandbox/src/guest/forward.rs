//! One TCP connection into the pod's loopback interface ([`agent_api::forward`]).

use std::io;

use agent_api::FORWARD_PORT;
use agent_api::forward::{Open, Status};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::{Door, connect};

#[derive(Debug, thiserror::Error)]
pub(crate) enum Unconnected {
    #[error("forwarded connection")]
    Io(#[from] io::Error),
    #[error("the guest answered {0:?}")]
    Status(Status),
}

/// Joins a new stream to whoever listens at `port` in the pod.
pub(crate) async fn forward(door: &Door, port: u16) -> Result<UnixStream, Unconnected> {
    let mut stream = connect(door, FORWARD_PORT).await?;
    stream.write_all(&Open { port }.encode()).await?;
    match Status::try_from(stream.read_u8().await?) {
        Ok(Status::Ok) => Ok(stream),
        Ok(status) => Err(Unconnected::Status(status)),
        Err(e) => Err(Unconnected::Io(io::Error::new(io::ErrorKind::InvalidData, e))),
    }
}
