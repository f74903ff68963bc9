//! What links and sessions hand to each other: chunks of a stream in either direction, through
//! queues short enough that a slow side holds up its own connection and nothing else.

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

/// Bytes read from a socket or a process at once.
pub(crate) const CHUNK: usize = 16 << 10;
/// Chunks of one stream that may wait for their session.
const CHUNKS_WAITING: usize = 4;
/// Chunks and replies that may wait for the socket.
pub(crate) const OUT_WAITING: usize = 16;

/// The client has thrown the stream away, in both directions, or is gone.
#[derive(Debug)]
pub(crate) struct Reset;

/// The link's end of a stream from the client. Dropping it ends the stream; cancelling `reset`
/// first breaks it off.
pub(crate) struct Sender {
    pub(crate) chunks: mpsc::Sender<Bytes>,
    pub(crate) reset: Arc<CancellationToken>,
}

/// A stream from the client. Dropping it discards what is still to come.
pub(crate) struct Incoming {
    chunks: mpsc::Receiver<Bytes>,
    reset: Arc<CancellationToken>,
}

pub(crate) fn incoming() -> (Sender, Incoming) {
    let (sender, chunks) = mpsc::channel(CHUNKS_WAITING);
    let reset = Arc::new(CancellationToken::new());
    (Sender { chunks: sender, reset: reset.clone() }, Incoming { chunks, reset })
}

impl Incoming {
    /// None at the client's end of input. Cancel-safe.
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

    /// Ends this direction, where the protocol can.
    /// Nothing may be sent after it.
    pub(crate) async fn finish(&self) {
        if !self.reset.is_cancelled() {
            let data = Out::Data { id: self.id, bytes: Bytes::new(), end: true };
            let _ = self.queue.send(data).await;
        }
    }

    /// Resolves when the client throws the stream away.
    pub(crate) async fn reset(&self) {
        self.reset.cancelled().await;
    }
}

/// What a link's writer puts on the wire, in order.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Out {
    Data {
        id: u32,
        bytes: Bytes,
        end: bool,
    },
    /// A stream is accepted.
    Reply {
        id: u32,
    },
    /// A stream is not accepted.
    Refuse {
        id: u32,
        status: u32,
    },
    /// The answer to a ping.
    Pong(Bytes),
    /// Something that a client neither answers nor shows, see [`crate::link::deliver`].
    Heartbeat,
    /// The last one: nothing more will come.
    Close(CloseReason),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CloseReason {
    Done,
    ProtocolError,
}
