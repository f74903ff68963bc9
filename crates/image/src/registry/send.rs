//! One request including its redirects. They are followed here and not by the HTTP client, which
//! would forward unknown headers: credentials and the headers of `hosts.toml` are for one server
//! and must not reach another.

use reqwest::header::{HeaderMap, LOCATION};
use reqwest::{Client, Method, Request, Response, StatusCode, Url};

const MAX_REDIRECTS: usize = 5;

/// A request to send.
pub(super) struct Outgoing {
    pub url: Url,
    /// Sent to every server, also after a redirect.
    pub headers: HeaderMap,
    /// Sent to the server of `url` only, with `headers`.
    pub private: HeaderMap,
    /// Form body; makes the request a POST. Sent to the server of `url` only.
    pub body: Option<String>,
}

#[derive(Debug)]
pub(super) enum SendError {
    Http(reqwest::Error),
    /// Message about an invalid redirect.
    Redirect(String),
}

impl From<reqwest::Error> for SendError {
    fn from(e: reqwest::Error) -> Self {
        Self::Http(e)
    }
}

impl Outgoing {
    pub async fn send(mut self, client: &Client) -> Result<Response, SendError> {
        for _ in 0..=MAX_REDIRECTS {
            let response = client.execute(self.request()).await?;
            let Some(next) = self.redirected(&response)? else { return Ok(response) };
            self = next;
        }
        Err(SendError::Redirect("too many redirects".into()))
    }

    fn request(&self) -> Request {
        let method = if self.body.is_some() { Method::POST } else { Method::GET };
        let mut request = Request::new(method, self.url.clone());
        *request.headers_mut() = self.headers.clone();
        request.headers_mut().extend(self.private.clone());
        *request.body_mut() = self.body.clone().map(Into::into);
        request
    }

    /// The request for a redirect (RFC 9110, section 15.4).
    fn redirected(&self, response: &Response) -> Result<Option<Self>, SendError> {
        let keeps_body = match response.status() {
            StatusCode::MOVED_PERMANENTLY | StatusCode::FOUND | StatusCode::SEE_OTHER => false,
            StatusCode::TEMPORARY_REDIRECT | StatusCode::PERMANENT_REDIRECT => true,
            _ => return Ok(None),
        };
        let Some(location) = response.headers().get(LOCATION) else { return Ok(None) };
        let wrong = |reason: &str| Err(SendError::Redirect(reason.into()));
        let target = location.to_str().ok().and_then(|text| response.url().join(text).ok());
        let Some(url) = target else { return wrong("a redirect to an invalid address") };
        if !matches!(url.scheme(), "http" | "https") || !url.has_host() {
            return wrong("a redirect to a scheme other than http and https");
        }
        if self.url.scheme() == "https" && url.scheme() != "https" {
            return wrong("a redirect from https to plain http");
        }
        let same = url.origin() == self.url.origin();
        let body = self.body.clone().filter(|_| keeps_body);
        if body.is_some() && !same {
            return wrong("a redirect that would send credentials to another server");
        }
        // Dropped for all later redirects, also back to the first server.
        let private = if same { self.private.clone() } else { HeaderMap::new() };
        Ok(Some(Self { url, headers: self.headers.clone(), private, body }))
    }
}
