//! Reports each call of the CRI with its status code and duration: a tower layer in front of the
//! services, because some calls fail before a service sees them (message too long, unknown method).

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use http_body::{Frame, SizeHint};
use tonic::Code;
use tonic::body::Body;
use tonic::codegen::http::{HeaderMap, Request, Response};
use tower::{Layer, Service};

/// Receives the end of each call. It must not block.
pub trait Observer: std::fmt::Debug + Send + Sync {
    /// `method` is one of [`METHODS`]. The time ends with the start of the reply, as a reply in several
    /// messages lasts as long as its reader likes. A call whose client goes away has the code
    /// `Cancelled`.
    fn called(&self, method: &'static str, code: Code, took: Duration);
}

/// Methods of RuntimeService and ImageService. Only these are reported: the names that a client can
/// make up have no end.
pub const METHODS: &[&str] = &[
    "Attach",
    "CheckpointContainer",
    "CheckpointPod",
    "ContainerStats",
    "ContainerStatus",
    "CreateContainer",
    "Exec",
    "ExecSync",
    "GetContainerEvents",
    "ImageFsInfo",
    "ImageStatus",
    "ListContainerStats",
    "ListContainers",
    "ListImages",
    "ListMetricDescriptors",
    "ListPodSandbox",
    "ListPodSandboxMetrics",
    "ListPodSandboxStats",
    "PodSandboxStats",
    "PodSandboxStatus",
    "PortForward",
    "PullImage",
    "RemoveContainer",
    "RemoveImage",
    "RemovePodSandbox",
    "ReopenContainerLog",
    "RestorePod",
    "RunPodSandbox",
    "RuntimeConfig",
    "StartContainer",
    "Status",
    "StopContainer",
    "StopPodSandbox",
    "StreamContainerStats",
    "StreamContainers",
    "StreamImages",
    "StreamPodSandboxMetrics",
    "StreamPodSandboxStats",
    "StreamPodSandboxes",
    "UpdateContainerResources",
    "UpdatePodSandboxResources",
    "UpdateRuntimeConfig",
    "Version",
];

const SERVICES: [&str; 2] = ["/runtime.v1.RuntimeService/", "/runtime.v1.ImageService/"];

fn method(path: &str) -> Option<&'static str> {
    let name = SERVICES.iter().find_map(|service| path.strip_prefix(service))?;
    METHODS.iter().find(|known| **known == name).copied()
}

#[derive(Debug, Clone)]
pub(crate) struct ObserveLayer(pub(crate) Option<Arc<dyn Observer>>);

impl<S> Layer<S> for ObserveLayer {
    type Service = Observe<S>;

    fn layer(&self, inner: S) -> Observe<S> {
        Observe { inner, observer: self.0.clone() }
    }
}

#[derive(Debug, Clone)]
pub(crate) struct Observe<S> {
    inner: S,
    observer: Option<Arc<dyn Observer>>,
}

impl<S> Service<Request<Body>> for Observe<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let method = method(request.uri().path());
        let Some((method, observer)) = method.zip(self.observer.clone()) else {
            return Box::pin(self.inner.call(request));
        };
        let mut call = Call { method, observer, began: Instant::now(), took: None, code: None };
        let reply = self.inner.call(request);
        Box::pin(async move {
            let reply = match reply.await {
                Ok(reply) => reply,
                Err(error) => {
                    call.code = Some(Code::Internal);
                    drop(call);
                    return Err(error);
                }
            };
            call.took = Some(call.began.elapsed());
            // A call that fails at once has its status in the headers.
            call.code = status(reply.headers());
            let (head, body) = reply.into_parts();
            let body = match call.code {
                Some(_) => body,
                None => Body::new(Observed { body, call }),
            };
            Ok(Response::from_parts(head, body))
        })
    }
}

/// Reported when it is dropped.
#[derive(Debug)]
struct Call {
    method: &'static str,
    observer: Arc<dyn Observer>,
    began: Instant,
    took: Option<Duration>,
    code: Option<Code>,
}

impl Drop for Call {
    fn drop(&mut self) {
        let code = self.code.unwrap_or(Code::Cancelled);
        let took = self.took.unwrap_or_else(|| self.began.elapsed());
        self.observer.called(self.method, code, took);
    }
}

/// `grpc-status` (gRPC over HTTP/2, section "Responses").
fn status(headers: &HeaderMap) -> Option<Code> {
    headers.get("grpc-status").map(|value| Code::from_bytes(value.as_bytes()))
}

/// A reply whose status comes at its end.
#[derive(Debug)]
struct Observed {
    body: Body,
    call: Call,
}

impl http_body::Body for Observed {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if let Some(Ok(frame)) = &frame
            && let Some(trailers) = frame.trailers_ref()
        {
            self.call.code = status(trailers);
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_methods_are_those_of_the_interface() {
        let interface = include_str!("../../../proto/cri/v1/api.proto");
        let lines = interface.lines().map(str::trim);
        let mut defined: Vec<&str> = lines
            .filter_map(|line| line.strip_prefix("rpc ")?.split_once('(').map(|(name, _)| name))
            .collect();
        defined.sort_unstable();
        assert_eq!(METHODS, defined);
        assert_eq!(method("/runtime.v1.RuntimeService/Version"), Some("Version"));
        assert_eq!(method("/runtime.v1.RuntimeService/Made up"), None);
        assert_eq!(method("/nacelle.v1.Debug/Version"), None);
    }
}
