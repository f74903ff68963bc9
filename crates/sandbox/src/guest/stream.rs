//! Process streams on their own vsock connections ([`agent_api::stdio`]).

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};
use std::time::Duration;

use agent_api::STDIO_PORT;
use agent_api::stdio::{FRAME_HEADER, Kind, MAX_FRAME, Open, Status, WINDOW};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf};
use tokio::net::UnixStream;

use super::{Door, connect};

/// Acknowledge at the latest after this many bytes, so that the agent's window never closes on a
/// reader that keeps up.
const ACK_AFTER: u64 = (WINDOW / 4) as u64;

/// A broken connection is made anew so many times, as long as nothing comes over it.
const REOPEN_ATTEMPTS: u32 = 5;
const REOPEN_PAUSE: Duration = Duration::from_millis(200);

type Reopening = Pin<Box<dyn Future<Output = Result<Incoming, Refused>> + Send>>;

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

async fn open(
    door: &Door,
    id: &StreamId,
    offset: u64,
    framed: bool,
) -> Result<UnixStream, Refused> {
    match tokio::time::timeout(OPEN_LIMIT, join(door, id, offset, framed)).await {
        Ok(opened) => opened,
        Err(_) => Err(Refused::Io(io::ErrorKind::TimedOut.into())),
    }
}

async fn join(
    door: &Door,
    id: &StreamId,
    offset: u64,
    framed: bool,
) -> Result<UnixStream, Refused> {
    let mut stream = connect(door, STDIO_PORT).await?;
    let header = Open {
        kind: id.kind,
        offset,
        container_id: id.container.clone(),
        exec_id: id.exec.clone(),
        framed,
    };
    stream.write_all(&header.encode()).await?;
    match Status::try_from(stream.read_u8().await?) {
        Ok(Status::Ok) => Ok(stream),
        Ok(status) => Err(Refused::Status(status)),
        Err(e) => Err(Refused::Io(io::Error::new(io::ErrorKind::InvalidData, e))),
    }
}

/// What comes over a connection for output.
#[derive(Debug)]
struct Incoming {
    stream: UnixStream,
    state: Reading,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reading {
    /// From an agent that knows no frames: the connection's end is the stream's.
    Raw,
    /// So much of a frame's length has come.
    Length([u8; FRAME_HEADER], usize),
    /// So many bytes of a frame are to come.
    Bytes(usize),
    /// The agent has said that nothing follows.
    Ended,
}

impl Incoming {
    async fn open(door: &Door, id: &StreamId, offset: u64) -> Result<Self, Refused> {
        let (opened, state) = match open(door, id, offset, true).await {
            Err(Refused::Status(Status::BadHeader)) => {
                (open(door, id, offset, false).await, Reading::Raw)
            }
            opened => (opened, Reading::Length([0; FRAME_HEADER], 0)),
        };
        Ok(Self { stream: opened?, state })
    }
}

/// Reads what is there into the first `most` bytes of `buf`; answers how much.
fn poll_some(
    stream: &mut UnixStream,
    cx: &mut Context<'_>,
    buf: &mut ReadBuf<'_>,
    most: usize,
) -> Poll<io::Result<usize>> {
    let most = most.min(buf.remaining());
    let mut part = ReadBuf::new(buf.initialize_unfilled_to(most));
    ready!(Pin::new(stream).poll_read(cx, &mut part))?;
    let n = part.filled().len();
    buf.advance(n);
    Poll::Ready(Ok(n))
}

impl AsyncRead for Incoming {
    /// Reads nothing at the end of the stream; a connection that ends before it is an error.
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let Self { stream, state } = &mut *self;
        let broken = || {
            let message = "the connection to the guest broke before the end of the stream";
            Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionAborted, message)))
        };
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        loop {
            match *state {
                Reading::Raw => return Pin::new(stream).poll_read(cx, buf),
                Reading::Ended => return Poll::Ready(Ok(())),
                Reading::Length(mut bytes, have) => {
                    let mut part = ReadBuf::new(&mut bytes[have..]);
                    let n = ready!(poll_some(stream, cx, &mut part, FRAME_HEADER))?;
                    if n == 0 {
                        return broken();
                    }
                    *state = match (have + n, u32::from_le_bytes(bytes) as usize) {
                        (have, _) if have < FRAME_HEADER => Reading::Length(bytes, have),
                        (_, 0) => Reading::Ended,
                        (_, length) if length <= MAX_FRAME => Reading::Bytes(length),
                        (_, length) => {
                            let message = format!("frame of {length} bytes from the guest");
                            let error = io::Error::new(io::ErrorKind::InvalidData, message);
                            return Poll::Ready(Err(error));
                        }
                    };
                }
                Reading::Bytes(left) => {
                    let n = ready!(poll_some(stream, cx, buf, left))?;
                    if n == 0 {
                        return broken();
                    }
                    *state = match left - n {
                        0 => Reading::Length([0; FRAME_HEADER], 0),
                        left => Reading::Bytes(left),
                    };
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

/// Opens a process' standard input; shutting the stream down closes it.
pub(crate) async fn open_stdin(door: &Door, id: &StreamId) -> Result<UnixStream, Refused> {
    open(door, id, 0, false).await
}

/// An output stream whose reader says itself what is stored.
pub(crate) struct StreamReader {
    incoming: Incoming,
}

impl StreamReader {
    pub(crate) async fn open(door: &Door, id: &StreamId, offset: u64) -> Result<Self, Refused> {
        Ok(Self { incoming: Incoming::open(door, id, offset).await? })
    }

    /// Reads what is there; 0 is the end of the stream. After an error the stream goes on over
    /// another connection. Cancel-safe.
    pub(crate) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.incoming.read(buffer).await
    }

    /// Everything before `offset` is stored.
    pub(crate) async fn ack(&mut self, offset: u64) -> io::Result<()> {
        self.incoming.stream.write_all(&offset.to_le_bytes()).await
    }
}

/// An output stream that acknowledges what has been read from it. When its connection breaks it goes
/// on over another one, where it had been read to.
pub(crate) struct Output {
    door: Door,
    id: StreamId,
    incoming: Incoming,
    /// Being opened in place of a connection that broke, and how often that was tried since anything
    /// was read.
    reopening: Option<Reopening>,
    attempts: u32,
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
        let incoming = Incoming::open(door, id, acked).await?;
        let (door, id) = (door.clone(), id.clone());
        Ok(Self { door, id, incoming, reopening: None, attempts: 0, read, acked, pending: None })
    }

    /// Begins to open the stream again, or says what broke it.
    fn reopen(&mut self, error: io::Error) -> io::Result<()> {
        // The guest does not keep to the protocol, or cannot be reached.
        if error.kind() == io::ErrorKind::InvalidData || self.attempts >= REOPEN_ATTEMPTS {
            return Err(error);
        }
        self.attempts += 1;
        let (door, id) = (self.door.clone(), self.id.clone());
        let offset = self.read.load(Ordering::Relaxed);
        self.acked = offset;
        self.pending = None;
        tracing::debug!(?id, offset, %error, "output goes on over another connection");
        self.reopening = Some(Box::pin(async move {
            tokio::time::sleep(REOPEN_PAUSE).await;
            Incoming::open(&door, &id, offset).await
        }));
        Ok(())
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
            match Pin::new(&mut self.incoming.stream).poll_write(cx, &bytes[done..]) {
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
        loop {
            if let Some(reopening) = &mut this.reopening {
                let opened = ready!(reopening.as_mut().poll(cx));
                this.reopening = None;
                match opened {
                    Ok(incoming) => this.incoming = incoming,
                    Err(Refused::Io(error)) => {
                        this.reopen(error)?;
                        continue;
                    }
                    Err(refused) => {
                        let message = format!("output after a broken connection: {refused}");
                        return Poll::Ready(Err(io::Error::other(message)));
                    }
                }
            }
            let before = buf.filled().len();
            let polled = Pin::new(&mut this.incoming).poll_read(cx, buf);
            let got = (buf.filled().len() - before) as u64;
            let read = this.read.fetch_add(got, Ordering::Relaxed) + got;
            if let Poll::Ready(Err(error)) = polled {
                this.reopen(error)?;
                continue;
            }
            if got > 0 {
                this.attempts = 0;
            }
            // Also at the end: the guest keeps a process until its last byte is acknowledged.
            if got == 0 || read - this.acked >= ACK_AFTER {
                this.flush_acks(cx);
            }
            return polled;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a reader makes of these pieces, each sent by itself, and of the connection's end.
    async fn read(state: Reading, pieces: &[&[u8]]) -> (Vec<u8>, io::Result<()>) {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let mut incoming = Incoming { stream: ours, state };
        let send = async {
            for piece in pieces {
                theirs.write_all(piece).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(theirs);
        };
        let receive = async {
            let (mut all, mut buffer) = (Vec::new(), [0; 3]);
            loop {
                match incoming.read(&mut buffer).await {
                    Ok(0) => return (all, Ok(())),
                    Ok(n) => all.extend_from_slice(&buffer[..n]),
                    Err(error) => return (all, Err(error)),
                }
            }
        };
        tokio::join!(receive, send).0
    }

    const BEGIN: Reading = Reading::Length([0; FRAME_HEADER], 0);

    #[tokio::test]
    async fn only_the_marked_end_is_the_end_of_a_stream() {
        let whole: &[&[u8]] = &[b"\x05\0", b"\0\0hel", b"lo\x01\0\0\0!", b"\0\0\0\0"];
        let (bytes, end) = read(BEGIN, whole).await;
        assert!(bytes == b"hello!" && end.is_ok(), "{end:?}");
        // Wherever the connection breaks before, what has come stays good.
        let flat = whole.concat();
        for cut in 0..flat.len() {
            let (bytes, end) = read(BEGIN, &[&flat[..cut]]).await;
            assert!(b"hello!".starts_with(&bytes[..]), "{cut}: {bytes:?}");
            let error = end.expect_err("taken for the end");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{cut}: {error}");
        }
    }

    #[tokio::test]
    async fn a_frame_that_is_too_large_is_refused_and_an_old_agent_sends_none() {
        let (_, end) = read(BEGIN, &[b"\xff\xff\xff\xff"]).await;
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let (bytes, end) = read(Reading::Raw, &[b"\x05\0\0\0"]).await;
        assert!(bytes == b"\x05\0\0\0" && end.is_ok());
    }
}
