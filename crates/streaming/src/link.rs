//! The two tasks of a connection, and the watch over a client that is idle, slow or gone.

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

/// After everything is sent, the client gets this long to close: a socket closed with unread
/// input would be reset, and the client might lose the last bytes.
const LINGER: Duration = Duration::from_secs(2);
/// How often a client is looked after whose input is held up.
const PEER_CHECK: Duration = Duration::from_secs(2);
/// How long the writer has for the last word to a client that broke the protocol.
const LAST_WORD: Duration = Duration::from_millis(100);

/// An upgraded connection. Dropping it closes it at once.
pub(crate) struct Link {
    /// Cancelled when the client is gone or has broken the protocol, and after idling too long.
    pub(crate) gone: CancellationToken,
    queue: mpsc::Sender<Out>,
    writer: AbortOnDropHandle<()>,
    _reader: AbortOnDropHandle<()>,
    _idle: AbortOnDropHandle<()>,
}

/// Turns what is to be sent into bytes.
pub(crate) trait Encoder: Send + 'static {
    fn encode(&mut self, out: Out, into: &mut BytesMut);
}

/// What a link's reader needs beside the socket.
pub(crate) struct ReaderContext {
    pub(crate) queue: mpsc::Sender<Out>,
    pub(crate) activity: Activity,
    pub(crate) peer: Peer,
}

impl Link {
    /// `read` runs until the client's end. Its Err is a broken protocol, which the client is told.
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
        let gone = CancellationToken::new();
        let activity = Activity::new();
        let reader = read(ReaderContext { queue: queue.clone(), activity: activity.clone(), peer });
        let reader = tokio::spawn({
            let (gone, queue) = (gone.clone(), queue.clone());
            async move {
                if let Err(error) = reader.await {
                    tracing::debug!(%error, "streaming client broke the protocol");
                    let _ = queue.try_send(Out::Close(CloseReason::ProtocolError));
                    tokio::time::sleep(LAST_WORD).await;
                }
                gone.cancel();
            }
        });
        let writer = tokio::spawn({
            let (gone, activity) = (gone.clone(), activity.clone());
            async move {
                if let Err(error) = write_loop(write_half, encoder, out, &activity).await {
                    tracing::debug!(%error, "streaming client");
                    gone.cancel();
                }
            }
        });
        let idle = tokio::spawn({
            let gone = gone.clone();
            async move {
                activity.idle(idle_timeout).await;
                tracing::debug!(?idle_timeout, "streaming connection idled too long");
                gone.cancel();
            }
        });
        Link {
            gone,
            queue,
            writer: AbortOnDropHandle::new(writer),
            _reader: AbortOnDropHandle::new(reader),
            _idle: AbortOnDropHandle::new(idle),
        }
    }

    /// Sends what is queued, says goodbye, and lets the client close. The session's streams must
    /// have been dropped.
    pub(crate) async fn finish(mut self) {
        let goodbye = async {
            let _ = self.queue.send(Out::Close(CloseReason::Done)).await;
            let _ = (&mut self.writer).await;
        };
        tokio::select! {
            () = goodbye => {}
            () = self.gone.cancelled() => return,
        }
        let _ = tokio::time::timeout(LINGER, self.gone.cancelled()).await;
    }
}

/// What both tasks of a link share.
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
        let mut moves = false;
        loop {
            let last = matches!(next, Out::Close(_));
            moves |= !matches!(next, Out::Heartbeat | Out::Pong(_));
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
            if moves {
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
    /// Nobody reads this stream any more.
    Unwanted,
    /// The client went away while its bytes waited.
    Gone,
}

/// Hands a chunk to its session, and waits for room if it has to. A link that waits does not read,
/// so it would not learn that the client has closed, and a command that never reads its input
/// would live on. Worse, the client's FIN is stuck behind the bytes that do not fit into our
/// window. So the socket is looked at, and something is sent now and then: a closed socket
/// answers with a reset.
pub(crate) async fn deliver(to: &Sender, chunk: Bytes, context: &ReaderContext) -> Delivery {
    use mpsc::error::TrySendError::{Closed, Full};
    let chunk = match to.chunks.try_send(chunk) {
        Ok(()) => return Delivery::Sent,
        Err(Closed(_)) => return Delivery::Unwanted,
        Err(Full(chunk)) => chunk,
    };
    let gone = async {
        loop {
            tokio::time::sleep(PEER_CHECK).await;
            if context.peer.has_hung_up().await {
                return;
            }
            // A queue that is full has something to send already.
            let _ = context.queue.try_send(Out::Heartbeat);
        }
    };
    tokio::select! {
        sent = to.chunks.send(chunk) => match sent {
            Ok(()) => Delivery::Sent,
            Err(_) => Delivery::Unwanted,
        },
        () = gone => Delivery::Gone,
    }
}

/// A second descriptor of the client's socket, to look at what both tasks are too busy for.
#[derive(Clone)]
pub(crate) struct Peer(Arc<TcpStream>);

impl Peer {
    pub(crate) fn of(socket: &TcpStream) -> std::io::Result<Peer> {
        use std::os::fd::AsFd;
        let second = std::net::TcpStream::from(socket.as_fd().try_clone_to_owned()?);
        Ok(Peer(Arc::new(TcpStream::from_std(second)?)))
    }

    async fn has_hung_up(&self) -> bool {
        // Ready at once if there ever was anything to read.
        let ready = self.0.ready(Interest::READABLE);
        match tokio::time::timeout(PEER_CHECK, ready).await {
            Ok(Ok(ready)) => ready.is_read_closed(),
            Ok(Err(_)) => true,
            Err(_) => false,
        }
    }
}

/// When something last moved.
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

    /// Resolves once nothing has moved for `timeout`.
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
