//! The resize stream: concatenated JSON objects `{"Width":80,"Height":24}`.

use bytes::{Buf, BytesMut};
use serde::Deserialize;

use crate::backend::TtySize;
use crate::io::Incoming;

/// Maximum size of an object, bytes; the stream is ignored after a longer one.
const OBJECT_LIMIT: usize = 1 << 10;

#[derive(Deserialize)]
struct Size {
    #[serde(rename = "Width")]
    width: u16,
    #[serde(rename = "Height")]
    height: u16,
}

pub(crate) struct Sizes {
    stream: Option<Incoming>,
    buffer: BytesMut,
}

impl Sizes {
    pub(crate) fn new(stream: Option<Incoming>) -> Self {
        Sizes { stream, buffer: BytesMut::new() }
    }

    /// The newest size received. Pending forever after the end of the stream. Cancel-safe.
    pub(crate) async fn next(&mut self) -> TtySize {
        while let Some(stream) = &mut self.stream {
            match stream.next().await {
                Ok(Some(chunk)) => {
                    self.buffer.extend_from_slice(&chunk);
                    if let Some(size) = self.parse() {
                        return size;
                    }
                }
                Ok(None) | Err(_) => self.stream = None,
            }
        }
        std::future::pending().await
    }

    fn parse(&mut self) -> Option<TtySize> {
        let mut sizes = serde_json::Deserializer::from_slice(&self.buffer).into_iter::<Size>();
        let mut newest = None;
        let mut used = 0;
        loop {
            match sizes.next() {
                Some(Ok(size)) => {
                    newest = Some(TtySize { width: size.width, height: size.height });
                    used = sizes.byte_offset();
                }
                Some(Err(error)) if !error.is_eof() => {
                    tracing::debug!(%error, "resize stream");
                    self.stream = None;
                    break;
                }
                Some(Err(_)) | None => break,
            }
        }
        self.buffer.advance(used);
        if self.buffer.len() > OBJECT_LIMIT {
            self.stream = None;
        }
        newest
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;
    use futures_util::FutureExt;

    use super::*;
    use crate::io;

    #[tokio::test]
    async fn the_newest_complete_size_is_used() {
        let (sender, incoming) = io::incoming();
        let mut sizes = Sizes::new(Some(incoming));
        let both =
            Bytes::from_static(b"{\"Width\":1,\"Height\":2}\n{\"Width\":3,\"Height\":4}\n{\"Wi");
        sender.chunks.send(both).await.unwrap();
        assert_eq!(sizes.next().await, TtySize { width: 3, height: 4 });
        sender.chunks.send(Bytes::from_static(b"dth\":5,\"Height\":6}")).await.unwrap();
        assert_eq!(sizes.next().await, TtySize { width: 5, height: 6 });
    }

    #[tokio::test]
    async fn the_stream_is_ignored_after_invalid_or_endless_objects() {
        for nonsense in ["hello", "{\"Width\":70000,\"Height\":1}", "[", &" ".repeat(2000)] {
            let (sender, incoming) = io::incoming();
            let mut sizes = Sizes::new(Some(incoming));
            sender.chunks.send(Bytes::from(nonsense.to_owned())).await.unwrap();
            let more = Bytes::from("x".repeat(2000));
            drop(sender.chunks.send(more).await);
            tokio::time::timeout(Duration::from_millis(20), sizes.next()).await.unwrap_err();
            assert!(sizes.next().now_or_never().is_none());
            assert!(sizes.stream.is_none());
        }
    }
}
