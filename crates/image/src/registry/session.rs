//! One pull's conversation with a registry: authentication, retries, mirrors.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::header::{ACCEPT, AUTHORIZATION, CONTENT_TYPE, HeaderMap, HeaderValue};
use reqwest::header::{RETRY_AFTER, WWW_AUTHENTICATE};
use reqwest::{Response, StatusCode, Url};
use serde::Deserialize;
use tokio::time::{sleep, timeout};

use super::auth::{Auth, Challenge, Credentials};
use super::host;
use crate::config::Config;
use crate::digest::Digest;
use crate::error::Error;
use crate::manifest;
use crate::reference::{Reference, Target};

/// Error bodies and tokens are read up to here.
const MAX_SMALL_BODY: u64 = 64 << 10;
/// First pause before another attempt; doubles each time.
const BACK_OFF: Duration = Duration::from_millis(250);
/// A registry may ask for longer pauses; more than this is not waited.
const MAX_PAUSE: Duration = Duration::from_secs(20);

/// All registries; shared by pulls so that connections are reused.
#[derive(Debug)]
pub struct Registries {
    config: Arc<Config>,
    clients: Mutex<HashMap<String, reqwest::Client>>,
}

impl Registries {
    pub fn new(config: Arc<Config>) -> Self {
        Self { config, clients: Mutex::default() }
    }

    pub fn session(&self, reference: &Reference, auth: &Auth) -> Result<Session, Error> {
        let mut endpoints = Vec::new();
        for url in host::endpoints(&self.config, &reference.registry)? {
            let authority = host::authority(&url);
            // A mirror is another party: it gets the credentials only when it is the registry.
            let own = authority == reference.registry
                || (reference.registry == "docker.io" && authority == "registry-1.docker.io");
            endpoints.push(Endpoint {
                client: self.client(&authority)?,
                credentials: if own {
                    auth.credentials(&reference.registry)
                } else {
                    Credentials::None
                },
                mirror: !own,
                url,
                authorization: tokio::sync::Mutex::default(),
            });
        }
        Ok(Session { config: Arc::clone(&self.config), reference: reference.clone(), endpoints })
    }

    fn client(&self, authority: &str) -> Result<reqwest::Client, Error> {
        let mut clients = self.clients.lock().expect("no holder panics");
        if let Some(client) = clients.get(authority) {
            return Ok(client.clone());
        }
        let client = host::client(&self.config, authority)?;
        clients.insert(authority.to_owned(), client.clone());
        Ok(client)
    }
}

pub struct Session {
    pub(super) config: Arc<Config>,
    pub(super) reference: Reference,
    pub(super) endpoints: Vec<Endpoint>,
}

pub(super) struct Endpoint {
    client: reqwest::Client,
    url: Url,
    credentials: Credentials,
    mirror: bool,
    /// The header that the last challenge led to. Locked while a token is fetched, so that layers
    /// in parallel fetch one.
    authorization: tokio::sync::Mutex<Option<HeaderValue>>,
}

/// A manifest as it came.
pub struct Fetched {
    pub bytes: Vec<u8>,
    pub digest: Digest,
    pub content_type: String,
}

impl Session {
    /// Fetches the manifest or index that `target` names.
    pub async fn manifest(&self, target: &Target) -> Result<Fetched, Error> {
        let mut errors = Vec::new();
        for endpoint in &self.endpoints {
            match self.manifest_from(endpoint, target).await {
                Ok(fetched) => return Ok(fetched),
                Err(e) => errors.push((endpoint.mirror, e)),
            }
        }
        Err(most_telling(errors))
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
                    sleep(back_off(attempt)).await;
                    attempt += 1;
                }
                Err(e) => return Err(e),
            }
        };
        let digest = Digest::of(&bytes);
        // With a tag, the registry's own word is all there is to check against.
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

    /// GET below the repository; authenticates and tries again as far as that helps. Gives only
    /// successful responses.
    pub(super) async fn get(
        &self,
        endpoint: &Endpoint,
        path: &str,
        headers: &HeaderMap,
        what: &str,
    ) -> Result<Response, Error> {
        let url = endpoint.join(&format!("v2/{}/{path}", self.reference.repository), self)?;
        let mut authenticated = false;
        let mut attempt = 0;
        loop {
            let mut headers = headers.clone();
            let sent = endpoint.authorization.lock().await.clone();
            if let Some(value) = &sent {
                headers.insert(AUTHORIZATION, value.clone());
            }
            let request = endpoint.client.get(url.clone()).headers(headers);
            let mut pause = back_off(attempt);
            let error = match self.send(endpoint, request, what).await {
                Ok(response) if response.status().is_success() => return Ok(response),
                Ok(response) if response.status() == StatusCode::UNAUTHORIZED && !authenticated => {
                    authenticated = true;
                    self.authenticate(endpoint, &response, sent).await?;
                    continue;
                }
                Ok(response) => {
                    pause = retry_after(&response).unwrap_or(pause);
                    self.status_error(endpoint, response, what).await
                }
                Err(e) => e,
            };
            attempt += 1;
            if attempt >= self.config.attempts || !is_transient(&error) || pause > MAX_PAUSE {
                return Err(error);
            }
            tracing::debug!(%url, attempt, %error, "registry request failed, trying again");
            sleep(pause).await;
        }
    }

    async fn send(
        &self,
        endpoint: &Endpoint,
        request: reqwest::RequestBuilder,
        what: &str,
    ) -> Result<Response, Error> {
        match timeout(self.stall(), request.send()).await {
            Ok(Ok(response)) => Ok(response),
            Ok(Err(source)) => Err(Error::Transport {
                registry: endpoint.authority(),
                source: source.without_url(),
            }),
            Err(_) => Err(self.stalled(endpoint, what)),
        }
    }

    pub(super) fn stall(&self) -> Duration {
        Duration::from_secs(self.config.stall_timeout_seconds)
    }

    pub(super) fn stalled(&self, endpoint: &Endpoint, what: &str) -> Error {
        Error::Stalled {
            registry: endpoint.authority(),
            what: what.into(),
            seconds: self.config.stall_timeout_seconds,
        }
    }

    /// The next piece of a body.
    pub(super) async fn chunk(
        &self,
        endpoint: &Endpoint,
        response: &mut Response,
        what: &str,
    ) -> Result<Option<impl AsRef<[u8]> + use<>>, Error> {
        match timeout(self.stall(), response.chunk()).await {
            Ok(Ok(chunk)) => Ok(chunk),
            Ok(Err(source)) => Err(Error::Transport {
                registry: endpoint.authority(),
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
        let registry = endpoint.authority();
        let status = response.status();
        let mut url = response.url().clone();
        // Signed URLs of storage behind a registry carry secrets here.
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

    /// Answers a 401. `sent` is what the refused request carried.
    async fn authenticate(
        &self,
        endpoint: &Endpoint,
        response: &Response,
        sent: Option<HeaderValue>,
    ) -> Result<(), Error> {
        let mut authorization = endpoint.authorization.lock().await;
        if *authorization != sent {
            // Another request was quicker.
            return Ok(());
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE);
        let challenge =
            challenges.iter().filter_map(|v| v.to_str().ok()).find_map(Challenge::parse);
        let denied = |detail: &str| Error::Denied {
            registry: endpoint.authority(),
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
            (Some(Challenge::Basic), _) => return Err(denied("it wants a user name and password")),
            (None, _) => return Err(denied("it names no way to authenticate")),
        };
        let mut value = HeaderValue::try_from(value)
            .map_err(|_| denied("the credentials have characters that no header can carry"))?;
        value.set_sensitive(true);
        if Some(&value) == sent.as_ref() {
            return Err(denied("it refuses the credentials"));
        }
        *authorization = Some(value);
        Ok(())
    }

    /// Fetches an access token from the service that the registry names.
    async fn token(
        &self,
        endpoint: &Endpoint,
        realm: &str,
        service: Option<&str>,
        scope: &str,
    ) -> Result<String, Error> {
        let protocol = |reason: String| Error::Protocol { registry: endpoint.authority(), reason };
        let mut url: Url =
            realm.parse().map_err(|e| protocol(format!("its token service {realm:.100?}: {e}")))?;
        let secret = endpoint.credentials != Credentials::None;
        let plain = url.scheme() != "https";
        if plain
            && secret
            && !host::is_loopback(&host::authority(&url))
            && endpoint.url.scheme() == "https"
        {
            return Err(protocol(
                "it asks for the credentials to be sent without encryption".into(),
            ));
        }
        let what = "access token";
        let request = match &endpoint.credentials {
            Credentials::Identity(token) => {
                let mut form = Url::parse("form:").expect("a constant");
                form.query_pairs_mut()
                    .append_pair("grant_type", "refresh_token")
                    .append_pair("client_id", "nacelle")
                    .append_pair("service", service.unwrap_or_default())
                    .append_pair("scope", scope)
                    .append_pair("refresh_token", token);
                endpoint
                    .client
                    .post(url)
                    .header(CONTENT_TYPE, "application/x-www-form-urlencoded")
                    .body(form.query().unwrap_or_default().to_owned())
            }
            credentials => {
                if let Some(service) = service {
                    url.query_pairs_mut().append_pair("service", service);
                }
                url.query_pairs_mut().append_pair("scope", scope);
                let request = endpoint.client.get(url);
                match credentials {
                    Credentials::Basic { username, password } => {
                        request.basic_auth(username, Some(password))
                    }
                    _ => request,
                }
            }
        };
        let response = self.send(endpoint, request, what).await?;
        if !response.status().is_success() {
            return Err(match self.status_error(endpoint, response, what).await {
                Error::NotFound { registry, .. } => {
                    Error::Protocol { registry, reason: "its token service does not exist".into() }
                }
                // A token service says with 400 that it does not like the user.
                Error::Status { registry, status: 400, detail, .. } => Error::Denied {
                    registry,
                    repository: self.reference.repository.clone(),
                    detail,
                },
                e => e,
            });
        }
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
    pub(super) fn authority(&self) -> String {
        host::authority(&self.url)
    }

    fn join(&self, path: &str, session: &Session) -> Result<Url, Error> {
        let base = self.url.as_str().trim_end_matches('/');
        format!("{base}/{path}").parse().map_err(|e| Error::RegistryConfig {
            registry: session.reference.registry.clone(),
            reason: format!("endpoint {base}: {e}"),
        })
    }
}

fn basic(username: &str, password: &str) -> String {
    use base64::Engine as _;
    let encoded =
        base64::engine::general_purpose::STANDARD.encode(format!("{username}:{password}"));
    format!("Basic {encoded}")
}

/// Of several endpoints' errors: an answer says more than silence, the registry more than a
/// mirror.
fn most_telling(errors: Vec<(bool, Error)>) -> Error {
    let rank = |(mirror, error): &(bool, Error)| match error {
        Error::Transport { .. } => (0, !mirror),
        Error::Stalled { .. } | Error::Status { .. } => (1, !mirror),
        _ => (2, !mirror),
    };
    // The last of equals would be https after http on loopback: prefer the first.
    let best = errors.into_iter().rev().max_by_key(rank);
    best.map(|(_, error)| error).expect("there is at least one endpoint")
}

/// Message of an error body (distribution-spec, "Error Codes"), or what stands there instead.
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

/// Whether another attempt may succeed.
pub(super) fn is_transient(error: &Error) -> bool {
    match error {
        Error::Transport { source, .. } => !is_permanent(source),
        Error::Stalled { .. } => true,
        Error::Status { status, .. } => matches!(status, 408 | 429 | 500 | 502 | 503 | 504),
        _ => false,
    }
}

/// A certificate or a redirect does not become right by trying again.
fn is_permanent(error: &reqwest::Error) -> bool {
    if error.is_redirect() || error.is_builder() {
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

pub(super) fn back_off(attempt: u32) -> Duration {
    (BACK_OFF * 2u32.saturating_pow(attempt.min(10))).min(MAX_PAUSE / 4)
}

fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?.to_str().ok()?;
    value.trim().parse().ok().map(Duration::from_secs)
}
