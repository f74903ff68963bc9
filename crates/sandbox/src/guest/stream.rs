//! Process streams, each on its own vsock connection ([`agent_api::stdio`]).

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

use super::{AgentAddress, connect};

/// Acknowledge after at max this many bytes, so that the agent's window never closes for a reader
/// that keeps up.
const ACK_AFTER: u64 = (WINDOW / 4) as u64;

/// Reconnects of a stream without receiving any data.
const RECONNECT_ATTEMPTS: u32 = 5;
const RECONNECT_PAUSE: Duration = Duration::from_millis(200);

type Reconnect = Pin<Box<dyn Future<Output = Result<Incoming, StreamError>> + Send>>;

/// Longest wait for the reply to an open request.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// A process' stream.
#[derive(Debug, Clone)]
pub(crate) struct StreamId {
    pub(crate) container: String,
    /// Empty: the container's init process.
    pub(crate) exec: String,
    pub(crate) kind: Kind,
}

#[derive(Debug, thiserror::Error)]
pub(crate) enum StreamError {
    #[error("stream connection")]
    Io(#[from] io::Error),
    #[error("the guest refused the stream: {0:?}")]
    Status(Status),
}

async fn open(
    address: &AgentAddress,
    id: &StreamId,
    offset: u64,
    framed: bool,
) -> Result<UnixStream, StreamError> {
    match tokio::time::timeout(OPEN_LIMIT, open_stream(address, id, offset, framed)).await {
        Ok(opened) => opened,
        Err(_) => Err(StreamError::Io(io::ErrorKind::TimedOut.into())),
    }
}

async fn open_stream(
    address: &AgentAddress,
    id: &StreamId,
    offset: u64,
    framed: bool,
) -> Result<UnixStream, StreamError> {
    let mut stream = connect(address, STDIO_PORT).await?;
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
        Ok(status) => Err(StreamError::Status(status)),
        Err(e) => Err(StreamError::Io(io::Error::new(io::ErrorKind::InvalidData, e))),
    }
}

/// The receiving side of an output connection.
#[derive(Debug)]
struct Incoming {
    stream: UnixStream,
    state: FrameState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FrameState {
    /// An agent without framing: the end of the connection is the end of the stream.
    Raw,
    /// Partially received length of a frame.
    Length([u8; FRAME_HEADER], usize),
    /// Remaining bytes of a frame.
    Bytes(usize),
    /// End of the stream received.
    Ended,
}

impl Incoming {
    async fn open(address: &AgentAddress, id: &StreamId, offset: u64) -> Result<Self, StreamError> {
        let (opened, state) = match open(address, id, offset, true).await {
            Err(StreamError::Status(Status::BadHeader)) => {
                (open(address, id, offset, false).await, FrameState::Raw)
            }
            opened => (opened, FrameState::Length([0; FRAME_HEADER], 0)),
        };
        Ok(Self { stream: opened?, state })
    }
}

/// Reads available data into the first `max` bytes of `buf`; returns its size.
fn poll_at_most(
    stream: &mut UnixStream,
    cx: &mut Context<'_>,
    buf: &mut ReadBuf<'_>,
    max: usize,
) -> Poll<io::Result<usize>> {
    let max = max.min(buf.remaining());
    let mut part = ReadBuf::new(buf.initialize_unfilled_to(max));
    ready!(Pin::new(stream).poll_read(cx, &mut part))?;
    let n = part.filled().len();
    buf.advance(n);
    Poll::Ready(Ok(n))
}

impl AsyncRead for Incoming {
    /// Reads nothing at the end of the stream; an earlier end of the connection is an error.
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
                FrameState::Raw => return Pin::new(stream).poll_read(cx, buf),
                FrameState::Ended => return Poll::Ready(Ok(())),
                FrameState::Length(mut bytes, have) => {
                    let mut part = ReadBuf::new(&mut bytes[have..]);
                    let n = ready!(poll_at_most(stream, cx, &mut part, FRAME_HEADER))?;
                    if n == 0 {
                        return broken();
                    }
                    *state = match (have + n, u32::from_le_bytes(bytes) as usize) {
                        (have, _) if have < FRAME_HEADER => FrameState::Length(bytes, have),
                        (_, 0) => FrameState::Ended,
                        (_, length) if length <= MAX_FRAME => FrameState::Bytes(length),
                        (_, length) => {
                            let message = format!("frame of {length} bytes from the guest");
                            let error = io::Error::new(io::ErrorKind::InvalidData, message);
                            return Poll::Ready(Err(error));
                        }
                    };
                }
                FrameState::Bytes(left) => {
                    let n = ready!(poll_at_most(stream, cx, buf, left))?;
                    if n == 0 {
                        return broken();
                    }
                    *state = match left - n {
                        0 => FrameState::Length([0; FRAME_HEADER], 0),
                        left => FrameState::Bytes(left),
                    };
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

/// Opens a process' standard input; shutting down the stream closes it.
pub(crate) async fn open_stdin(
    address: &AgentAddress,
    id: &StreamId,
) -> Result<UnixStream, StreamError> {
    open(address, id, 0, false).await
}

/// An output stream whose reader acknowledges explicitly.
pub(crate) struct StreamReader {
    incoming: Incoming,
}

impl StreamReader {
    pub(crate) async fn open(
        address: &AgentAddress,
        id: &StreamId,
        offset: u64,
    ) -> Result<Self, StreamError> {
        Ok(Self { incoming: Incoming::open(address, id, offset).await? })
    }

    /// Reads available data; 0 is the end of the stream. After an error, open the stream again.
    /// Cancel-safe.
    pub(crate) async fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.incoming.read(buffer).await
    }

    /// Everything before `offset` is stored.
    pub(crate) async fn ack(&mut self, offset: u64) -> io::Result<()> {
        self.incoming.stream.write_all(&offset.to_le_bytes()).await
    }
}

/// An output stream that acknowledges what was read. After a broken connection it reconnects at the
/// offset that was read.
pub(crate) struct Output {
    address: AgentAddress,
    id: StreamId,
    incoming: Incoming,
    /// The reconnect in progress, and the attempts since data was last received.
    reconnect: Option<Reconnect>,
    attempts: u32,
    read: Arc<AtomicU64>,
    acked: u64,
    /// An acknowledgement that is being sent, and its bytes written so far.
    pending: Option<([u8; 8], usize)>,
}

impl Output {
    /// Opens the stream at offset `read`, and updates `read`, so that it can be opened again.
    pub(crate) async fn open(
        address: &AgentAddress,
        id: &StreamId,
        read: Arc<AtomicU64>,
    ) -> Result<Self, StreamError> {
        let acked = read.load(Ordering::Relaxed);
        let incoming = Incoming::open(address, id, acked).await?;
        let (address, id) = (address.clone(), id.clone());
        Ok(Self { address, id, incoming, reconnect: None, attempts: 0, read, acked, pending: None })
    }

    /// Starts a reconnect, or returns the error.
    fn start_reconnect(&mut self, error: io::Error) -> io::Result<()> {
        // The guest violates the protocol or is unreachable.
        if error.kind() == io::ErrorKind::InvalidData || self.attempts >= RECONNECT_ATTEMPTS {
            return Err(error);
        }
        self.attempts += 1;
        let (address, id) = (self.address.clone(), self.id.clone());
        let offset = self.read.load(Ordering::Relaxed);
        self.acked = offset;
        self.pending = None;
        tracing::debug!(?id, offset, %error, "reconnecting an output stream");
        self.reconnect = Some(Box::pin(async move {
            tokio::time::sleep(RECONNECT_PAUSE).await;
            Incoming::open(&address, &id, offset).await
        }));
        Ok(())
    }

    /// Writes pending acknowledgements without blocking. A closed peer is detected by the next
    /// read.
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
            if let Some(reconnect) = &mut this.reconnect {
                let opened = ready!(reconnect.as_mut().poll(cx));
                this.reconnect = None;
                match opened {
                    Ok(incoming) => this.incoming = incoming,
                    Err(StreamError::Io(error)) => {
                        this.start_reconnect(error)?;
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
                this.start_reconnect(error)?;
                continue;
            }
            if got > 0 {
                this.attempts = 0;
            }
            // Also at EOF: the guest keeps a process until its last byte is acknowledged.
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

    /// Reads these chunks, each sent separately, and then the end of the connection.
    async fn read(state: FrameState, chunks: &[&[u8]]) -> (Vec<u8>, io::Result<()>) {
        let (local, mut peer) = UnixStream::pair().unwrap();
        let mut incoming = Incoming { stream: local, state };
        let send = async {
            for chunk in chunks {
                peer.write_all(chunk).await.unwrap();
                tokio::task::yield_now().await;
            }
            drop(peer);
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

    const BEGIN: FrameState = FrameState::Length([0; FRAME_HEADER], 0);

    #[tokio::test]
    async fn only_an_end_frame_ends_a_stream() {
        let whole: &[&[u8]] = &[b"\x05\0", b"\0\0hel", b"lo\x01\0\0\0!", b"\0\0\0\0"];
        let (bytes, end) = read(BEGIN, whole).await;
        assert!(bytes == b"hello!" && end.is_ok(), "{end:?}");
        // Data before the break is delivered.
        let flat = whole.concat();
        for cut in 0..flat.len() {
            let (bytes, end) = read(BEGIN, &[&flat[..cut]]).await;
            assert!(b"hello!".starts_with(&bytes[..]), "{cut}: {bytes:?}");
            let error = end.expect_err("a break was taken for EOF");
            assert_eq!(error.kind(), io::ErrorKind::ConnectionAborted, "{cut}: {error}");
        }
    }

    #[tokio::test]
    async fn an_oversized_frame_is_refused_and_unframed_streams_are_accepted() {
        let (_, end) = read(BEGIN, &[b"\xff\xff\xff\xff"]).await;
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::InvalidData);
        let (bytes, end) = read(FrameState::Raw, &[b"\x05\0\0\0"]).await;
        assert!(bytes == b"\x05\0\0\0" && end.is_ok());
    }
}
