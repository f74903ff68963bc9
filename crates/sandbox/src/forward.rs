//! Port-forward: connects a caller's byte stream to a port on the pod's loopback interface. The
//! agent makes the connection, so only listeners on 127.0.0.1 or ::1 are reached.

use std::pin::Pin;
use std::time::Duration;

use agent_api::forward::Status;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::Error;
use crate::guest::{ForwardError, forward};
use crate::pod::Handle;

/// Time for the agent to connect inside the pod.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

pub trait Duplex: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite + ?Sized> Duplex for T {}

/// A full-duplex stream. Shutting down the write side closes that direction only.
pub type ByteStream = Pin<Box<dyn Duplex + Send>>;

pub(crate) async fn port_forward(handle: &Handle, port: u16) -> Result<ByteStream, Error> {
    handle.ready_pod()?;
    if port == 0 {
        return Err(Error::invalid("port 0 cannot be forwarded"));
    }
    let connected = tokio::time::timeout(CONNECT_LIMIT, forward(handle.guest.address(), port));
    match connected.await {
        Ok(Ok(stream)) => Ok(Box::pin(stream)),
        Ok(Err(ForwardError::Status(Status::Refused))) => {
            Err(Error::NotListening { pod: handle.id.clone(), port })
        }
        Ok(Err(error)) => Err(Error::unavailable(format!(
            "port {port} of pod {}: {:#}",
            handle.id,
            anyhow::Error::new(error)
        ))),
        Err(_) => Err(Error::Deadline {
            what: format!("connection to port {port} of pod {}", handle.id),
            limit: CONNECT_LIMIT,
        }),
    }
}
