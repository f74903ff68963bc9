//! Issued URLs that are not used yet: each has a random token, valid once and for a limited time.

use std::collections::HashMap;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use crate::backend::{AttachParams, ExecParams, PortForwardParams};
use crate::error::Error;

#[derive(Clone, Debug)]
pub(crate) enum Request {
    Exec(ExecParams),
    Attach(AttachParams),
    PortForward(PortForwardParams),
}

impl Request {
    /// First segment of the URL path.
    pub(crate) fn verb(&self) -> &'static str {
        match self {
            Request::Exec(_) => "exec",
            Request::Attach(_) => "attach",
            Request::PortForward(_) => "portforward",
        }
    }
}

pub(crate) struct Pending {
    ttl: Duration,
    limit: usize,
    /// Held for lookups only.
    requests: Mutex<HashMap<String, Entry>>,
}

struct Entry {
    request: Request,
    expires: Instant,
}

impl Pending {
    pub(crate) fn new(ttl: Duration, limit: usize) -> Self {
        Pending { ttl, limit, requests: Mutex::default() }
    }

    /// Issues a token; returns the URL path.
    pub(crate) fn add(&self, request: Request) -> Result<String, Error> {
        let now = Instant::now();
        let mut requests = self.lock();
        if requests.len() >= self.limit {
            requests.retain(|_, entry| entry.expires > now);
            if requests.len() >= self.limit {
                return Err(Error::TooManyPending { limit: self.limit });
            }
        }
        // 122 random bits.
        let token = uuid::Uuid::new_v4().simple().to_string();
        let path = format!("/{}/{token}", request.verb());
        requests.insert(token, Entry { request, expires: now + self.ttl });
        Ok(path)
    }

    pub(crate) fn get(&self, verb: &str, token: &str) -> Option<Request> {
        let requests = self.lock();
        let entry = requests.get(token)?;
        (entry.request.verb() == verb && entry.expires > Instant::now())
            .then(|| entry.request.clone())
    }

    /// Consumes a token. False if another request was first or it has expired.
    pub(crate) fn take(&self, token: &str) -> bool {
        self.lock().remove(token).is_some_and(|entry| entry.expires > Instant::now())
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<String, Entry>> {
        self.requests.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> Request {
        Request::PortForward(PortForwardParams { pod: "p".into(), ports: vec![] })
    }

    fn token(path: &str) -> &str {
        path.strip_prefix("/portforward/").unwrap()
    }

    #[test]
    fn a_token_is_valid_once_and_for_its_own_verb() {
        let pending = Pending::new(Duration::from_secs(60), 10);
        let path = pending.add(request()).unwrap();
        assert!(pending.get("exec", token(&path)).is_none());
        assert!(pending.get("portforward", token(&path)).is_some());
        assert!(pending.take(token(&path)));
        assert!(!pending.take(token(&path)));
        assert!(pending.get("portforward", token(&path)).is_none());
    }

    #[test]
    fn a_token_expires_and_frees_its_slot() {
        let pending = Pending::new(Duration::from_millis(20), 1);
        let path = pending.add(request()).unwrap();
        assert!(matches!(pending.add(request()), Err(Error::TooManyPending { limit: 1 })));
        std::thread::sleep(Duration::from_millis(40));
        assert!(pending.get("portforward", token(&path)).is_none());
        pending.add(request()).unwrap();
        assert!(!pending.take(token(&path)));
    }
}
