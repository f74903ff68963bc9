//! Blob downloads: streamed, hashed and counted, resumed after a broken connection.

use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Response, StatusCode};
use tokio::time::sleep;

use super::session::{Endpoint, Session, backoff, is_transient};
use crate::content::{Content, Ingest};
use crate::digest::Digest;
use crate::error::Error;

/// Maximum attempts per blob regardless of progress: a server that sends one byte per connection
/// must not keep a pull running without end.
const MAX_ATTEMPTS: u32 = 100;
/// A connection that transferred fewer bytes counts as a failed attempt.
const MIN_PROGRESS: u64 = 64 << 10;
const WRITE_SIZE: usize = 512 << 10;

impl Session {
    /// Fetches a small blob into memory.
    pub async fn small_blob(&self, digest: &Digest, size: u64) -> Result<Vec<u8>, Error> {
        let mut tries = self.blob_tries(digest)?;
        while let Some(endpoint) = tries.next() {
            match self.small_blob_from(endpoint, digest, size).await {
                Ok(bytes) => return Ok(bytes),
                Err(e) => tries.failed(endpoint, e)?,
            }
        }
        Err(tries.into_error())
    }

    async fn small_blob_from(
        &self,
        endpoint: &Endpoint,
        digest: &Digest,
        size: u64,
    ) -> Result<Vec<u8>, Error> {
        let what = format!("blob {digest}");
        let path = format!("blobs/{digest}");
        let mut attempt = 0;
        let bytes = loop {
            let response = self.get(endpoint, &path, &HeaderMap::new(), &what).await?;
            let limit = self.config.max_manifest_bytes;
            match self.body(endpoint, response, &what, limit).await {
                Ok(bytes) => break bytes,
                Err(e) if attempt + 1 < self.config.attempts && is_transient(&e) => {
                    sleep(backoff(attempt)).await;
                    attempt += 1;
                }
                Err(e) => return Err(e),
            }
        };
        let got = bytes.len() as u64;
        if got != size {
            return Err(Error::SizeMismatch { what, expected: size, got });
        }
        let got = Digest::of(&bytes);
        if got != *digest {
            return Err(Error::DigestMismatch { what, expected: *digest, got });
        }
        Ok(bytes)
    }

    /// Fetches a blob into the store; calls `progress` with the number of bytes so far.
    pub async fn blob(
        &self,
        digest: &Digest,
        size: u64,
        content: &Content,
        durable: bool,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Error> {
        let mut tries = self.blob_tries(digest)?;
        let mut sink = Sink::open(content, *digest, size).await?;
        progress(sink.written());
        while let Some(endpoint) = tries.next() {
            loop {
                // The bytes come from an earlier pull or another host and may be wrong.
                let inherited = sink.written() > 0;
                let fetched = match self.download(endpoint, digest, size, &mut sink, progress).await
                {
                    Ok(()) => sink.check(digest).await,
                    Err(e) => Err(e),
                };
                let error = match fetched {
                    Ok(()) => return sink.commit(digest, durable).await,
                    Err(e) => e,
                };
                let wrong = match error {
                    Error::DigestMismatch { .. } => true,
                    Error::SizeMismatch { got, .. } => got > size,
                    _ => false,
                };
                if wrong {
                    sink.reset()?;
                }
                if !(wrong && inherited) {
                    tries.failed(endpoint, error)?;
                    break;
                }
            }
        }
        Err(tries.into_error())
    }

    async fn download(
        &self,
        endpoint: &Endpoint,
        digest: &Digest,
        size: u64,
        sink: &mut Sink,
        progress: &(dyn Fn(u64) + Sync),
    ) -> Result<(), Error> {
        let what = format!("blob {digest}");
        let mut failures = 0;
        if sink.written() == size && size > 0 {
            return Ok(());
        }
        for _ in 0..MAX_ATTEMPTS {
            let before = sink.written();
            let result = self.transfer(endpoint, digest, size, sink, progress, &what).await;
            let error = match result {
                Ok(()) if sink.written() == size => return Ok(()),
                Ok(()) => {
                    let got = sink.written();
                    Error::SizeMismatch { what: what.clone(), expected: size, got }
                }
                Err(e) => e,
            };
            // The end of the body may be a connection that broke without an error.
            let short = matches!(error, Error::SizeMismatch { got, .. } if got < size);
            if !short && !is_transient(&error) {
                return Err(error);
            }
            failures = if sink.written() >= before + MIN_PROGRESS { 0 } else { failures + 1 };
            if failures >= self.config.attempts {
                return Err(error);
            }
            tracing::debug!(%digest, offset = sink.written(), %error, "transfer failed, resuming");
            sleep(backoff(failures)).await;
        }
        Err(Error::Protocol {
            registry: endpoint.authority(),
            reason: format!("{what} did not arrive in {MAX_ATTEMPTS} connections"),
        })
    }

    /// One request from the current offset.
    async fn transfer(
        &self,
        endpoint: &Endpoint,
        digest: &Digest,
        size: u64,
        sink: &mut Sink,
        progress: &(dyn Fn(u64) + Sync),
        what: &str,
    ) -> Result<(), Error> {
        let offset = sink.written();
        let mut headers = HeaderMap::new();
        if offset > 0 {
            let range = HeaderValue::try_from(format!("bytes={offset}-")).expect("digits");
            headers.insert(RANGE, range);
        }
        let path = format!("blobs/{digest}");
        let mut response = match self.get(endpoint, &path, &headers, what).await {
            // 416: the server cannot resume at this offset.
            Err(Error::Status { status: 416, .. }) if offset > 0 => {
                sink.reset()?;
                self.get(endpoint, &path, &HeaderMap::new(), what).await?
            }
            other => other?,
        };
        if sink.written() > 0 && !continues(&response, offset) {
            sink.reset()?;
            if response.status() == StatusCode::PARTIAL_CONTENT {
                response = self.get(endpoint, &path, &HeaderMap::new(), what).await?;
            }
        }
        while let Some(chunk) = self.chunk(endpoint, &mut response, what).await? {
            let chunk = chunk.as_ref();
            let got = sink.written() + chunk.len() as u64;
            if got > size {
                return Err(Error::SizeMismatch { what: what.into(), expected: size, got });
            }
            sink.pending.extend_from_slice(chunk);
            if sink.pending.len() >= WRITE_SIZE {
                sink.flush().await?;
            }
            progress(sink.written());
        }
        Ok(())
    }
}

/// Buffers a blob's bytes and writes them on a blocking thread.
struct Sink {
    /// `None` while a write is in progress.
    ingest: Option<Ingest>,
    pending: Vec<u8>,
}

impl Sink {
    async fn open(content: &Content, digest: Digest, size: u64) -> Result<Self, Error> {
        let content = content.clone();
        let ingest = run_blocking(move || {
            let mut ingest = content.resume(&digest)?;
            if ingest.written() > size {
                ingest.reset()?;
            }
            Ok(ingest)
        })
        .await?;
        Ok(Self { ingest: Some(ingest), pending: Vec::new() })
    }

    async fn check(&mut self, digest: &Digest) -> Result<(), Error> {
        self.flush().await?;
        let ingest = self.ingest.as_ref().expect("flushing puts it back");
        ingest.check(digest, &format!("blob {digest}"))
    }

    fn written(&self) -> u64 {
        self.ingest.as_ref().map_or(0, Ingest::written) + self.pending.len() as u64
    }

    async fn flush(&mut self) -> Result<(), Error> {
        let mut ingest = self.ingest.take().expect("one write at a time");
        let pending = std::mem::take(&mut self.pending);
        let (ingest, pending) = run_blocking(move || {
            ingest.write(&pending)?;
            Ok((ingest, pending))
        })
        .await?;
        self.ingest = Some(ingest);
        self.pending = pending;
        self.pending.clear();
        Ok(())
    }

    async fn commit(mut self, digest: &Digest, durable: bool) -> Result<(), Error> {
        let ingest = self.ingest.take().expect("checked after the last write");
        let (digest, what) = (*digest, format!("blob {digest}"));
        run_blocking(move || ingest.commit(&digest, &what, durable)).await
    }

    fn reset(&mut self) -> Result<(), Error> {
        self.pending.clear();
        self.ingest.as_mut().expect("no write is under way").reset()
    }
}

/// Whether the response continues at `offset` (RFC 9110, section 14.4).
fn continues(response: &Response, offset: u64) -> bool {
    response.status() == StatusCode::PARTIAL_CONTENT
        && response
            .headers()
            .get(CONTENT_RANGE)
            .and_then(|value| value.to_str().ok())
            .and_then(|value| value.strip_prefix("bytes "))
            .and_then(|value| value.split('-').next())
            .and_then(|start| start.trim().parse().ok())
            == Some(offset)
}

/// Runs blocking file operations.
pub async fn run_blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(Error::Cancelled),
        },
    }
}
