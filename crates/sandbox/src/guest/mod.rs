//! Client of a pod's agent, with a deadline for every call.
//!
//! A broken connection is re-established by the next call. Messages are limited in both directions:
//! a hostile guest can make the daemon hold [`agent_api::MAX_MESSAGE`] bytes per call.

mod connect;
mod forward;
mod stream;

use std::future::Future;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use agent_api::v1::agent_client::AgentClient;
use agent_api::v1::{HelloReply, HelloRequest};
use agent_api::{CONTROL_PORT, MAX_MESSAGE, MIN_PROTOCOL, PROTOCOL};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Response, Status};

use crate::error::Error;
use crate::failpoint::Failpoints;
use crate::observe::{Measured, Observer, Outcome};

pub(crate) use connect::{AgentAddress, SOCKETS, connect};
pub(crate) use forward::{ForwardError, forward};
pub(crate) use stream::{Output, StreamError, StreamId, StreamReader, open_stdin};

/// Longest handshake before it is retried.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Longest error text of a guest, bytes.
const MAX_GUEST_TEXT: usize = 2048;

/// Client of one guest; cheap to clone.
#[derive(Clone)]
pub(crate) struct Guest {
    address: Arc<AgentAddress>,
    client: AgentClient<Channel>,
    /// Connection made while waiting for the boot; the channel's first use takes it.
    first_connection: Arc<Mutex<Option<UnixStream>>>,
    deadline: Duration,
    observer: Arc<dyn Observer>,
    failpoints: Failpoints,
}

impl Guest {
    pub(crate) fn new(
        address: AgentAddress,
        deadline: Duration,
        observer: Arc<dyn Observer>,
        failpoints: Failpoints,
    ) -> Self {
        let address = Arc::new(address);
        let first_connection = Arc::new(Mutex::new(None::<UnixStream>));
        let (path, first) = (address.clone(), first_connection.clone());
        let connector = tower::service_fn(move |_: Uri| {
            let (path, first) = (path.clone(), first.clone());
            async move {
                let ready = first.lock().unwrap_or_else(PoisonError::into_inner).take();
                let stream = match ready {
                    Some(stream) => stream,
                    None => connect_with_timeout(&path).await?,
                };
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        // The host name is not resolved: the connector ignores it.
        let channel = Endpoint::from_static("http://guest").connect_with_connector_lazy(connector);
        let client = AgentClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        Self { address, client, first_connection, deadline, observer, failpoints }
    }

    pub(crate) fn address(&self) -> &AgentAddress {
        &self.address
    }

    /// Calls the agent, with the default deadline.
    pub(crate) async fn call<T, F>(
        &self,
        what: &str,
        call: impl FnOnce(AgentClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.call_within(self.deadline, what, call).await
    }

    pub(crate) async fn call_within<T, F>(
        &self,
        limit: Duration,
        what: &str,
        call: impl FnOnce(AgentClient<Channel>) -> F,
    ) -> Result<T, Error>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let place = format!("guest: {what}");
        let called = async {
            match tokio::time::timeout(limit, call(self.client.clone())).await {
                Ok(Ok(response)) => Ok(response.into_inner()),
                Ok(Err(status)) => Err(from_status(what, &status)),
                Err(_) => Err(Error::Deadline { what: place.clone(), limit }),
            }
        };
        let began = Instant::now();
        let result = self.failpoints.wrap(&place, called).await;
        self.called(what, Outcome::of(&result), began);
        result
    }

    fn called(&self, call: &str, outcome: Outcome, began: Instant) {
        let took = began.elapsed();
        self.observer.measured(Measured::GuestCall { call, outcome, took });
    }

    pub(crate) async fn hello(&self, limit: Duration) -> Result<HelloReply, Error> {
        let reply = self
            .call_within(limit, "hello", |mut c| async move {
                c.hello(HelloRequest { protocol: PROTOCOL }).await
            })
            .await?;
        let HelloReply { protocol, min_protocol, .. } = reply;
        if !(MIN_PROTOCOL..=PROTOCOL).contains(&protocol) {
            let oldest = if min_protocol == 0 { protocol } else { min_protocol };
            return Err(Error::unavailable(format!(
                "the guest's agent supports protocols {oldest} to {protocol}, this daemon \
                 {MIN_PROTOCOL} to {PROTOCOL}: use an initramfs of this release or the one before"
            )));
        }
        Ok(reply)
    }

    /// Checks that the agent is alive. Any reply shows that, also an error or an unsupported
    /// version. A local failure (file descriptors, memory) says nothing about the agent.
    pub(crate) async fn ping(&self, limit: Duration) -> Result<(), Error> {
        let mut client = self.client.clone();
        let call = client.hello(HelloRequest { protocol: PROTOCOL });
        let began = Instant::now();
        let result = match tokio::time::timeout(limit, call).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) if is_reply(&status) || is_local_failure(&status) => {
                tracing::debug!(%status, "ping returned an error");
                Ok(())
            }
            Ok(Err(status)) => Err(from_status("ping", &status)),
            Err(_) => Err(Error::Deadline { what: "guest: ping".into(), limit }),
        };
        self.called("ping", Outcome::of(&result), began);
        result
    }

    /// Closes the connection of [`Self::wait_until_up`] if it was not used.
    pub(crate) fn drop_first_connection(&self) {
        *self.first_connection.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Retries until the agent listens; the caller limits the time by dropping the future.
    pub(crate) async fn wait_until_up(&self) {
        let mut pause = Duration::from_millis(4);
        loop {
            if let Ok(stream) = connect_with_timeout(&self.address).await {
                *self.first_connection.lock().unwrap_or_else(PoisonError::into_inner) =
                    Some(stream);
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 5 / 4).min(Duration::from_millis(40));
        }
    }
}

/// A status sent by the peer. The client's own failures (connection, HTTP/2) have a source, which a
/// peer cannot send.
fn is_reply(status: &Status) -> bool {
    std::error::Error::source(status).is_none()
}

/// A failure caused by this process' limits.
fn is_local_failure(status: &Status) -> bool {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        let code = error.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error);
        if matches!(code, Some(libc::EMFILE | libc::ENFILE | libc::ENOMEM | libc::ENOBUFS)) {
            return true;
        }
        source = error.source();
    }
    false
}

async fn connect_with_timeout(address: &AgentAddress) -> io::Result<UnixStream> {
    match tokio::time::timeout(CONNECT_LIMIT, connect(address, CONTROL_PORT)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// Maps status codes to error classes; the text comes from the guest and is cut.
fn from_status(what: &str, status: &Status) -> Error {
    let text: String = status
        .message()
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(MAX_GUEST_TEXT)
        .collect();
    let message = format!("guest: {what}: {text}");
    match status.code() {
        tonic::Code::NotFound => Error::FailedPrecondition { message },
        tonic::Code::InvalidArgument => Error::InvalidArgument { message },
        tonic::Code::FailedPrecondition | tonic::Code::AlreadyExists => {
            Error::FailedPrecondition { message }
        }
        tonic::Code::ResourceExhausted | tonic::Code::OutOfRange => {
            Error::ResourceExhausted { message }
        }
        tonic::Code::Unimplemented => Error::Unsupported { message },
        tonic::Code::Unavailable | tonic::Code::Cancelled | tonic::Code::DeadlineExceeded => {
            Error::Unavailable { message }
        }
        _ => Error::Internal(anyhow::anyhow!(message)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_reply_is_distinguished_from_a_broken_connection() {
        assert!(is_reply(&Status::internal("no")) && is_reply(&Status::unavailable("later")));
        for (kind, ours) in [(libc::ECONNREFUSED, false), (libc::EMFILE, true)] {
            let status = Status::from_error(Box::new(io::Error::from_raw_os_error(kind)));
            assert!(!is_reply(&status));
            assert_eq!(is_local_failure(&status), ours);
        }
    }
}
