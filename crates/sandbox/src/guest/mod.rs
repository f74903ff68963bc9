//! A pod's agent, in its guest, as a client with a deadline on every call.
//!
//! A connection that breaks is made anew by the next call. Messages are capped in both directions:
//! a hostile guest can make us hold [`agent_api::MAX_MESSAGE`] bytes a call, no more.

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

pub(crate) use connect::{Door, SOCKETS, connect};
pub(crate) use forward::{Unconnected, forward};
pub(crate) use stream::{Output, Refused, StreamId, StreamReader, open_stdin};

/// A handshake takes this long at most before it is tried anew.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);
/// Longest text of a guest's error that is passed on, bytes.
const MAX_GUEST_TEXT: usize = 2048;

/// Client of one guest; cheap to clone.
#[derive(Clone)]
pub(crate) struct Guest {
    door: Arc<Door>,
    client: AgentClient<Channel>,
    /// A connection made while waiting for the boot, for the channel's first use.
    spare: Arc<Mutex<Option<UnixStream>>>,
    deadline: Duration,
    observer: Arc<dyn Observer>,
    failpoints: Failpoints,
}

impl Guest {
    pub(crate) fn new(
        door: Door,
        deadline: Duration,
        observer: Arc<dyn Observer>,
        failpoints: Failpoints,
    ) -> Self {
        let door = Arc::new(door);
        let spare = Arc::new(Mutex::new(None::<UnixStream>));
        let (path, first) = (door.clone(), spare.clone());
        let connector = tower::service_fn(move |_: Uri| {
            let (path, first) = (path.clone(), first.clone());
            async move {
                let ready = first.lock().unwrap_or_else(PoisonError::into_inner).take();
                let stream = match ready {
                    Some(stream) => stream,
                    None => connect_in_time(&path).await?,
                };
                Ok::<_, io::Error>(TokioIo::new(stream))
            }
        });
        // The name is never resolved: the connector decides.
        let channel = Endpoint::from_static("http://guest").connect_with_connector_lazy(connector);
        let client = AgentClient::new(channel)
            .max_decoding_message_size(MAX_MESSAGE)
            .max_encoding_message_size(MAX_MESSAGE);
        Self { door, client, spare, deadline, observer, failpoints }
    }

    pub(crate) fn door(&self) -> &Door {
        &self.door
    }

    /// One call, with the ordinary deadline.
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
        let result = self.failpoints.around(&place, called).await;
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
                "the guest's agent speaks protocols {oldest} to {protocol}, this daemon \
                 {MIN_PROTOCOL} to {PROTOCOL}: use an initramfs of this release or the one before"
            )));
        }
        Ok(reply)
    }

    /// Whether the agent is alive. Whatever it answers shows that it is, also an error or a version
    /// that we do not speak; and what fails on our side, for want of descriptors or memory, says
    /// nothing about it.
    pub(crate) async fn ping(&self, limit: Duration) -> Result<(), Error> {
        let mut client = self.client.clone();
        let call = client.hello(HelloRequest { protocol: PROTOCOL });
        let began = Instant::now();
        let result = match tokio::time::timeout(limit, call).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) if is_answer(&status) || is_our_own(&status) => {
                tracing::debug!(%status, "ping was answered with an error");
                Ok(())
            }
            Ok(Err(status)) => Err(from_status("ping", &status)),
            Err(_) => Err(Error::Deadline { what: "guest: ping".into(), limit }),
        };
        self.called("ping", Outcome::of(&result), began);
        result
    }

    /// Tries until the agent listens; the caller sets the limit by dropping the future.
    pub(crate) async fn wait_until_up(&self) {
        let mut pause = Duration::from_millis(4);
        loop {
            if let Ok(stream) = connect_in_time(&self.door).await {
                *self.spare.lock().unwrap_or_else(PoisonError::into_inner) = Some(stream);
                return;
            }
            tokio::time::sleep(pause).await;
            pause = (pause * 5 / 4).min(Duration::from_millis(40));
        }
    }
}

/// A status that the peer has sent. The client's own failures (connection, HTTP/2) have a source,
/// which no peer can send.
fn is_answer(status: &Status) -> bool {
    std::error::Error::source(status).is_none()
}

/// A failure that comes from this process' limits.
fn is_our_own(status: &Status) -> bool {
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

async fn connect_in_time(door: &Door) -> io::Result<UnixStream> {
    match tokio::time::timeout(CONNECT_LIMIT, connect(door, CONTROL_PORT)).await {
        Ok(result) => result,
        Err(_) => Err(io::ErrorKind::TimedOut.into()),
    }
}

/// The agent's status codes are its error classes; its text comes from a hostile place and is cut.
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
    fn an_error_that_was_answered_is_told_from_a_broken_connection() {
        assert!(is_answer(&Status::internal("no")) && is_answer(&Status::unavailable("later")));
        for (kind, ours) in [(libc::ECONNREFUSED, false), (libc::EMFILE, true)] {
            let status = Status::from_error(Box::new(io::Error::from_raw_os_error(kind)));
            assert!(!is_answer(&status));
            assert_eq!(is_our_own(&status), ours);
        }
    }
}
