//! Streams between links and sessions: bounded queues of chunks, so a slow side delays only its own
//! connection.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Maximum bytes of one read from a socket or process.
pub(crate) const CHUNK: usize = 16 << 10;
/// Queue length of a stream to its session, in chunks.
const STREAM_QUEUE: usize = 4;
/// Queue length to the socket, in chunks and control frames.
pub(crate) const OUT_QUEUE: usize = 16;

/// The client has reset the stream, or has disconnected.
#[derive(Debug)]
pub(crate) struct Reset;

/// Sending end of a stream from the client, held by the link. Dropping it is the end of the stream;
/// cancelling `reset` first is a reset.
pub(crate) struct Sender {
    pub(crate) chunks: mpsc::Sender<Bytes>,
    pub(crate) reset: Arc<CancellationToken>,
}

/// A stream from the client. Dropping it discards further data.
pub(crate) struct Incoming {
    chunks: mpsc::Receiver<Bytes>,
    reset: Arc<CancellationToken>,
}

pub(crate) fn incoming() -> (Sender, Incoming) {
    let (sender, chunks) = mpsc::channel(STREAM_QUEUE);
    let reset = Arc::new(CancellationToken::new());
    (Sender { chunks: sender, reset: reset.clone() }, Incoming { chunks, reset })
}

impl Incoming {
    /// The next chunk; None at the end of the client's input. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Bytes>, Reset> {
        match self.chunks.recv().await {
            Some(chunk) => Ok(Some(chunk)),
            None if self.reset.is_cancelled() => Err(Reset),
            None => Ok(None),
        }
    }

    pub(crate) fn outgoing(&self, id: u32, queue: &mpsc::Sender<Out>) -> Outgoing {
        Outgoing { id, queue: queue.clone(), reset: self.reset.clone() }
    }
}

/// A stream to the client.
pub(crate) struct Outgoing {
    id: u32,
    queue: mpsc::Sender<Out>,
    reset: Arc<CancellationToken>,
}

impl Outgoing {
    pub(crate) async fn send(&self, bytes: Bytes) -> Result<(), Reset> {
        if self.reset.is_cancelled() {
            return Err(Reset);
        }
        let data = Out::Data { id: self.id, bytes, end: false };
        self.queue.send(data).await.map_err(|_| Reset)
    }

    /// Ends this direction, if the protocol has half-close. Nothing may be sent afterwards.
    pub(crate) async fn finish(&self) {
        if !self.reset.is_cancelled() {
            let data = Out::Data { id: self.id, bytes: Bytes::new(), end: true };
            let _ = self.queue.send(data).await;
        }
    }

    /// Resolves when the client resets the stream.
    pub(crate) async fn reset(&self) {
        self.reset.cancelled().await;
    }
}

/// Items for a link's writer, sent in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Out {
    Data {
        id: u32,
        bytes: Bytes,
        end: bool,
    },
    /// Accepts a stream (SYN_REPLY).
    Reply {
        id: u32,
    },
    /// Refuses a stream (RST_STREAM).
    Refuse {
        id: u32,
        status: u32,
    },
    /// Reply to a ping.
    Pong(Bytes),
    /// A frame that clients ignore, see [`crate::link::deliver`].
    Heartbeat,
    /// The last item.
    Close(CloseReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseReason {
    Done,
    ProtocolError,
}
