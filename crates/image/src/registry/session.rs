//! One pull's session with a registry: authentication, retries, mirrors.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::auth::{Auth, Challenge, Credentials, Grant};
use super::authority::{authority, is_loopback};
use super::client::Clients;
use super::hosts;
use super::send::{Outgoing, SendError};
use crate::config::Config;
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest;
use crate::reference::{Reference, Target};

/// Maximum bytes read of an error body or a token response.
const MAX_SMALL_BODY: u64 = 64 << 10;
/// Pause before the second attempt; doubles with each further one.
const INITIAL_BACKOFF: Duration = Duration::from_millis(250);
/// Maximum pause, also if the registry's Retry-After is longer.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// All registries; shared by pulls so that connections are reused.
pub struct Registries {
    config: Arc<Config>,
    clients: Clients,
}

impl Registries {
    pub fn new(config: Arc<Config>) -> Self {
        Self { config, clients: Clients::default() }
    }

    /// Reads the registry's host configuration. Blocking.
    pub fn session(&self, reference: &Reference, auth: &Auth) -> Result<Session, Error> {
        if auth.is_malformed() {
            return Err(Error::MalformedAuth);
        }
        let bad = |reason| Error::RegistryConfig { registry: reference.registry.clone(), reason };
        let hosts = hosts::hosts(&self.config.config_path, &reference.registry).map_err(bad)?;
        let connect = Duration::from_secs(self.config.connect_timeout_seconds);
        let last = hosts.iter().rposition(|host| !host.fallback).unwrap_or_default();
        let mut endpoints = Vec::new();
        for (index, host) in hosts.into_iter().enumerate() {
            let authority = authority(&host.base);
            endpoints.push(Endpoint {
                client: self.clients.client(&host, connect).map_err(bad)?,
                // As in containerd, a mirror gets credentials that are not limited to another host.
                credentials: auth.credentials(&authority),
                name: format!("{}://{authority}", host.base.scheme()),
                base: host.base,
                authority,
                namespace: host.mirror.then(|| reference.registry.clone()),
                headers: host.headers,
                pull: host.pull,
                resolve: host.resolve,
                fallback: host.fallback,
                has_next: index < last,
                unreachable: AtomicBool::new(false),
                wrong_protocol: AtomicBool::new(false),
                authorization: tokio::sync::Mutex::default(),
            });
        }
        Ok(Session { config: Arc::clone(&self.config), reference: reference.clone(), endpoints })
    }
}

impl std::fmt::Debug for Registries {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Registries").finish_non_exhaustive()
    }
}

pub struct Session {
    pub(super) config: Arc<Config>,
    pub(super) reference: Reference,
    pub(super) endpoints: Vec<Endpoint>,
}

pub(super) struct Endpoint {
    client: reqwest::Client,
    /// Root of the API.
    base: Url,
    /// Name for messages.
    name: String,
    authority: String,
    /// Registry that a mirror replaces; sent as `ns` so that one mirror can serve several.
    namespace: Option<String>,
    headers: HeaderMap,
    credentials: Credentials,
    pull: bool,
    resolve: bool,
    /// See [`hosts::Host`].
    fallback: bool,
    /// Another host follows, so connection errors are not retried.
    has_next: bool,
    /// Could not be reached in this pull.
    unreachable: AtomicBool,
    /// Its responses suggest the other protocol, so its fallback is tried.
    wrong_protocol: AtomicBool,
    /// Authorization header from the last challenge. Locked while a token is fetched, so that
    /// parallel layers fetch one token.
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// The endpoints to try for one resource, in order, and their errors.
pub(super) struct Tries<'a> {
    endpoints: &'a [Endpoint],
    wanted: fn(&Endpoint) -> bool,
    /// All were unreachable; each is tried once more.
    retry_all: bool,
    next: usize,
    what: String,
    failed: Vec<(String, Error)>,
}

impl<'a> Tries<'a> {
    fn new(session: &'a Session, what: String, wanted: fn(&Endpoint) -> bool) -> Self {
        let endpoints = &session.endpoints;
        let retry_all = endpoints.iter().filter(|e| wanted(e)).all(|e| e.is_unreachable());
        Self { endpoints, wanted, retry_all, next: 0, what, failed: Vec::new() }
    }

    pub fn next(&mut self) -> Option<&'a Endpoint> {
        loop {
            let endpoint = self.endpoints.get(self.next)?;
            let before = self.next.checked_sub(1).map(|index| &self.endpoints[index]);
            self.next += 1;
            let wrong_protocol = |before: &Endpoint| before.wrong_protocol.load(Ordering::Relaxed);
            let needed = !endpoint.fallback || before.is_some_and(wrong_protocol);
            if (self.wanted)(endpoint) && needed && (self.retry_all || !endpoint.is_unreachable()) {
                return Some(endpoint);
            }
        }
    }

    /// Records an endpoint's error; returns it if no other endpoint can help.
    pub fn failed(&mut self, endpoint: &Endpoint, error: Error) -> Result<(), Error> {
        match &error {
            Error::StorageFull { .. } | Error::Io { .. } | Error::Cancelled => return Err(error),
            Error::Stalled { .. } => endpoint.unreachable.store(true, Ordering::Relaxed),
            Error::Transport { .. } => {
                endpoint.unreachable.store(true, Ordering::Relaxed);
                endpoint.wrong_protocol.store(true, Ordering::Relaxed);
            }
            // Common response of a TLS server to plain http.
            Error::Status { status: 400, .. }
                if self.endpoints.get(self.next).is_some_and(|next| next.fallback) =>
            {
                endpoint.unreachable.store(true, Ordering::Relaxed);
                endpoint.wrong_protocol.store(true, Ordering::Relaxed);
            }
            _ => {}
        }
        tracing::debug!(endpoint = endpoint.name, what = self.what, %error, "endpoint failed");
        self.failed.push((endpoint.name.clone(), error));
        Ok(())
    }

    pub fn into_error(mut self) -> Error {
        match self.failed.len() {
            1 => self.failed.remove(0).1,
            _ => Error::Endpoints { what: self.what, tried: self.failed },
        }
    }
}

/// A manifest with its media type and digest.
pub struct Fetched {
    pub bytes: Vec<u8>,
    pub digest: Digest,
    pub content_type: String,
}

impl Session {
    /// Fetches the manifest or index of `target`.
    pub async fn manifest(&self, target: &Target) -> Result<Fetched, Error> {
        let (name, wanted): (_, fn(&Endpoint) -> bool) = match target {
            Target::Tag(tag) => (format!(":{tag}"), |endpoint| endpoint.resolve),
            Target::Digest(digest) => (format!("@{digest}"), |endpoint| endpoint.pull),
        };
        let mut tries = self.tries(format!("{}{name}", self.reference.name()), wanted)?;
        while let Some(endpoint) = tries.next() {
            match self.manifest_from(endpoint, target).await {
                Ok(fetched) => return Ok(fetched),
                Err(e) => tries.failed(endpoint, e)?,
            }
        }
        Err(tries.into_error())
    }

    pub(super) fn blob_tries(&self, digest: &Digest) -> Result<Tries<'_>, Error> {
        self.tries(format!("blob {digest} of {}", self.reference.name()), |endpoint| endpoint.pull)
    }

    fn tries(&self, what: String, wanted: fn(&Endpoint) -> bool) -> Result<Tries<'_>, Error> {
        if !self.endpoints.iter().any(wanted) {
            let reason = format!("its hosts.toml has no host with the capability for {what}");
            let registry = self.reference.registry.clone();
            return Err(Error::RegistryConfig { registry, reason });
        }
        Ok(Tries::new(self, what, wanted))
    }

    async fn manifest_from(&self, endpoint: &Endpoint, target: &Target) -> Result<Fetched, Error> {
        let (name, expected) = match target {
            Target::Tag(tag) => (tag.clone(), None),
            Target::Digest(digest) => (digest.to_string(), Some(*digest)),
        };
        let what = format!("manifest {}:{name}", self.reference.repository);
        let mut headers = HeaderMap::new();
        headers.insert(ACCEPT, HeaderValue::from_static(manifest::ACCEPT));
        let path = format!("manifests/{name}");
        let mut attempt = 0;
        let (content_type, announced, bytes) = loop {
            let response = self.get(endpoint, &path, &headers, &what).await?;
            let header = |name: &str| {
                response.headers().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned)
            };
            let content_type = header(CONTENT_TYPE.as_str()).unwrap_or_default();
            let announced = header("docker-content-digest");
            match self.body(endpoint, response, &what, self.config.max_manifest_bytes).await {
                Ok(bytes) => break (content_type, announced, bytes),
                Err(e) if attempt + 1 < self.config.attempts && is_transient(&e) => {
                    sleep(backoff(attempt)).await;
                    attempt += 1;
                }
                Err(e) => return Err(e),
            }
        };
        let digest = Digest::of(&bytes);
        // With a tag, the registry's own digest header is the only check.
        let expected = expected.or_else(|| announced.and_then(|header| header.parse().ok()));
        match expected {
            Some(expected) if expected != digest => {
                Err(Error::DigestMismatch { what, expected, got: digest })
            }
            _ => {
                let content_type = content_type.split(';').next().unwrap_or_default().trim();
                Ok(Fetched { bytes, digest, content_type: content_type.to_owned() })
            }
        }
    }

    /// GET below the repository, with authentication and retries. Returns only successful
    /// responses.
    pub(super) async fn get(
        &self,
        endpoint: &Endpoint,
        path: &str,
        headers: &HeaderMap,
        what: &str,
    ) -> Result<Response, Error> {
        let url = endpoint.url(&self.reference.repository, path);
        let mut authenticated = false;
        let mut attempt = 0;
        loop {
            let mut private = endpoint.headers.clone();
            let sent = endpoint.authorization.lock().await.clone();
            if let Some(value) = &sent {
                private.insert(AUTHORIZATION, value.clone());
            }
            let request =
                Outgoing { url: url.clone(), headers: headers.clone(), private, body: None };
            let mut pause = backoff(attempt);
            let error = match self.send(endpoint, request, what).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED && !authenticated => {
                    match self.authenticate(endpoint, &response, sent).await {
                        Ok(()) => {
                            authenticated = true;
                            continue;
                        }
                        Err(e) => e,
                    }
                }
                Ok(response) => {
                    pause = retry_after(&response).unwrap_or(pause);
                    self.status_error(endpoint, response, what).await
                }
                Err(e) => e,
            };
            attempt += 1;
            let unreachable =
                matches!(&error, Error::Transport { source, .. } if source.is_connect());
            if attempt >= self.config.attempts
                || !is_transient(&error)
                || pause > MAX_PAUSE
                || (unreachable && endpoint.has_next)
            {
                return Err(error);
            }
            tracing::debug!(%url, attempt, %error, "registry request failed, trying again");
            sleep(pause).await;
        }
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        request: Outgoing,
        what: &str,
    ) -> Result<Response, Error> {
        let registry = endpoint.authority.clone();
        match timeout(self.stall(), request.send(&endpoint.client)).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(SendError::Http(source))) => {
                Err(Error::Transport { registry, source: source.without_url() })
            }
            Ok(Err(SendError::Redirect(reason))) => Err(Error::Protocol { registry, reason }),
            Err(_) => Err(self.stalled(endpoint, what)),
        }
    }

    pub(super) fn stall(&self) -> Duration {
        Duration::from_secs(self.config.stall_timeout_seconds)
    }

    pub(super) fn stalled(&self, endpoint: &Endpoint, what: &str) -> Error {
        Error::Stalled {
            registry: endpoint.authority.clone(),
            what: what.into(),
            seconds: self.config.stall_timeout_seconds,
        }
    }

    /// The next chunk of a body.
    pub(super) async fn chunk(
        &self,
        endpoint: &Endpoint,
        response: &mut Response,
        what: &str,
    ) -> Result<Option<impl AsRef<[u8]> + use<>>, Error> {
        match timeout(self.stall(), response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(source)) => Err(Error::Transport {
                registry: endpoint.authority.clone(),
                source: source.without_url(),
            }),
            Err(_) => Err(self.stalled(endpoint, what)),
        }
    }

    /// A whole body of at most `limit` bytes.
    pub(super) async fn body(
        &self,
        endpoint: &Endpoint,
        mut response: Response,
        what: &str,
        limit: u64,
    ) -> Result<Vec<u8>, Error> {
        let too_large = |got| Error::TooLarge {
            what: format!("the size of {what}"),
            got,
            limit,
            setting: "max_manifest_bytes",
        };
        if let Some(length) = response.content_length().filter(|&length| length > limit) {
            return Err(too_large(length));
        }
        let mut bytes = Vec::new();
        while let Some(chunk) = self.chunk(endpoint, &mut response, what).await? {
            bytes.extend_from_slice(chunk.as_ref());
            if bytes.len() as u64 > limit {
                return Err(too_large(bytes.len() as u64));
            }
        }
        Ok(bytes)
    }

    async fn status_error(&self, endpoint: &Endpoint, mut response: Response, what: &str) -> Error {
        let registry = endpoint.authority.clone();
        let status = response.status();
        let mut url = response.url().clone();
        // The query of a signed storage URL contains secrets.
        url.set_query(None);
        let mut body = Vec::new();
        while let Ok(Some(chunk)) = self.chunk(endpoint, &mut response, what).await {
            body.extend_from_slice(chunk.as_ref());
            if body.len() as u64 > MAX_SMALL_BODY {
                break;
            }
        }
        let detail = error_detail(&body);
        match status {
            StatusCode::NOT_FOUND => Error::NotFound { registry, what: what.into() },
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Error::Denied { registry, repository: self.reference.repository.clone(), detail }
            }
            _ => Error::Status { registry, url: url.into(), status: status.as_u16(), detail },
        }
    }

    /// Handles a 401. `sent` is the Authorization header of the refused request.
    async fn authenticate(
        &self,
        endpoint: &Endpoint,
        response: &Response,
        sent: Option<HeaderValue>,
    ) -> Result<(), Error> {
        let mut authorization = endpoint.authorization.lock().await;
        if *authorization != sent {
            // A parallel request has replaced the header.
            return Ok(());
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        // A token is preferred: it exposes less than a password.
        let challenge = challenges
            .iter()
            .filter_map(|value| Challenge::parse(value.to_str().ok()?))
            .max_by_key(|challenge| matches!(challenge, Challenge::Bearer { .. }));
        let denied = |detail: &str| Error::Denied {
            registry: endpoint.authority.clone(),
            repository: self.reference.repository.clone(),
            detail: detail.into(),
        };
        let value = match (challenge, &endpoint.credentials) {
            (_, Credentials::Bearer(token)) => format!("Bearer {token}"),
            (Some(Challenge::Basic), Credentials::Basic { username, password }) => {
                basic(username, password)
            }
            (Some(Challenge::Bearer { realm, service, scope }), _) => {
                let scope = scope
                    .unwrap_or_else(|| format!("repository:{}:pull", self.reference.repository));
                self.token(endpoint, &realm, service.as_deref(), &scope).await?
            }
            (Some(Challenge::Basic), _) => {
                return Err(denied("it requires a user name and password"));
            }
            (None, _) => return Err(denied("it offers no supported authentication")),
        };
        let mut value = HeaderValue::try_from(value)
            .map_err(|_| denied("the credentials have characters that a header cannot contain"))?;
        value.set_sensitive(true);
        if Some(&value) == sent.as_ref() {
            return Err(denied("it rejects the credentials"));
        }
        *authorization = Some(value);
        Ok(())
    }

    /// Fetches an access token from the registry's token service.
    async fn token(
        &self,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
        scope: &str,
    ) -> Result<String, Error> {
        let protocol =
            |reason: String| Error::Protocol { registry: endpoint.authority.clone(), reason };
        let url: Url =
            realm.parse().map_err(|e| protocol(format!("its token service {realm:.100?}: {e}")))?;
        let secret = endpoint.credentials != Credentials::None;
        let plain = url.scheme() != "https";
        if plain && secret && !is_loopback(&authority(&url)) && endpoint.base.scheme() == "https" {
            return Err(protocol("it requests the credentials without encryption".into()));
        }
        let what = "access token";
        let mut grants = endpoint.credentials.grants(service.unwrap_or_default(), scope);
        let response = loop {
            let grant = grants.remove(0);
            let response = self.send(endpoint, token_request(url.clone(), &grant), what).await?;
            // Statuses of services that support only the other grant.
            let other_way = matches!(response.status().as_u16(), 404 | 405)
                || (grant.post && matches!(response.status().as_u16(), 400 | 401));
            if response.status().is_success() {
                break response;
            }
            if other_way && !grants.is_empty() {
                continue;
            }
            return Err(match self.status_error(endpoint, response, what).await {
                Error::NotFound { registry, .. } => {
                    Error::Protocol { registry, reason: "its token service does not exist".into() }
                }
                // Token services answer 400 to wrong credentials.
                Error::Status { registry, status: 400, detail, .. } => Error::Denied {
                    registry,
                    repository: self.reference.repository.clone(),
                    detail,
                },
                e => e,
            });
        };
        let body = self.body(endpoint, response, what, MAX_SMALL_BODY).await?;
        let token: Token =
            serde_json::from_slice(&body).map_err(|e| protocol(format!("its token: {e}")))?;
        let mut given = [token.token, token.access_token].into_iter().flatten();
        let token = given.find(|token| !token.is_empty());
        let token = token.ok_or_else(|| protocol("its token service sent no token".into()))?;
        Ok(format!("Bearer {token}"))
    }
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
}

impl Endpoint {
    fn is_unreachable(&self) -> bool {
        self.unreachable.load(Ordering::Relaxed)
    }

    pub(super) fn authority(&self) -> String {
        self.authority.clone()
    }

    /// `path` below a repository; neither needs escaping.
    fn url(&self, repository: &str, path: &str) -> Url {
        let mut url = self.base.clone();
        let root = url.path().trim_end_matches('/').to_owned();
        url.set_path(&format!("{root}/{repository}/{path}"));
        if let Some(namespace) = &self.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        url
    }
}

/// A token request. The service may be a third party, so it gets none of the registry's headers.
fn token_request(mut url: Url, grant: &Grant) -> Outgoing {
    let (mut private, mut body) = (HeaderMap::new(), None);
    if grant.post {
        let mut form = Url::parse("form:").expect("a constant");
        form.query_pairs_mut().extend_pairs(&grant.parameters);
        body = Some(form.query().unwrap_or_default().to_owned());
        let form = HeaderValue::from_static("application/x-www-form-urlencoded");
        private.insert(CONTENT_TYPE, form);
    } else {
        url.query_pairs_mut().extend_pairs(&grant.parameters);
        if let Some((username, password)) = &grant.basic {
            let value = HeaderValue::try_from(basic(username, password));
            let mut value = value.expect("base64 has no characters that a header cannot carry");
            value.set_sensitive(true);
            private.insert(AUTHORIZATION, value);
        }
    }
    Outgoing { url, headers: HeaderMap::new(), private, body }
}

fn basic(username: &str, password: &str) -> String {
    use base64::Engine as _;
    let encoded =
        base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
    format!("Basic {encoded}")
}

/// Message of an error body (distribution-spec, "Error Codes"), or the body's text.
fn error_detail(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Errors {
        errors: Vec<One>,
    }
    #[derive(Deserialize)]
    struct One {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let text = match serde_json::from_slice::<Errors>(body) {
        Ok(Errors { errors }) if !errors.is_empty() => errors
            .iter()
            .map(|e| if e.message.is_empty() { &e.code } else { &e.message }.as_str())
            .collect::<Vec<_>>()
            .join("; "),
        _ => String::from_utf8_lossy(body).into_owned(),
    };
    let text: String =
        text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).take(200).collect();
    if text.is_empty() { "no explanation".into() } else { text }
}

/// Whether a retry may succeed.
pub(super) fn is_transient(error: &Error) -> bool {
    match error {
        Error::Transport { source, .. } => !is_permanent(source),
        Error::Stalled { .. } => true,
        Error::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
        _ => false,
    }
}

/// TLS certificate errors are not retried.
fn is_permanent(error: &reqwest::Error) -> bool {
    if error.is_builder() {
        return true;
    }
    let mut source = std::error::Error::source(error);
    while let Some(inner) = source {
        if let Some(io) = inner.downcast_ref::<std::io::Error>()
            && io.get_ref().is_some_and(|e| e.is::<rustls::Error>())
        {
            return true;
        }
        source = inner.source();
    }
    false
}

pub(super) fn backoff(attempt: u32) -> Duration {
    (INITIAL_BACKOFF * 2u32.saturating_pow(attempt.min(10))).min(MAX_PAUSE / 4)
}

fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}
