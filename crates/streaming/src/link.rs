//! Reader and writer task of a connection, with detection of idle and disconnected clients.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt, Interest};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

use crate::io::{CHUNK, CloseReason, Out, Sender};

/// Time for the client to close after everything was sent: closing a socket with unread input sends
/// RST, which could discard the last bytes at the client.
const LINGER: Duration = Duration::from_secs(2);
/// Interval of checks whether a client whose input is blocked has disconnected.
const PEER_CHECK: Duration = Duration::from_secs(2);
/// Time for the writer to send the close frame after a protocol error.
const CLOSE_TIMEOUT: Duration = Duration::from_millis(100);

/// An upgraded connection. Dropping it closes the socket at once.
pub(crate) struct Link {
    /// Cancelled when the client has disconnected, after a protocol error, and after the idle
    /// timeout.
    pub(crate) closed: CancellationToken,
    queue: mpsc::Sender<Out>,
    writer: AbortOnDropHandle<()>,
    _reader: AbortOnDropHandle<()>,
    _idle: AbortOnDropHandle<()>,
}

/// Encodes frames.
pub(crate) trait Encoder: Send + 'static {
    fn encode(&mut self, out: Out, into: &mut BytesMut);
}

/// Resources of a link's reader.
pub(crate) struct ReaderContext {
    pub(crate) queue: mpsc::Sender<Out>,
    pub(crate) activity: Activity,
    pub(crate) peer: Peer,
}

impl Link {
    /// `read` runs until the client closes. An error is a protocol error, which is reported to the
    /// client.
    pub(crate) fn start<W, R, F, E>(
        write_half: W,
        encoder: impl Encoder,
        context: LinkContext,
        read: R,
    ) -> Link
    where
        W: AsyncWrite + Send + Unpin + 'static,
        R: FnOnce(ReaderContext) -> F,
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: std::error::Error + Send,
    {
        let LinkContext { queue, out, idle_timeout, peer } = context;
        let closed = CancellationToken::new();
        let activity = Activity::new();
        let reader = read(ReaderContext { queue: queue.clone(), activity: activity.clone(), peer });
        let reader = tokio::spawn({
            let (closed, queue) = (closed.clone(), queue.clone());
            async move {
                if let Err(error) = reader.await {
                    tracing::debug!(%error, "protocol error of a streaming client");
                    let _ = queue.try_send(Out::Close(CloseReason::ProtocolError));
                    tokio::time::sleep(CLOSE_TIMEOUT).await;
                }
                closed.cancel();
            }
        });
        let writer = tokio::spawn({
            let (closed, activity) = (closed.clone(), activity.clone());
            async move {
                if let Err(error) = write_loop(write_half, encoder, out, &activity).await {
                    tracing::debug!(%error, "streaming client");
                    closed.cancel();
                }
            }
        });
        let idle = tokio::spawn({
            let closed = closed.clone();
            async move {
                activity.idle(idle_timeout).await;
                tracing::debug!(?idle_timeout, "idle timeout of a streaming connection");
                closed.cancel();
            }
        });
        Link {
            closed,
            queue,
            writer: AbortOnDropHandle::new(writer),
            _reader: AbortOnDropHandle::new(reader),
            _idle: AbortOnDropHandle::new(idle),
        }
    }

    /// Sends what is queued and a close frame, then waits for the client to close. The session's
    /// streams must be dropped before.
    pub(crate) async fn finish(mut self) {
        let close = async {
            let _ = self.queue.send(Out::Close(CloseReason::Done)).await;
            let _ = (&mut self.writer).await;
        };
        tokio::select! {
            () = close => {}
            () = self.closed.cancelled() => return,
        }
        let _ = tokio::time::timeout(LINGER, self.closed.cancelled()).await;
    }
}

/// Resources of both tasks.
pub(crate) struct LinkContext {
    pub(crate) queue: mpsc::Sender<Out>,
    pub(crate) out: mpsc::Receiver<Out>,
    pub(crate) idle_timeout: Duration,
    pub(crate) peer: Peer,
}

async fn write_loop(
    mut socket: impl AsyncWrite + Unpin,
    mut encoder: impl Encoder,
    mut out: mpsc::Receiver<Out>,
    activity: &Activity,
) -> std::io::Result<()> {
    let mut bytes = BytesMut::with_capacity(2 * CHUNK);
    while let Some(mut next) = out.recv().await {
        let mut has_data = false;
        loop {
            let last = matches!(next, Out::Close(_));
            has_data |= !matches!(next, Out::Heartbeat | Out::Pong(_));
            encoder.encode(next, &mut bytes);
            if last {
                socket.write_all(&bytes).await?;
                return socket.shutdown().await;
            }
            if bytes.len() >= CHUNK {
                break;
            }
            match out.try_recv() {
                Ok(more) => next = more,
                Err(_) => break,
            }
        }
        while !bytes.is_empty() {
            socket.write_buf(&mut bytes).await?;
            if has_data {
                activity.touch();
            }
        }
        socket.flush().await?;
        bytes.clear();
    }
    Ok(())
}

pub(crate) enum Delivery {
    Sent,
    /// The session no longer reads this stream.
    Closed,
    /// The client disconnected while the chunk waited.
    Disconnected,
}

/// Sends a chunk to its session and waits for a slot if necessary. While it waits, the reader does
/// not read, so it would not see a closed connection, and a command that never reads its input
/// would not be ended; the client's FIN may even be behind data that exceeds the receive window. So
/// the socket's state is polled and a heartbeat frame is sent: a closed socket answers with RST.
pub(crate) async fn deliver(to: &Sender, chunk: Bytes, context: &ReaderContext) -> Delivery {
    use mpsc::error::TrySendError::{Closed, Full};
    let chunk = match to.chunks.try_send(chunk) {
        Ok(()) => return Delivery::Sent,
        Err(Closed(_)) => return Delivery::Closed,
        Err(Full(chunk)) => chunk,
    };
    let closed = async {
        loop {
            tokio::time::sleep(PEER_CHECK).await;
            if context.peer.is_disconnected().await {
                return;
            }
            // A full queue already has something to send.
            let _ = context.queue.try_send(Out::Heartbeat);
        }
    };
    tokio::select! {
        sent = to.chunks.send(chunk) => match sent {
            Ok(()) => Delivery::Sent,
            Err(_) => Delivery::Closed,
        },
        () = closed => Delivery::Disconnected,
    }
}

/// A duplicate descriptor of the client's socket, to poll its state.
#[derive(Clone)]
pub(crate) struct Peer(Arc<TcpStream>);

impl Peer {
    pub(crate) fn of(socket: &TcpStream) -> std::io::Result<Peer> {
        use std::os::fd::AsFd;
        let second = std::net::TcpStream::from(socket.as_fd().try_clone_to_owned()?);
        Ok(Peer(Arc::new(TcpStream::from_std(second)?)))
    }

    async fn is_disconnected(&self) -> bool {
        // Ready at once if there was ever something to read.
        let ready = self.0.ready(Interest::READABLE);
        match tokio::time::timeout(PEER_CHECK, ready).await {
            Ok(Ok(ready)) => ready.is_read_closed(),
            Ok(Err(_)) => true,
            Err(_) => false,
        }
    }
}

/// Time of the last transfer.
#[derive(Clone)]
pub(crate) struct Activity {
    start: Instant,
    last_ms: Arc<AtomicU64>,
}

impl Activity {
    fn new() -> Self {
        Activity { start: Instant::now(), last_ms: Arc::default() }
    }

    pub(crate) fn touch(&self) {
        let now = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.last_ms.store(now, Ordering::Relaxed);
    }

    /// Resolves after `timeout` without a transfer.
    async fn idle(&self, timeout: Duration) {
        loop {
            let last = Duration::from_millis(self.last_ms.load(Ordering::Relaxed));
            let quiet = self.start.elapsed().saturating_sub(last);
            if quiet >= timeout {
                return;
            }
            tokio::time::sleep(timeout - quiet).await;
        }
    }
}
