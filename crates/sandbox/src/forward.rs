//! Port-forward: a caller's byte stream to a port of the pod's loopback interface. It enters through
//! the agent, so it reaches what listens at 127.0.0.1 or ::1 only.

use std::pin::Pin;
use std::time::Duration;

use agent_api::forward::Status;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::Error;
use crate::guest::{Unconnected, forward};
use crate::pod::Handle;

/// For a connection inside the pod to be made or refused; its loopback interface is quick.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

pub trait Duplex: AsyncRead + AsyncWrite {}
impl<T: AsyncRead + AsyncWrite + ?Sized> Duplex for T {}

/// Both directions of a connection, each with its own end: shutting it down ends ours.
pub type ByteStream = Pin<Box<dyn Duplex + Send>>;

pub(crate) async fn port_forward(handle: &Handle, port: u16) -> Result<ByteStream, Error> {
    handle.ready_pod()?;
    if port == 0 {
        return Err(Error::invalid("port 0 cannot be forwarded"));
    }
    let joined = tokio::time::timeout(CONNECT_LIMIT, forward(handle.guest.door(), port));
    match joined.await {
        Ok(Ok(stream)) => Ok(Box::pin(stream)),
        Ok(Err(Unconnected::Status(Status::Refused))) => {
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
