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
/// How often a connection that is held up is looked at.
const PEER_CHECK: Duration = Duration::from_secs(1);

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
                    // The writer gets a moment to say so.
                    tokio::time::sleep(PEER_CHECK / 10).await;
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
        loop {
            let last = matches!(next, Out::Close(_));
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
            activity.touch();
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

pub(crate) async fn deliver(to: &Sender, chunk: Bytes, peer: &Peer) -> Delivery {
    use mpsc::error::TrySendError::{Closed, Full};
    match to.chunks.try_send(chunk) {
        Ok(()) => Delivery::Sent,
        Err(Closed(_)) => Delivery::Unwanted,
        Err(Full(chunk)) => tokio::select! {
            sent = to.chunks.send(chunk) => match sent {
                Ok(()) => Delivery::Sent,
                Err(_) => Delivery::Unwanted,
            },
            () = peer.hung_up() => Delivery::Gone,
        },
    }
}

/// A second descriptor of the client's socket. A link that is held up does not read, so it would
/// not learn that the client has closed: a command that never reads its input would live on.
#[derive(Clone)]
pub(crate) struct Peer(Arc<TcpStream>);

impl Peer {
    pub(crate) fn of(socket: &TcpStream) -> std::io::Result<Peer> {
        use std::os::fd::AsFd;
        let second = std::net::TcpStream::from(socket.as_fd().try_clone_to_owned()?);
        Ok(Peer(Arc::new(TcpStream::from_std(second)?)))
    }

    async fn hung_up(&self) {
        loop {
            tokio::time::sleep(PEER_CHECK).await;
            let ready = self.0.ready(Interest::READABLE);
            match tokio::time::timeout(PEER_CHECK, ready).await {
                Ok(Ok(ready)) if !ready.is_read_closed() => {}
                Err(_) => {}
                Ok(_) => return,
            }
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
