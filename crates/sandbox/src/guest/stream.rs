//! Process streams on their own vsock connections ([`agent_api::stdio`]).

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Duration;

use agent_api::STDIO_PORT;
use agent_api::stdio::{Kind, Open, Status, WINDOW};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;

use super::{Door, connect};

/// Acknowledge at the latest after this many bytes, so that the agent's window never closes on a
/// reader that keeps up.
const ACK_AFTER: u64 = (WINDOW / 4) as u64;

/// A guest that takes longer to answer is sick.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// A process' stream.
#[derive(Debug, Clone)]
pub(crate) struct StreamId {
    pub(crate) container: String,
    /// Empty: the container's own process.
    pub(crate) exec: String,
    pub(crate) kind: Kind,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum Refused {
    #[error("stream connection")]
    Io(#[from] io::Error),
    #[error("the guest refused the stream: {0:?}")]
    Status(Status),
}

async fn open(door: &Door, id: &StreamId, offset: u64) -> Result<UnixStream, Refused> {
    match tokio::time::timeout(OPEN_LIMIT, join(door, id, offset)).await {
        Ok(opened) => opened,
        Err(_) => Err(Refused::Io(io::ErrorKind::TimedOut.into())),
    }
}

async fn join(door: &Door, id: &StreamId, offset: u64) -> Result<UnixStream, Refused> {
    let mut stream = connect(door, STDIO_PORT).await?;
    let header = Open {
        kind: id.kind,
        offset,
        container_id: id.container.clone(),
        exec_id: id.exec.clone(),
    };
    stream.write_all(&header.encode()).await?;
    match Status::try_from(stream.read_u8().await?) {
        Ok(Status::Ok) => Ok(stream),
        Ok(status) => Err(Refused::Status(status)),
        Err(e) => Err(Refused::Io(io::Error::new(io::ErrorKind::InvalidData, e))),
    }
}

/// Opens a process' standard input; shutting the stream down closes it.
pub(crate) async fn open_stdin(door: &Door, id: &StreamId) -> Result<UnixStream, Refused> {
    open(door, id, 0).await
}

/// An output stream whose reader says itself what is stored.
pub(crate) struct StreamReader {
    stream: UnixStream,
}

impl StreamReader {
    pub(crate) async fn open(door: &Door, id: &StreamId, offset: u64) -> Result<Self, Refused> {
        Ok(Self { stream: open(door, id, offset).await? })
    }

    /// Reads what is there; 0 is the end. Cancel-safe.
    pub(crate) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer).await
    }

    /// Everything before `offset` is stored.
    pub(crate) async fn ack(&mut self, offset: u64) -> io::Result<()> {
        self.stream.write_all(&offset.to_le_bytes()).await
    }
}

/// An output stream that acknowledges what has been read from it.
pub(crate) struct Output {
    stream: UnixStream,
    read: Arc<AtomicU64>,
    acked: u64,
    /// An acknowledgement on its way, and how much of it is written.
    pending: Option<([u8; 8], usize)>,
}

impl Output {
    /// Opens the stream where `read` says that it has been read to, and keeps that up to date, so
    /// that it can be opened again.
    pub(crate) async fn open(
        door: &Door,
        id: &StreamId,
        read: Arc<AtomicU64>,
    ) -> Result<Self, Refused> {
        let acked = read.load(Ordering::Relaxed);
        Ok(Self { stream: open(door, id, acked).await?, read, acked, pending: None })
    }

    /// Writes acknowledgements as far as the socket takes them. A peer that has gone is noticed by
    /// the next read.
    fn flush_acks(&mut self, cx: &mut Context<'_>) {
        loop {
            let (bytes, done) = match self.pending {
                Some(pending) => pending,
                None => {
                    let read = self.read.load(Ordering::Relaxed);
                    if read == self.acked {
                        return;
                    }
                    self.acked = read;
                    (read.to_le_bytes(), 0)
                }
            };
            self.pending = Some((bytes, done));
            match Pin::new(&mut self.stream).poll_write(cx, &bytes[done..]) {
                Poll::Ready(Ok(n)) if n > 0 => {
                    let done = done + n;
                    self.pending = (done < bytes.len()).then_some((bytes, done));
                }
                Poll::Ready(_) => {
                    self.pending = None;
                    return;
                }
                Poll::Pending => return,
            }
        }
    }
}

impl AsyncRead for Output {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let before = buf.filled().len();
        let polled = Pin::new(&mut this.stream).poll_read(cx, buf);
        let got = (buf.filled().len() - before) as u64;
        let read = this.read.fetch_add(got, Ordering::Relaxed) + got;
        // Also at the end: the guest keeps a process until its last byte is acknowledged.
        if got == 0 || read - this.acked >= ACK_AFTER {
            this.flush_acks(cx);
        }
        polled
    }
}
