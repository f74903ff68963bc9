//! From an HTTP request to an upgraded connection: checks the token, selects transport and
//! protocol.

use std::convert::Infallible;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{
    ALLOW, CONNECTION, CONTENT_TYPE, HeaderMap, HeaderName, HeaderValue, SEC_WEBSOCKET_ACCEPT,
    SEC_WEBSOCKET_KEY, SEC_WEBSOCKET_PROTOCOL, SEC_WEBSOCKET_VERSION, UPGRADE,
};
use hyper::upgrade::OnUpgrade;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::sync::mpsc;

use crate::backend::Backend;
use crate::config::Config;
use crate::link::Peer;
use crate::pending::{self, Pending};
use crate::port_forward::{self, PORTS_LIMIT};
use crate::remote_command::{self, CHANNELS};
use crate::spdy;
use crate::status::Form;
use crate::websocket::{self, Codec, Protocol};

const SPDY: &str = "SPDY/3.1";
const WEBSOCKET_VERSION: &str = "13";
const PROTOCOL_VERSION: HeaderName = HeaderName::from_static("x-stream-protocol-version");
const ACCEPTED_VERSIONS: HeaderName =
    HeaderName::from_static("x-accepted-stream-protocol-versions");

/// SPDY protocols of exec and attach, with the form of errors and whether there is a resize stream.
const COMMAND_SPDY: &[(&str, (Form, bool))] = &[
    ("v5.channel.k8s.io", (Form::Status, true)),
    ("v4.channel.k8s.io", (Form::Status, true)),
    ("v3.channel.k8s.io", (Form::Text, true)),
    ("v2.channel.k8s.io", (Form::Text, false)),
    ("channel.k8s.io", (Form::Text, false)),
];
const FORWARD_SPDY: &[(&str, ())] = &[("portforward.k8s.io", ())];

const BINARY: Protocol = Protocol { codec: Codec::Binary, close_signal: false };
const BASE64: Protocol = Protocol { codec: Codec::Base64, close_signal: false };
const CLOSING: Protocol = Protocol { codec: Codec::Binary, close_signal: true };

/// WebSocket protocols of exec and attach. The empty name is for clients that send none.
const COMMAND_WEBSOCKET: &[(&str, (Form, Protocol))] = &[
    ("v5.channel.k8s.io", (Form::Status, CLOSING)),
    ("v4.channel.k8s.io", (Form::Status, BINARY)),
    ("v4.base64.channel.k8s.io", (Form::Status, BASE64)),
    ("channel.k8s.io", (Form::Text, BINARY)),
    ("base64.channel.k8s.io", (Form::Text, BASE64)),
    ("", (Form::Text, BINARY)),
];

#[derive(Clone, Copy)]
enum Forward {
    Tunnel,
    Channels(Protocol),
}

const FORWARD_WEBSOCKET: &[(&str, Forward)] = &[
    ("SPDY/3.1+portforward.k8s.io", Forward::Tunnel),
    ("v2.portforward.k8s.io", Forward::Tunnel),
    ("v4.channel.k8s.io", Forward::Channels(BINARY)),
    ("v4.base64.channel.k8s.io", Forward::Channels(BASE64)),
    ("portforward.k8s.io", Forward::Channels(BINARY)),
    ("", Forward::Channels(BINARY)),
];

pub(crate) struct Shared {
    pub(crate) config: Config,
    pub(crate) pending: Arc<Pending>,
    pub(crate) backend: Arc<dyn Backend>,
}

/// A session that starts after the response with status 101.
pub(crate) struct Upgrade {
    handover: OnUpgrade,
    plan: Plan,
}

enum Plan {
    SpdyCommand(pending::Request, (Form, bool)),
    WebsocketCommand(pending::Request, Form, Protocol),
    SpdyForward { pod: String },
    TunnelForward { pod: String },
    ChannelForward { pod: String, ports: Vec<u16>, protocol: Protocol },
}

type HttpResponse = Response<Full<Bytes>>;

/// Responds to the request of a connection. A session to run is sent to `upgrades`.
pub(crate) async fn respond<B>(
    request: Request<B>,
    shared: Arc<Shared>,
    upgrades: mpsc::Sender<Upgrade>,
) -> Result<HttpResponse, Infallible> {
    Ok(match negotiate(request, &shared) {
        Ok((response, upgrade)) => {
            // The channel has a slot: a connection has one request.
            let _ = upgrades.try_send(upgrade);
            response
        }
        Err(refusal) => refusal.response(),
    })
}

#[derive(Debug, thiserror::Error)]
enum Refusal {
    #[error("no such path")]
    Path,
    #[error("method not allowed: only GET and POST")]
    Method,
    #[error("the URL is unknown, expired, or already used")]
    Token,
    #[error("this URL supports upgrades to {SPDY} or WebSocket only")]
    NoUpgrade,
    #[error("unable to upgrade: header {PROTOCOL_VERSION} is missing")]
    NoVersion,
    #[error("unable to upgrade: none of the client's protocols is supported")]
    Protocol { ours: Vec<&'static str> },
    #[error("a WebSocket handshake needs method GET")]
    WebsocketMethod,
    #[error("only WebSocket version {WEBSOCKET_VERSION} is supported")]
    WebsocketVersion,
    #[error("Sec-WebSocket-Key is missing")]
    WebsocketKey,
    #[error("unable to upgrade: none of the client's WebSocket protocols is supported")]
    WebsocketProtocol,
    #[error("this protocol needs a URL with 1 to {PORTS_LIMIT} ports, not {ports}")]
    Ports { ports: usize },
}

impl Refusal {
    fn status(&self) -> StatusCode {
        match self {
            Refusal::Path | Refusal::Token => StatusCode::NOT_FOUND,
            Refusal::Method => StatusCode::METHOD_NOT_ALLOWED,
            Refusal::Protocol { .. } | Refusal::WebsocketProtocol => StatusCode::FORBIDDEN,
            Refusal::WebsocketVersion => StatusCode::UPGRADE_REQUIRED,
            Refusal::NoUpgrade
            | Refusal::NoVersion
            | Refusal::WebsocketMethod
            | Refusal::WebsocketKey
            | Refusal::Ports { .. } => StatusCode::BAD_REQUEST,
        }
    }

    fn response(&self) -> HttpResponse {
        let mut response = Response::new(Full::from(format!("{self}\n")));
        *response.status_mut() = self.status();
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        // A connection has one request.
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
        match self {
            Refusal::Method => {
                headers.insert(ALLOW, HeaderValue::from_static("GET, POST"));
            }
            Refusal::WebsocketVersion => {
                let version = HeaderValue::from_static(WEBSOCKET_VERSION);
                headers.insert(SEC_WEBSOCKET_VERSION, version);
            }
            Refusal::Protocol { ours } => {
                for name in ours {
                    headers.append(ACCEPTED_VERSIONS, HeaderValue::from_static(name));
                }
            }
            _ => {}
        }
        response
    }
}

fn negotiate<B>(
    mut request: Request<B>,
    shared: &Shared,
) -> Result<(HttpResponse, Upgrade), Refusal> {
    let path = request.uri().path().to_owned();
    let (verb, token) = match path.trim_start_matches('/').split_once('/') {
        Some((verb @ ("exec" | "attach" | "portforward"), token)) => (verb, token),
        _ => return Err(Refusal::Path),
    };
    if request.method() != Method::GET && request.method() != Method::POST {
        return Err(Refusal::Method);
    }
    let requested = shared.pending.get(verb, token).ok_or(Refusal::Token)?;
    let headers = request.headers();
    let (response, plan) = match Transport::of(headers).ok_or(Refusal::NoUpgrade)? {
        Transport::Spdy => over_spdy(headers, requested)?,
        Transport::Websocket => over_websocket(request.method(), headers, requested)?,
    };
    // Last, so that a client whose protocol is refused can retry with another.
    if !shared.pending.take(token) {
        return Err(Refusal::Token);
    }
    Ok((response, Upgrade { handover: hyper::upgrade::on(&mut request), plan }))
}

enum Transport {
    Spdy,
    Websocket,
}

impl Transport {
    fn of(headers: &HeaderMap) -> Option<Transport> {
        let has = |name, word: &str| items(headers, &name).any(|i| i.eq_ignore_ascii_case(word));
        match () {
            () if !has(CONNECTION, "upgrade") => None,
            () if has(UPGRADE, "websocket") => Some(Transport::Websocket),
            () if has(UPGRADE, SPDY) => Some(Transport::Spdy),
            () => None,
        }
    }
}

/// Elements of a header that is a comma-separated list or repeated.
fn items<'a>(headers: &'a HeaderMap, name: &HeaderName) -> impl Iterator<Item = &'a str> {
    headers
        .get_all(name)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .map(str::trim)
        .filter(|item| !item.is_empty())
}

/// The first of the client's protocols that is supported.
fn choose<'a, T: Copy>(
    mut requested: impl Iterator<Item = &'a str>,
    ours: &[(&'static str, T)],
) -> Option<(&'static str, T)> {
    requested.find_map(|name| ours.iter().find(|(our, _)| *our == name)).copied()
}

fn switch(upgrade: &'static str) -> HttpResponse {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::SWITCHING_PROTOCOLS;
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("Upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(upgrade));
    response
}

fn over_spdy(
    headers: &HeaderMap,
    requested: pending::Request,
) -> Result<(HttpResponse, Plan), Refusal> {
    let (protocol, plan) = match requested {
        pending::Request::PortForward(params) => {
            let (protocol, ()) = choose_spdy(headers, FORWARD_SPDY)?;
            (protocol, Plan::SpdyForward { pod: params.pod })
        }
        command => {
            let (protocol, form) = choose_spdy(headers, COMMAND_SPDY)?;
            (protocol, Plan::SpdyCommand(command, form))
        }
    };
    let mut response = switch(SPDY);
    response.headers_mut().insert(PROTOCOL_VERSION, HeaderValue::from_static(protocol));
    Ok((response, plan))
}

fn choose_spdy<T: Copy>(
    headers: &HeaderMap,
    ours: &[(&'static str, T)],
) -> Result<(&'static str, T), Refusal> {
    if items(headers, &PROTOCOL_VERSION).next().is_none() {
        return Err(Refusal::NoVersion);
    }
    choose(items(headers, &PROTOCOL_VERSION), ours)
        .ok_or_else(|| Refusal::Protocol { ours: ours.iter().map(|(name, _)| *name).collect() })
}

fn over_websocket(
    method: &Method,
    headers: &HeaderMap,
    requested: pending::Request,
) -> Result<(HttpResponse, Plan), Refusal> {
    if method != Method::GET {
        return Err(Refusal::WebsocketMethod);
    }
    if items(headers, &SEC_WEBSOCKET_VERSION).next() != Some(WEBSOCKET_VERSION) {
        return Err(Refusal::WebsocketVersion);
    }
    let key = headers.get(SEC_WEBSOCKET_KEY).ok_or(Refusal::WebsocketKey)?;
    let accept = HeaderValue::try_from(websocket::accept_key(key.as_bytes()))
        .map_err(|_| Refusal::WebsocketKey)?;
    let (protocol, plan) = match requested {
        pending::Request::PortForward(params) => {
            let pod = params.pod;
            match choose_websocket(headers, FORWARD_WEBSOCKET)? {
                (protocol, Forward::Tunnel) => (protocol, Plan::TunnelForward { pod }),
                (name, Forward::Channels(protocol)) => {
                    if !(1..=PORTS_LIMIT).contains(&params.ports.len()) {
                        return Err(Refusal::Ports { ports: params.ports.len() });
                    }
                    (name, Plan::ChannelForward { pod, ports: params.ports, protocol })
                }
            }
        }
        command => {
            let (name, (form, protocol)) = choose_websocket(headers, COMMAND_WEBSOCKET)?;
            (name, Plan::WebsocketCommand(command, form, protocol))
        }
    };
    let mut response = switch("websocket");
    response.headers_mut().insert(SEC_WEBSOCKET_ACCEPT, accept);
    if !protocol.is_empty() {
        response.headers_mut().insert(SEC_WEBSOCKET_PROTOCOL, HeaderValue::from_static(protocol));
    }
    Ok((response, plan))
}

fn choose_websocket<T: Copy>(
    headers: &HeaderMap,
    ours: &[(&'static str, T)],
) -> Result<(&'static str, T), Refusal> {
    let asks = items(headers, &SEC_WEBSOCKET_PROTOCOL).next().is_some();
    let nothing = (!asks).then_some("").into_iter();
    choose(items(headers, &SEC_WEBSOCKET_PROTOCOL).chain(nothing), ours)
        .ok_or(Refusal::WebsocketProtocol)
}

/// Runs the session.
pub(crate) async fn run(upgrade: Upgrade, shared: &Shared, peer: Peer) {
    let socket = match upgrade.handover.await {
        Ok(upgraded) => TokioIo::new(upgraded),
        Err(error) => {
            tracing::debug!(%error, "upgrade");
            return;
        }
    };
    let Shared { config, backend, .. } = shared;
    let idle_timeout = config.stream_idle_timeout;
    let creation_limit = config.limits.stream_creation;
    let spdy_options =
        |accept, peer| spdy::Options { accept, limits: config.limits.clone(), idle_timeout, peer };
    match upgrade.plan {
        Plan::SpdyCommand(request, form) => {
            let link = spdy::start(socket, spdy_options(remote_command::accept, peer));
            remote_command::over_spdy(&**backend, request, link, form, creation_limit).await;
        }
        Plan::WebsocketCommand(request, form, protocol) => {
            let link = websocket::open(socket, protocol, CHANNELS, idle_timeout, peer);
            remote_command::over_websocket(&**backend, request, link, form).await;
        }
        Plan::SpdyForward { pod } => {
            let link = spdy::start(socket, spdy_options(port_forward::accept, peer));
            port_forward::over_spdy(backend.clone(), &pod, link, creation_limit).await;
        }
        Plan::TunnelForward { pod } => {
            let inside = websocket::tunnel(socket, idle_timeout, peer.clone());
            let link = spdy::start(inside, spdy_options(port_forward::accept, peer));
            port_forward::over_spdy(backend.clone(), &pod, link, creation_limit).await;
        }
        Plan::ChannelForward { pod, ports, protocol } => {
            let channels = u8::try_from(2 * ports.len()).unwrap_or(u8::MAX - 1);
            let link = websocket::open(socket, protocol, channels, idle_timeout, peer);
            port_forward::over_websocket(backend.clone(), &pod, &ports, link).await;
        }
    }
}
